"""block_hadamard in Triton: a window, signs, butterflies, signs, for whole tiles and for their tails at once.

Four stages at a time: the four bits of the index that they pair are made the last axes of a tensor, which a thread then
holds in its registers, and turn through the last place. Triton moves the numbers between threads once for four stages.
In a tail of r elements stage h joins j and j + h where r xor j >= 2 h; there each stage fetches the partner.
A tile of more than CHUNK elements goes through scratch memory, where the last stages see it a second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_random import SIGN_IN, SIGN_OUT, flip, signs, step_word
from .triton_tiles import (
    CHUNK,
    COUNT,
    FIELDS,
    FIRST,
    NUMEL,
    ROOT,
    all_owned,
    any_of,
    block_of,
    chunk_of,
    entry_of,
    factor_of,
    key_of,
    owned,
    parts_of,
    read,
    rows_of,
    tile_of,
    window,
    write,
)  # fmt: skip


@triton.jit
def _four(x, AT: tl.constexpr, BITS: tl.constexpr):
    """Stages AT .. AT + 3, those of them below BITS."""
    N: tl.constexpr = x.shape[0]
    H: tl.constexpr = 1 << AT
    y = tl.permute(tl.reshape(x, [N // (16 * H), 16, H]), (0, 2, 1))
    y = tl.reshape(y, [N // 16, 2, 2, 2, 2])
    for s in tl.static_range(4):
        if AT + s < BITS:
            a, b = tl.split(y)
            y = tl.join(a + b, a - b)
        y = tl.permute(y, (0, 4, 1, 2, 3))
    return tl.reshape(tl.permute(tl.reshape(y, [N // (16 * H), H, 16]), (0, 2, 1)), [N])


@triton.jit
def butterflies(x, BITS: tl.constexpr):
    """H over the lowest BITS bits of the index of x, 256 numbers or more; stages ascending."""
    for k in tl.static_range((BITS + 3) // 4):
        x = _four(x, 4 * k, BITS)
    return x


@triton.jit
def _some_butterflies(x, level, AT: tl.constexpr, BITS: tl.constexpr):
    """The same, stage AT + s only where it is below ``level``, log2 of the element's block."""
    i = tl.arange(0, x.shape[0])
    s = tl.full([], 0, tl.int32)
    while s < BITS:
        y = tl.gather(x, i ^ (1 << s), 0)
        changed = tl.where(((i >> s) & 1) != 0, y - x, x + y)
        x = tl.where(level > AT + s, changed, x)
        s += 1
    return x


@triton.jit
def _levels(rest, j):
    """log2 of the block in which each element of a tile of ``rest`` lies; -1 for none."""
    exponent = (((rest ^ j).to(tl.float32).to(tl.int32, bitcast=True)) >> 23) - 127
    return tl.where(j < rest, exponent, -1)


@triton.jit
def _scale(plan, factor, level, C: tl.constexpr):
    """fl(factor 2^(-level / 2)), the square root as float32 or float64 has it."""
    half = tl.maximum(level, 0) >> 1
    if tl.float64 == C:
        power = ((1023 - half.to(tl.int64)) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((127 - half) << 23).to(tl.float32, bitcast=True)
    odd = tl.load(plan + ROOT).to(tl.float64, bitcast=True).to(C)
    return factor * tl.where((level & 1) != 0, odd * power, power)


@triton.jit
def _inner(x, level, LOG: tl.constexpr, FULL: tl.constexpr):
    """The stages that stay in the chunk; x is [R, TS]."""
    BITS: tl.constexpr = LOG if LOG < 12 else 12
    flat = tl.reshape(x, [x.shape[0] * x.shape[1]])
    flat = (
        butterflies(flat, BITS)
        if FULL
        else _some_butterflies(flat, tl.reshape(level, [x.shape[0] * x.shape[1]]), 0, BITS)
    )
    return tl.reshape(flat, x.shape)


@triton.jit
def _outer(x, rest, HIGH: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr):
    """The stages of a tile that go from chunk to chunk, on its numbers in scratch memory ``x``."""
    tl.debug_barrier()
    k = tl.arange(0, CHUNK)
    part = tl.full([], 0, tl.int32)
    while part < HIGH:
        j = (k % HIGH) * CHUNK + part * (CHUNK // HIGH) + k // HIGH
        y = tl.load(x + j)
        y = butterflies(y, LOG - 12) if FULL else _some_butterflies(y, _levels(rest, j), 12, LOG - 12)
        tl.store(x + j, y)
        part += 1
    tl.debug_barrier()


@triton.jit
def _columns(
    plan, row, windows, zx, begin, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """E zc: each element's column, [R, TS]."""
    R: tl.constexpr = rows_of(TILE)
    tile, rest, place = tile_of(row, begin, TILE)
    j = place + tl.arange(0, chunk_of(TILE) // R)[None, :]
    zero = tl.full([], 0, tl.int32)
    if FULL:
        x = tl.load(zx + (window(plan, row, windows, tile, zero, PACKED, BIG) + j))
    else:
        x = tl.zeros([R, chunk_of(TILE) // R], zx.dtype.element_ty)
        m = zero + LOG
        while m >= 0:
            there, at = block_of(rest, m)
            if any_of(there):
                o = window(plan, row, windows, tile + at, zero, PACKED, BIG)
                inside = (there != 0) & (j >= at) & (j - at < (1 << m))
                x = tl.where(inside, tl.load(zx + (o + j - at), mask=inside, other=0.0), x)
            m -= 1
    return x


@triton.jit
def _add_columns(
    plan, row, windows, acc, x, begin, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """acc += E' x; acc is [R, 1] pointers, a row of sums for each row of x."""
    R: tl.constexpr = rows_of(TILE)
    tile, rest, place = tile_of(row, begin, TILE)
    j = place + tl.arange(0, chunk_of(TILE) // R)[None, :]
    zero = tl.full([], 0, tl.int32)
    if FULL:
        to = acc + (window(plan, row, windows, tile, zero, PACKED, BIG) + j)
        tl.store(to, tl.load(to) + x)
        tl.debug_barrier()  # what is added next may be read by other threads
    else:
        m = zero + LOG
        while m >= 0:
            there, at = block_of(rest, m)
            if any_of(there):
                to = acc + (window(plan, row, windows, tile + at, zero, PACKED, BIG) + j - at)
                inside = (there != 0) & (j >= at) & (j - at < (1 << m))
                tl.store(to, tl.load(to, mask=inside, other=0.0) + x, mask=inside)
                tl.debug_barrier()
            m -= 1


@triton.jit
def _sign(key, stream: tl.constexpr, begin, step, TILE: tl.constexpr, C: tl.constexpr):
    x = signs(key, stream, begin, tl.full([], 0, tl.int32), step, chunk_of(TILE), C)
    return tl.reshape(x, [rows_of(TILE), chunk_of(TILE) // rows_of(TILE)])


@triton.jit
def _level_of(row, begin, TILE: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr):
    """log2 of the block of each element, or of all."""
    if FULL:
        return tl.full([], LOG, tl.int32)
    else:
        _, rest, place = tile_of(row, begin, TILE)
        return _levels(rest, place + tl.arange(0, chunk_of(TILE) // rows_of(TILE))[None, :])


@triton.jit
def _rest(row, begin, TILE: tl.constexpr):
    """The elements in a tile."""
    return tl.minimum(tl.load(row + NUMEL) - begin, TILE).to(tl.int32)


@triton.jit
def _forward(
    plan, row, addresses, windows, zx, scratch, step, begin, batch, extent, T: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr, ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = rows_of(TILE)
    HIGH: tl.constexpr = parts_of(TILE)
    key = key_of(row)
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    factor = factor_of(row, C)
    i = tl.arange(0, R)[:, None] * (chunk_of(TILE) // R) + tl.arange(0, chunk_of(TILE) // R)[None, :]
    b = tl.full([], 0, tl.int32)
    while b < batch:
        part = tl.full([], 0, tl.int32)
        while part < HIGH:
            at = begin + part * chunk_of(TILE)
            level = _level_of(row, at, TILE, LOG, FULL)
            x = _columns(plan, row, windows, zx, at, TILE, LOG, PACKED, BIG, FULL)
            x = _inner(flip(x, _sign(key, SIGN_IN, at, step, TILE, C)), level, LOG, FULL)
            if HIGH == 1:
                low, high = owned(row, at, chunk_of(TILE))
                y = flip(x * _scale(plan, factor, level, C), _sign(key, SIGN_OUT, at, step, TILE, C))
                t0 = read(addresses, row, at - first, i, low, high, T, C, ALIGNED, FULL)
                write(addresses + 1, b * count + at - first, i, low, high, t0 + y, T, ALIGNED, FULL)
            else:
                tl.store(scratch + part * chunk_of(TILE) + i, x)
            part += 1
        if HIGH > 1:
            _outer(scratch, _rest(row, begin, TILE), HIGH, LOG, FULL)
            part = tl.full([], 0, tl.int32)
            while part < HIGH:
                at = begin + part * chunk_of(TILE)
                low, high = owned(row, at, chunk_of(TILE))
                level = _level_of(row, at, TILE, LOG, FULL)
                x = tl.load(scratch + part * chunk_of(TILE) + i)
                y = flip(x * _scale(plan, factor, level, C), _sign(key, SIGN_OUT, at, step, TILE, C))
                t0 = read(addresses, row, at - first, i, low, high, T, C, ALIGNED, FULL)
                write(addresses + 1, b * count + at - first, i, low, high, t0 + y, T, ALIGNED, FULL)
                part += 1
            tl.debug_barrier()
        zx += extent
        b += 1


@triton.jit
def _backward(
    plan, row, addresses, windows, acc, scratch, step, begin, batch, extent, T: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr, ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = rows_of(TILE)
    HIGH: tl.constexpr = parts_of(TILE)
    key = key_of(row)
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    factor = factor_of(row, C)
    i = tl.arange(0, R)[:, None] * (chunk_of(TILE) // R) + tl.arange(0, chunk_of(TILE) // R)[None, :]
    q = tl.arange(0, R)[:, None].to(tl.int64)
    b = tl.full([], 0, tl.int32)
    while b < batch:
        to = acc + (q * batch + b) * extent
        part = tl.full([], 0, tl.int32)
        while part < HIGH:
            at = begin + part * chunk_of(TILE)
            low, high = owned(row, at, chunk_of(TILE))
            level = _level_of(row, at, TILE, LOG, FULL)
            x = read(addresses, row, b * count + at - first, i, low, high, T, C, ALIGNED, FULL)
            x = flip(x * _scale(plan, factor, level, C), _sign(key, SIGN_OUT, at, step, TILE, C))
            x = _inner(x, level, LOG, FULL)
            if HIGH == 1:
                x = flip(x, _sign(key, SIGN_IN, at, step, TILE, C))
                _add_columns(plan, row, windows, to, x, at, TILE, LOG, PACKED, BIG, FULL)
            else:
                tl.store(scratch + part * chunk_of(TILE) + i, x)
            part += 1
        if HIGH > 1:
            _outer(scratch, _rest(row, begin, TILE), HIGH, LOG, FULL)
            part = tl.full([], 0, tl.int32)
            while part < HIGH:
                at = begin + part * chunk_of(TILE)
                x = flip(tl.load(scratch + part * chunk_of(TILE) + i), _sign(key, SIGN_IN, at, step, TILE, C))
                _add_columns(plan, row, windows, to, x, at, TILE, LOG, PACKED, BIG, FULL)
                part += 1
        b += 1


@triton.jit(do_not_specialize=["at", "rows", "windows", "batch", "extent"])
def forward(
    plan, pointers, zx, scratch, step, at: tl.int64, rows: tl.int64, windows: tl.int64, batch: tl.int32,
    extent: tl.int64, T: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr, ALIGNED: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """theta of one chunk, or of one larger tile."""
    UNIT: tl.constexpr = chunk_of(TILE) * parts_of(TILE)
    program = tl.program_id(0)
    member, chunk = entry_of(plan, at + program)
    row = plan + rows + member * FIELDS
    begin = chunk * UNIT
    full = all_owned(row, begin, UNIT)
    word = step_word(step, REDRAWN)
    addresses, turns = pointers + 2 * member, plan + windows + member
    if parts_of(TILE) > 1:
        scratch += program.to(tl.int64) * TILE
    if full:
        _forward(
            plan, row, addresses, turns, zx, scratch, word, begin, batch, extent, T, C, TILE, LOG, PACKED, BIG,
            ALIGNED, True,
        )  # fmt: skip
    else:
        _forward(
            plan, row, addresses, turns, zx, scratch, word, begin, batch, extent, T, C, TILE, LOG, PACKED, BIG,
            ALIGNED, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["at", "work", "rows", "windows", "each", "batch", "extent"])
def backward(
    plan, pointers, acc, scratch, step, at: tl.int64, work: tl.int64, rows: tl.int64, windows: tl.int64,
    each: tl.int64, batch: tl.int32, extent: tl.int64, T: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    LOG: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr, ALIGNED: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """The sums of ``each`` chunks or larger tiles; one set for each row of a chunk."""
    UNIT: tl.constexpr = chunk_of(TILE) * parts_of(TILE)
    R: tl.constexpr = rows_of(TILE)
    program = tl.program_id(0).to(tl.int64)
    word = step_word(step, REDRAWN)
    acc += program * R * batch * extent
    if parts_of(TILE) > 1:
        scratch += program * TILE
    n = program * each
    end = tl.minimum(n + each, work)
    while n < end:
        member, chunk = entry_of(plan, at + n)
        row = plan + rows + member * FIELDS
        begin = chunk * UNIT
        full = all_owned(row, begin, UNIT)
        addresses, turns = pointers + 2 * member, plan + windows + member
        if full:
            _backward(
                plan, row, addresses, turns, acc, scratch, word, begin, batch, extent, T, C, TILE, LOG, PACKED, BIG,
                ALIGNED, True,
            )  # fmt: skip
        else:
            _backward(
                plan, row, addresses, turns, acc, scratch, word, begin, batch, extent, T, C, TILE, LOG, PACKED, BIG,
                ALIGNED, False,
            )  # fmt: skip
        n += 1
