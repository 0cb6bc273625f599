"""one_hot, one_hot_unsigned and sparse in Triton: an element reads one column of each stratum.

A window is read in order and permuted through shared memory; backward an element's number goes the same way back,
through the inverse permutation, so that it is added to the columns in order. Each row of a program has sums of its own:
no two threads ever add to one place, and the order of additions is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_random import PERM, draw, flip, permuted, step_word, unpermuted
from .triton_tiles import (
    COUNT,
    FIELDS,
    FIRST,
    all_owned,
    any_of,
    chunk_of,
    entry_of,
    factor_of,
    key_of,
    owned,
    parts_of,
    places,
    read,
    rows_of,
    signs_in,
    tile_of,
    window,
    write,
)  # fmt: skip


@triton.jit
def _whole(
    plan, row, windows, key, begin, r, step, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Of whole tiles: where the windows begin, [R, 1], and pi or its inverse for each place, [R, TS]."""
    R: tl.constexpr = rows_of(TILE)
    tile, _, place = tile_of(row, begin, TILE)
    o = window(plan, row, windows, tile, r, PACKED, BIG) + r * TILE
    w0, w1, w2, w3 = draw(key, PERM, tile, r, step)
    j = (place + tl.arange(0, chunk_of(TILE) // R)[None, :]).to(tl.uint32)
    bits = tl.full([], LOG, tl.uint32)
    v = unpermuted(j, w0, w1, w2, w3, bits) if INVERSE else permuted(j, w0, w1, w2, w3, bits)
    return o, v.to(tl.int32)


@triton.jit
def _taken(x, v, R: tl.constexpr):
    """x[q, v[q, j]], through shared memory."""
    q = tl.arange(0, R)[:, None]
    N: tl.constexpr = R * v.shape[1]
    i = tl.reshape(q * v.shape[1] + v, [N])
    return tl.reshape(tl.gather(tl.reshape(x, [N]), i, 0), [R, v.shape[1]])


@triton.jit
def _stratum(
    plan, row, windows, key, begin, r, step, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Where the elements read in zx: o + v. Elements outside of every block read what nobody uses."""
    if FULL:
        o, v = _whole(plan, row, windows, key, begin, r, step, TILE, LOG, PACKED, BIG, False)
    else:
        v, _ = places(plan, row, windows, key, begin, r, step, TILE, LOG, PACKED, BIG)
        o = tl.zeros([v.shape[0], 1], tl.int32)
    return o, v


@triton.jit
def _fetched(zx, o, v, sign, R: tl.constexpr, SHARED: tl.constexpr):
    x = _taken(tl.load(zx + (o + tl.arange(0, v.shape[1])[None, :])), v, R) if SHARED else tl.load(zx + (o + v))
    return flip(x, sign)


@triton.jit
def _forward(
    plan, row, addresses, windows, zx, step, begin, batch, strata, extent, T: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, LOG: tl.constexpr, SIGNED: tl.constexpr, ONE: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = rows_of(TILE)
    SHARED: tl.constexpr = FULL and parts_of(TILE) == 1
    key = key_of(row)
    low, high = owned(row, begin, chunk_of(TILE))
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    factor = factor_of(row, C)
    i = tl.arange(0, R)[:, None] * (chunk_of(TILE) // R) + tl.arange(0, chunk_of(TILE) // R)[None, :]
    t0 = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, FULL)
    zero = tl.full([], 0, tl.int32)
    o, v = _stratum(plan, row, windows, key, begin, zero, step, TILE, LOG, PACKED, BIG, FULL)
    sign = signs_in(key, begin, zero, step, R, chunk_of(TILE), C, SIGNED)
    b = zero
    while b < batch:
        y = _fetched(zx, o, v, sign, R, SHARED)
        if not ONE:
            r = zero + 1
            while r < strata:
                o_r, v_r = _stratum(plan, row, windows, key, begin, r, step, TILE, LOG, PACKED, BIG, FULL)
                y += _fetched(zx, o_r, v_r, signs_in(key, begin, r, step, R, chunk_of(TILE), C, SIGNED), R, SHARED)
                r += 1
        write(addresses + 1, b * count + begin - first, i, low, high, t0 + factor * y, T, ALIGNED, FULL)
        zx += extent
        b += 1


@triton.jit(do_not_specialize=["at", "rows", "windows", "batch", "strata", "extent"])
def forward(
    plan, pointers, zx, step, at: tl.int64, rows: tl.int64, windows: tl.int64, batch: tl.int32, strata: tl.int32,
    extent: tl.int64, T: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, LOG: tl.constexpr, SIGNED: tl.constexpr,
    ONE: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr, ALIGNED: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """theta of one chunk."""
    member, chunk = entry_of(plan, at + tl.program_id(0))
    row = plan + rows + member * FIELDS
    begin = chunk * chunk_of(TILE)
    full = all_owned(row, begin, chunk_of(TILE))
    word = step_word(step, REDRAWN)
    addresses, turns = pointers + 2 * member, plan + windows + member * strata
    if full:
        _forward(
            plan, row, addresses, turns, zx, word, begin, batch, strata, extent, T, C, TILE, LOG, SIGNED, ONE, PACKED,
            BIG, ALIGNED, parts_of(TILE) == 1,
        )  # fmt: skip
    else:
        _forward(
            plan, row, addresses, turns, zx, word, begin, batch, strata, extent, T, C, TILE, LOG, SIGNED, ONE, PACKED,
            BIG, ALIGNED, False,
        )  # fmt: skip


@triton.jit
def _add(acc, x):
    tl.store(acc, tl.load(acc) + x)
    tl.debug_barrier()  # what is added next may be read by other threads


@triton.jit
def _backward(
    plan, row, addresses, windows, acc, step, begin, batch, strata, extent, T: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, LOG: tl.constexpr, SIGNED: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr,
    ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = rows_of(TILE)
    key = key_of(row)
    low, high = owned(row, begin, chunk_of(TILE))
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    factor = factor_of(row, C)
    i = tl.arange(0, R)[:, None] * (chunk_of(TILE) // R) + tl.arange(0, chunk_of(TILE) // R)[None, :]
    q = tl.arange(0, R)[:, None].to(tl.int64)
    r = tl.full([], 0, tl.int32)
    while r < strata:
        sign = signs_in(key, begin, r, step, R, chunk_of(TILE), C, SIGNED)
        if FULL:
            o, v = _whole(plan, row, windows, key, begin, r, step, TILE, LOG, PACKED, BIG, True)
        else:
            place, level = places(plan, row, windows, key, begin, r, step, TILE, LOG, PACKED, BIG)
        b = tl.full([], 0, tl.int32)
        while b < batch:
            to = acc + (q * batch + b) * extent
            x = read(addresses, row, b * count + begin - first, i, low, high, T, C, ALIGNED, FULL) * factor
            if FULL:
                x = _taken(flip(x, sign), v, R)
                _add(to + (o + tl.arange(0, chunk_of(TILE) // R)[None, :]), x)
            else:
                x = flip(x, sign)
                m = tl.full([], LOG, tl.int32)
                while m >= 0:  # block after block: two may read the same columns, one reads none twice
                    mine = (level == m) & (i >= low) & (i < high)
                    if any_of(mine.to(tl.int32)):
                        before = tl.load(to + place, mask=mine, other=0.0)
                        tl.store(to + place, before + x, mask=mine)
                        tl.debug_barrier()
                    m -= 1
            b += 1
        r += 1


@triton.jit(do_not_specialize=["at", "work", "rows", "windows", "each", "batch", "strata", "extent"])
def backward(
    plan, pointers, acc, step, at: tl.int64, work: tl.int64, rows: tl.int64, windows: tl.int64, each: tl.int64,
    batch: tl.int32, strata: tl.int32, extent: tl.int64, T: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    LOG: tl.constexpr, SIGNED: tl.constexpr, PACKED: tl.constexpr, BIG: tl.constexpr, ALIGNED: tl.constexpr,
    REDRAWN: tl.constexpr,
):  # fmt: skip
    """The sums of ``each`` chunks."""
    R: tl.constexpr = rows_of(TILE)
    program = tl.program_id(0).to(tl.int64)
    word = step_word(step, REDRAWN)
    acc += program * R * batch * extent
    n = program * each
    end = tl.minimum(n + each, work)
    while n < end:
        member, chunk = entry_of(plan, at + n)
        row = plan + rows + member * FIELDS
        begin = chunk * chunk_of(TILE)
        full = all_owned(row, begin, chunk_of(TILE))
        addresses, turns = pointers + 2 * member, plan + windows + member * strata
        if full and parts_of(TILE) == 1:
            _backward(
                plan, row, addresses, turns, acc, word, begin, batch, strata, extent, T, C, TILE, LOG, SIGNED, PACKED,
                BIG, ALIGNED, parts_of(TILE) == 1,
            )  # fmt: skip
        else:
            _backward(
                plan, row, addresses, turns, acc, word, begin, batch, strata, extent, T, C, TILE, LOG, SIGNED, PACKED,
                BIG, ALIGNED, False,
            )  # fmt: skip
        n += 1
