"""What the Triton kernels of the tiled kinds share: tables, windows, memory. The maths is in ``reference.py``.

A program holds CHUNK elements of one tensor: several tiles as rows of [R, TS], or a part of a larger tile. Where all of
them are here and their tiles are whole, it takes the path FULL: no masks, and one block a row. Everything else (tails,
the ends of shards) goes from block to block, m = log2 of the length: bit m of r, the elements in a tile, says whether
there is such a block, and the bits above where it begins.

Loops are ``while``: Triton 3.6 under its interpreter refuses ``range`` with a bound from memory, and a compiler that
moves loads from one turn to another would miss what the turn before has stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import address, narrow
from . import triton_plan
from .triton_random import PERM, SIGN_IN, draw, permuted, signs

FIELDS, CHUNK = tl.constexpr(triton_plan.FIELDS), tl.constexpr(triton_plan.CHUNK)
NUMEL, START, K0, K1, FIRST, COUNT, FACTOR, SPREAD = (tl.constexpr(i) for i in range(triton_plan.FIELDS))
ROOT, LOWS = tl.constexpr(0), tl.constexpr(1)


@triton.constexpr_function
def chunk_of(TILE):
    """The elements of a program, for the compiler; ``triton_plan.py`` has it for the host."""
    return min(4096, 8 * TILE)


@triton.constexpr_function
def rows_of(TILE):
    """The tiles in a chunk, at least 1."""
    return max(1, min(4096, 8 * TILE) // TILE)


@triton.constexpr_function
def parts_of(TILE):
    """The chunks in a tile, at least 1."""
    return max(1, TILE // 4096)


@triton.jit
def entry_of(plan, at):
    """Which tensor, and which block of it."""
    entry = tl.load(plan + at)
    return entry & 0xFFFFFFFF, entry >> 32


@triton.jit
def key_of(row):
    return tl.load(row + K0).to(tl.uint32), tl.load(row + K1).to(tl.uint32)


@triton.jit
def factor_of(row, C: tl.constexpr):
    return tl.load(row + FACTOR).to(tl.float64, bitcast=True).to(C)


@triton.jit
def owned(row, begin, N: tl.constexpr):
    """Where in the N elements from ``begin`` on those that are here begin and end."""
    first = tl.load(row + FIRST)
    end = first + tl.load(row + COUNT)
    low = tl.minimum(tl.maximum(first - begin, 0), N).to(tl.int32)
    high = tl.minimum(tl.maximum(end - begin, 0), N).to(tl.int32)
    return low, high


@triton.jit
def all_owned(row, begin, N: tl.constexpr):
    first = tl.load(row + FIRST)
    return (begin >= first) & (begin + N <= first + tl.load(row + COUNT))


@triton.jit
def read(field, row, offset, i, low, high, T: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """The elements ``offset + i`` of a tensor, those with low <= i < high; the same one for all where it is spread."""
    if tl.load(row + SPREAD) != 0:
        x = tl.broadcast_to(tl.load(address(field, 0, T, False)), i.shape)
        if not FULL:
            x = tl.where((i >= low) & (i < high), x, tl.zeros(i.shape, T))
    elif FULL:
        x = tl.load(address(field, offset, T, ALIGNED) + i)
    else:
        x = tl.load(address(field, offset, T, ALIGNED) + i, mask=(i >= low) & (i < high), other=0.0)
    return x.to(C)


@triton.jit
def write(field, offset, i, low, high, x, T: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(address(field, offset, T, ALIGNED) + i, narrow(x, T))
    else:
        tl.store(address(field, offset, T, ALIGNED) + i, narrow(x, T), mask=(i >= low) & (i < high))


@triton.jit
def window(plan, row, windows, s, r, PACKED: tl.constexpr, BIG: tl.constexpr):
    """Where in zx the window of the block at ``s`` begins, but for ``r`` extensions. BIG: 32 bits are too few."""
    U: tl.constexpr = tl.uint64 if BIG else tl.uint32
    low = tl.load(plan + LOWS + r)
    w = (tl.load(plan + LOWS + r + 1) - low).to(U)
    if PACKED:
        o = (tl.load(row + START) + s).to(U) % w
    else:
        word = tl.load(windows + r)
        o = ((word & 0xFFFFFFFF).to(U) + s.to(U) + s.to(U) // w * (word >> 32).to(U)) % w
    return low.to(tl.int32) + o.to(tl.int32)


@triton.jit
def tile_of(row, begin, TILE: tl.constexpr):
    """Of each row of a chunk: the start of its tile, the elements in the tile, and the place of the row in it."""
    if parts_of(TILE) > 1:
        tile = begin + tl.zeros([1, 1], tl.int64)
        place = (begin & (TILE - 1)).to(tl.int32) + tl.zeros([1, 1], tl.int32)
        tile -= place
    else:
        q = tl.arange(0, rows_of(TILE))[:, None]
        tile = begin + q * TILE
        place = q * 0
    rest = tl.minimum(tl.maximum(tl.load(row + NUMEL) - tile, 0), TILE).to(tl.int32)
    return tile, rest, place


@triton.jit
def block_of(rest, m):
    """Whether tiles of ``rest`` elements have a block of 2^m, and where in the tile it begins."""
    return (rest >> m) & 1, (rest >> (m + 1)) << (m + 1)


@triton.jit
def any_of(x):
    return tl.max(tl.max(x, axis=1), axis=0) != 0


@triton.jit
def signs_in(key, begin, r, step, R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, SIGNED: tl.constexpr):
    if SIGNED:
        s = signs(key, SIGN_IN, begin, r, step, N, C)
    else:
        s = tl.zeros([N], tl.uint64 if tl.float64 == C else tl.uint32)
    return tl.reshape(s, [R, N // R])


@triton.jit
def places(
    plan, row, windows, key, begin, r, step, TILE: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    BIG: tl.constexpr,
):  # fmt: skip
    """Where in zx each element of a chunk of one_hot reads, whatever its block; and log2 of its block, or -1."""
    R: tl.constexpr = rows_of(TILE)
    tile, rest, place = tile_of(row, begin, TILE)
    j = place + tl.arange(0, chunk_of(TILE) // R)[None, :]
    found = tl.zeros([R, chunk_of(TILE) // R], tl.int32)
    level = found - 1
    m = tl.full([], LOG, tl.int32)
    while m >= 0:
        there, at = block_of(rest, m)
        if any_of(there):
            inside = (there != 0) & (j >= at) & (j - at < (1 << m))
            o = window(plan, row, windows, tile + at, r, PACKED, BIG) + r * TILE
            w0, w1, w2, w3 = draw(key, PERM, tile + at, r, step)
            v = permuted((j - at).to(tl.uint32), w0, w1, w2, w3, m.to(tl.uint32))
            found = tl.where(inside, o + v.to(tl.int32), found)
            level = tl.where(inside, m, level)
        m -= 1
    return found, level
