"""Triton kernels of spectral normalization over a list of weights: tables, helpers, the forward.

``reference.py`` has the maths. One launch serves every member of a list. ``plan`` is a table of int64, written by
``triton_plan.py``: a header, a row of FIELDS numbers for each member, and a map for each launch with an entry (member,
block) for each program. ``pointers`` has a row of addresses for each member. Both lie on the device: a launch uploads
nothing.

A weight is [a, m, b] in memory: the matrix W of m rows and n = a b columns; column c = i b + j begins at i m b + j. One
of its axes is the *outer* one, along which programs are cut, the other the *inner* one, which a program sees whole::

    d = W inner,  e = W'd                  one read of W gives both, whichever axis is the outer one
    u first: outer = rows, t = d, z = e    v first: outer = columns, z = d, t = e

``products`` writes d and, for each program, its part of e; ``gather`` adds the parts; ``finish`` writes the results. e
is of the order of |W|^2, which float32 may not hold: each program divides its d by a power of two (exact) and says by
which. Sums of squares are float64. No sum depends on when a program runs: the same bits every time.

Loops are ``while``: Triton 3.6 under its interpreter refuses ``range`` with a bound from memory (numpy 2.4). Numbers
are rounded to bfloat16 by hand because the interpreter truncates; a GPU has the integer operations to spare.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import address, narrow

# The plan's header, and a member's row in it.
EPS, BOUND, BOUNDED, HEADER = (tl.constexpr(i) for i in range(4))
NAMES = (
    "kind", "m", "n", "b", "slab", "outer", "inner", "outer_period", "outer_turns", "inner_period", "inner_turns",
    "outer_at", "inner_at", "sigma_at", "iterations", "parts", "groups", "gathers", "tiles", "part_at", "power_at",
    "d_at", "e_at", "dsum_at", "esum_at", "factor_at", "numel", "lines", "column_blocks",
)  # fmt: skip
FIELD = {name: i for i, name in enumerate(NAMES)}
FIELDS = tl.constexpr(len(NAMES))
(
    KIND, M, N, B, SLAB, OUTER, INNER, OUTER_PERIOD, OUTER_TURNS, INNER_PERIOD, INNER_TURNS, OUTER_AT, INNER_AT,
    SIGMA_AT, ITERATIONS, PARTS, GROUPS, GATHERS, TILES, PART_AT, POWER_AT, D_AT, E_AT, DSUM_AT, ESUM_AT, FACTOR_AT,
    NUMEL, LINES, COLUMN_BLOCKS,
) = (tl.constexpr(i) for i in range(len(NAMES)))  # fmt: skip

# A member's row of pointers: of the forward and of the backward.
WEIGHT, GAIN, OUTER0, INNER0, OUT = (tl.constexpr(i) for i in range(5))
DOUT, DWEIGHT = tl.constexpr(2), tl.constexpr(3)
POINTERS = tl.constexpr(5)

MAX_PARTS = tl.constexpr(512)  # partial sums of a member, which every later program adds up
GATHER_ROWS, GATHER_COLUMNS = tl.constexpr(64), tl.constexpr(64)
VECTOR = tl.constexpr(256)

# Kinds of tile: 4 bucket + 2 (outer axis is the rows) + aligned. Only the kinds in the list are compiled.
KIND_BUCKETS = 9
WIDE = tl.constexpr(8)  # the bucket of members whose inner axis no tile holds


@triton.jit
def _member(plan, at):
    entry = tl.load(plan + at + tl.program_id(0))
    return entry & 0xFFFFFFFF, (entry >> 32).to(tl.int32)


@triton.jit
def _int(field):
    return tl.load(field).to(tl.int32)


@triton.jit
def _power(x):
    """The power of two below x, kept where its inverse is a number too."""
    if x.dtype == tl.float64:
        exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        exponent = tl.minimum(tl.maximum(exponent, 1023 - 900), 1023 + 900)
        return (exponent << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.minimum(tl.maximum(exponent, 127 - 100), 127 + 100)
        return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(power):
    if power.dtype == tl.float64:
        return (0x7FE0000000000000 - power.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)
    else:
        return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _total(sums, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    return tl.sum(tl.load(sums + i, mask=i < count, other=0.0), axis=0)


@triton.jit
def _at_least(x, eps):
    """max(x, eps), where NaN stays NaN."""
    return tl.where(x < eps, eps, x)


@triton.jit
def _number(table):
    """A float64 in a table of int64."""
    return tl.load(table).to(tl.float64, bitcast=True)


@triton.jit
def _logical(i, period, turns):
    """Where position i of memory stands in v: [count, period] in memory is [period, turns] in v."""
    return (i % period) * turns + i // period


@triton.jit
def _scale(plan, sigma):
    """s(sigma) and s'(sigma) of reference.py."""
    bounded = tl.load(plan + BOUNDED) != 0
    c = _number(plan + BOUND)  # 1 without a bound
    active = (sigma != sigma) | tl.where(bounded, sigma > c, sigma != 0)
    safe = tl.where(active, sigma, 1.0)
    return tl.where(active, c / safe, 1.0), tl.where(active, -c / (safe * safe), 0.0)


@triton.jit
def _gain(row, C: tl.constexpr):
    at = tl.load(row + GAIN)
    return tl.load(at.to(tl.pointer_type(C)), mask=at != 0, other=1.0).to(tl.float64)


@triton.jit
def _tile(w, first, outer, inner, m, n, b, slab, ROWS: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr):
    """W at ``first + outer`` of the outer and at ``inner`` of the inner axis; zero outside.

    The columns are the last axis of the tile. Only the first row's position takes 64 bits, so that fewer registers do.
    """
    if ROWS:
        r = outer[:, None]
        c = inner[None, :]
        w += first.to(tl.int64) * b
        rows, columns = m - first, n
    else:
        r = inner[:, None]
        c = first + outer[None, :]
        rows, columns = m, n
    at = r * b + (c if ALIGNED else c // b * slab + c % b)
    return tl.load(w + at, mask=(r < rows) & (c < columns), other=0.0).to(C)


@triton.jit
def _along(x, ROWS: tl.constexpr, OUTER_AXIS: tl.constexpr):
    """A vector along the outer or the inner axis, to be multiplied with a tile."""
    return x[:, None] if ROWS == OUTER_AXIS else x[None, :]


@triton.jit
def _inner_vector(i, seg, row, numbers, sums, eps, C: tl.constexpr, FIRST: tl.constexpr):
    """What W is multiplied with: the vector as it came in, or unit(e) of the iteration before."""
    inside = i < _int(seg + INNER)
    if FIRST:
        at = _logical(i, _int(seg + INNER_PERIOD), _int(seg + INNER_TURNS))
        return tl.load(tl.load(row + INNER0).to(tl.pointer_type(C)) + at, mask=inside, other=0.0)
    else:
        factor = tl.load(sums + tl.load(seg + FACTOR_AT))
        length = factor * tl.sqrt(_total(sums + tl.load(seg + ESUM_AT), tl.load(seg + GATHERS), MAX_PARTS))
        e = tl.load(numbers + tl.load(seg + E_AT) + i, mask=inside, other=0.0)
        return (e.to(tl.float64) * (factor / _at_least(length, eps))).to(C)


@triton.jit
def _products(
    plan, seg, row, numbers, sums, block, T: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    INNER_AXIS: tl.constexpr = 1 if ROWS else 0
    OUTER_AXIS: tl.constexpr = 0 if ROWS else 1
    eps = _number(plan + EPS)
    w = tl.load(row + WEIGHT).to(tl.pointer_type(T))
    m, n, b, slab = _int(seg + M), _int(seg + N), _int(seg + B), _int(seg + SLAB)
    if ALIGNED:  # one slab: n is b
        w = tl.multiple_of(w, 16)
        b = tl.multiple_of(tl.load(seg + B).to(tl.int32), 16)  # loaded here: a hint on what a function returns is lost
        n = b
    outers, inners, groups = _int(seg + OUTER), _int(seg + INNER), _int(seg + GROUPS)
    evaluating = tl.load(seg + ITERATIONS) == 0
    with_ = tl.load(row + OUTER0).to(tl.pointer_type(C))
    d_to = numbers + tl.load(seg + D_AT)
    part = numbers + tl.load(seg + PART_AT) + block.to(tl.int64) * inners

    power = _power(tl.full([], 0.0, C))
    total = tl.full([], 0.0, tl.float64)
    i = tl.arange(0, BI)
    x = _inner_vector(i, seg, row, numbers, sums, eps, C, FIRST)
    e = tl.zeros([BI], C)
    g = 0
    while g < groups:
        first = (block * groups + g) * BO
        o = first + tl.arange(0, BO)
        if IS_WIDE:
            products = tl.zeros([BO, BI] if ROWS else [BI, BO], C)
            j = 0
            while j < inners:
                x = _inner_vector(j + i, seg, row, numbers, sums, eps, C, FIRST)
                products += _tile(w, first, tl.arange(0, BO), j + i, m, n, b, slab, ROWS, ALIGNED, C) * _along(
                    x, ROWS, False
                )
                j += BI
            d = tl.sum(products, axis=INNER_AXIS)
        else:
            tile = _tile(w, first, tl.arange(0, BO), i, m, n, b, slab, ROWS, ALIGNED, C)
            d = tl.sum(tile * _along(x, ROWS, False), axis=INNER_AXIS)
        tl.store(d_to + o, d, mask=o < outers)
        other = tl.where(evaluating, tl.load(with_ + o, mask=(o < outers) & evaluating, other=0.0), d)
        total += tl.sum(d.to(tl.float64) * other.to(tl.float64), axis=0)

        above = tl.maximum(power, _power(tl.max(tl.abs(d), axis=0)))
        fade = power * _inverse(above)
        scaled = _along(d * _inverse(above), ROWS, True)
        if IS_WIDE:
            j = tl.where(evaluating, inners, 0)
            while j < inners:  # W once more, out of the cache as far as it is there
                tile = _tile(w, first, tl.arange(0, BO), j + i, m, n, b, slab, ROWS, ALIGNED, C)
                inside = j + i < inners
                before = tl.load(part + j + i, mask=inside & (g > 0), other=0.0)
                tl.store(part + j + i, before * fade + tl.sum(tile * scaled, axis=OUTER_AXIS), mask=inside)
                j += BI
            tl.debug_barrier()  # the next group reads what other threads may have written
        else:
            e = e * fade + tl.sum(tile * scaled, axis=OUTER_AXIS)
        power = above
        g += 1
    if not IS_WIDE:
        tl.store(part + i, e, mask=i < inners)
    tl.store(numbers + tl.load(seg + POWER_AT) + block, power)
    tl.store(sums + tl.load(seg + DSUM_AT) + block, total)


@triton.jit(do_not_specialize=["at"])
def products(
    plan, pointers, numbers, sums, at: tl.int64, T: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """d, and each program's part of e with its power of two; <d, d>, or <d, outer> where nothing is iterated."""
    member, block = _member(plan, at)
    seg = plan + HEADER + member * FIELDS
    row = pointers + member * POINTERS
    kind = tl.load(seg + KIND)
    for k in tl.static_range(36):
        if (KINDS >> k) & 1:  # noqa: SIM102  known to the compiler, the next is not
            if kind == k:
                ROWS: tl.constexpr = (k // 2) % 2 == 1
                IS_WIDE: tl.constexpr = k // 4 == WIDE
                BI: tl.constexpr = TILE // 32 if IS_WIDE else 64 << (k // 4)
                _products(
                    plan, seg, row, numbers, sums, block, T, C, FIRST, BI, TILE // BI, ROWS, k % 2 == 1, IS_WIDE
                )  # fmt: skip


@triton.jit(do_not_specialize=["at"])
def gather(plan, numbers, sums, at: tl.int64, C: tl.constexpr):
    """e = the sum of its parts, up to the power of two in ``factor``, which is also divided by the length of d."""
    member, block = _member(plan, at)
    seg = plan + HEADER + member * FIELDS
    parts, inners, tiles = _int(seg + PARTS), _int(seg + INNER), _int(seg + TILES)
    powers = numbers + tl.load(seg + POWER_AT)
    part = numbers + tl.load(seg + PART_AT)
    all_parts = tl.arange(0, MAX_PARTS)
    power = tl.max(tl.load(powers + all_parts, mask=all_parts < parts, other=0.0), axis=0)
    total = tl.full([], 0.0, tl.float64)
    t = 0
    while t < tiles:
        c = (block * tiles + t) * GATHER_COLUMNS + tl.arange(0, GATHER_COLUMNS)
        e = tl.zeros([GATHER_COLUMNS], C)
        k = 0
        while k < parts:
            p = k + tl.arange(0, GATHER_ROWS)
            share = tl.load(powers + p, mask=p < parts, other=0.0) * _inverse(power)
            inside = (p < parts)[:, None] & (c < inners)[None, :]
            e += tl.sum(
                tl.load(part + p[:, None] * inners + c[None, :], mask=inside, other=0.0) * share[:, None], axis=0
            )
            k += GATHER_ROWS
        tl.store(numbers + tl.load(seg + E_AT) + c, e, mask=c < inners)
        total += tl.sum(e.to(tl.float64) * e.to(tl.float64), axis=0)
        t += 1
    tl.store(sums + tl.load(seg + ESUM_AT) + block, total)
    if block == 0:
        length = tl.sqrt(_total(sums + tl.load(seg + DSUM_AT), parts, MAX_PARTS))
        tl.store(sums + tl.load(seg + FACTOR_AT), power.to(tl.float64) / _at_least(length, _number(plan + EPS)))


@triton.jit
def _write_vector(first, n, moved, fresh, by, old, period, turns, state, TILE: tl.constexpr):
    """state = fresh / by, or what it was, from ``first`` on; a few at a time, because a division takes registers."""
    end = tl.minimum(n, first + TILE)
    while first < end:
        i = first + tl.arange(0, VECTOR)
        inside = i < end
        at = _logical(i, period, turns)
        kept = tl.load(old + at, mask=inside & (not moved), other=0.0)
        value = tl.load(fresh + i, mask=inside & moved, other=0.0).to(tl.float64) / by
        tl.store(state + at, tl.where(moved, value.to(kept.dtype), kept), mask=inside)
        first += VECTOR


@triton.jit(do_not_specialize=["at"])
def finish(
    plan, pointers, numbers, sums, state, at: tl.int64, T: tl.constexpr, C: tl.constexpr, TO: tl.constexpr,
    WRITE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state and, where WRITE is set, the outputs."""
    member, block = _member(plan, at)
    seg = plan + HEADER + member * FIELDS
    row = pointers + member * POINTERS
    eps = _number(plan + EPS)
    iterated = tl.load(seg + ITERATIONS) > 0
    dsum = _total(sums + tl.load(seg + DSUM_AT), tl.load(seg + PARTS), MAX_PARTS)
    esum = _total(sums + tl.load(seg + ESUM_AT), tl.where(iterated, tl.load(seg + GATHERS), 0), MAX_PARTS)
    factor = tl.load(sums + tl.load(seg + FACTOR_AT), mask=iterated, other=1.0)
    length = factor * tl.sqrt(esum)
    exact = tl.where(iterated, length * (length / _at_least(length, eps)), dsum)
    sigma = exact.to(C)
    moved = iterated & (sigma - sigma == 0) & (sigma != 0)

    first = block.to(tl.int64) * TILE
    outers, inners = _int(seg + OUTER), _int(seg + INNER)
    if first < outers:
        by = _at_least(tl.sqrt(tl.where(iterated, dsum, 1.0)), eps)
        _write_vector(
            block * TILE, outers, moved, numbers + tl.load(seg + D_AT), by,
            tl.load(row + OUTER0).to(tl.pointer_type(C)),
            _int(seg + OUTER_PERIOD), _int(seg + OUTER_TURNS), state + tl.load(seg + OUTER_AT), TILE,
        )  # fmt: skip
    if first < inners:
        by = _at_least(length, eps) / factor
        _write_vector(
            block * TILE, inners, moved, numbers + tl.load(seg + E_AT), by,
            tl.load(row + INNER0).to(tl.pointer_type(C)),
            _int(seg + INNER_PERIOD), _int(seg + INNER_TURNS), state + tl.load(seg + INNER_AT), TILE,
        )  # fmt: skip
    if block == 0:
        tl.store(state + tl.load(seg + SIGMA_AT), sigma)
    if WRITE:
        s, _ = _scale(plan, sigma.to(tl.float64))
        by = (s * _gain(row, C)).to(C)
        w = address(row + WEIGHT, first, T, ALIGNED)
        out = address(row + OUT, first, TO, ALIGNED)
        left = tl.load(seg + NUMEL) - first
        k = tl.arange(0, TILE)
        if left >= TILE:  # a mask whose end is not known to be a multiple of 16 bytes splits every access
            tl.store(out + k, narrow(tl.load(w + k).to(C) * by, TO))
        else:
            tl.store(out + k, narrow(tl.load(w + k, mask=k < left, other=0.0).to(C) * by, TO), mask=k < left)
