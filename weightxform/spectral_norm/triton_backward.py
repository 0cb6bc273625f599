"""Triton kernels of spectral normalization over a list of weights: the backward. ``triton_kernels.py`` has the tables.

``inner`` writes each program's share of <dout, W>; ``update`` adds the shares and writes the gradients. A tile of
``update`` is a block of lines (rows of all slabs, one under another) and of their b numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import address, narrow
from .triton_kernels import (
    COLUMN_BLOCKS,
    DOUT,
    DSUM_AT,
    DWEIGHT,
    FIELDS,
    HEADER,
    INNER_AT,
    INNER_PERIOD,
    INNER_TURNS,
    KIND,
    LINES,
    MAX_PARTS,
    NUMEL,
    OUTER_AT,
    PARTS,
    POINTERS,
    SIGMA_AT,
    TILES,
    WEIGHT,
    B,
    M,
    _gain,
    _int,
    _logical,
    _member,
    _scale,
    _total,
)  # fmt: skip


@triton.jit
def _sum(x, SIZE: tl.constexpr):
    """Sixteen at a time in the compute dtype, the rest in float64."""
    return tl.sum(tl.sum(tl.reshape(x, [SIZE // 16, 16]), axis=1).to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["at"])
def inner(
    plan, pointers, sums, at: tl.int64, T: tl.constexpr, G: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Each program's share of <dout, W>."""
    member, block = _member(plan, at)
    seg = plan + HEADER + member * FIELDS
    row = pointers + member * POINTERS
    tiles = _int(seg + TILES)
    first = block.to(tl.int64) * tiles * TILE
    g = address(row + DOUT, first, G, ALIGNED)
    w = address(row + WEIGHT, first, T, ALIGNED)
    left = tl.minimum(tl.load(seg + NUMEL) - first, tiles.to(tl.int64) * TILE)
    k = tl.arange(0, TILE)
    total = tl.full([], 0.0, tl.float64)
    while left >= TILE:
        total += _sum(tl.load(g + k).to(C) * tl.load(w + k).to(C), TILE)
        g += TILE
        w += TILE
        left -= TILE
    if left > 0:
        inside = k < left
        total += _sum(tl.load(g + k, mask=inside, other=0.0).to(C) * tl.load(w + k, mask=inside, other=0.0).to(C), TILE)
    tl.store(sums + tl.load(seg + DSUM_AT) + block, total)


@triton.jit
def _update(
    seg, row, state, block, p, q, T: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BL: tl.constexpr,
    BB: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    m, b, lines, across = _int(seg + M), _int(seg + B), _int(seg + LINES), _int(seg + COLUMN_BLOCKS)
    first = block // across * BL
    g = address(row + DOUT, first.to(tl.int64) * b, G, ALIGNED)
    dw = address(row + DWEIGHT, first.to(tl.int64) * b, T, ALIGNED)
    if ALIGNED:
        b = tl.multiple_of(tl.load(seg + B).to(tl.int32), 16)
    k = tl.arange(0, BL)
    line = first + k
    j = block % across * BB + tl.arange(0, BB)
    slab = line // m
    y = tl.load(state + tl.load(seg + OUTER_AT) + (line - slab * m), mask=line < lines, other=0.0)
    period, turns = _int(seg + INNER_PERIOD), _int(seg + INNER_TURNS)
    inside = (line < lines)[:, None] & (j < b)[None, :]
    x_from = state + tl.load(seg + INNER_AT)
    if ALIGNED:  # one slab
        x = tl.load(x_from + _logical(j, period, turns), mask=j < b, other=0.0)[None, :]
    else:
        x = tl.load(x_from + _logical(slab[:, None] * b + j[None, :], period, turns), mask=inside, other=0.0)
    at = k[:, None] * b + j[None, :]
    dout = tl.load(g + at, mask=inside, other=0.0).to(C)
    tl.store(dw + at, narrow(p * dout + (q * y)[:, None] * x, T), mask=inside)


@triton.jit(do_not_specialize=["at"])
def update(
    plan, pointers, sums, state, dgains, at: tl.int64, T: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dW = gain (s dout + s' <dout, W> u v'), dgain = s <dout, W>."""
    member, block = _member(plan, at)
    seg = plan + HEADER + member * FIELDS
    row = pointers + member * POINTERS
    radial = _total(sums + tl.load(seg + DSUM_AT), tl.load(seg + PARTS), MAX_PARTS)
    s, ds = _scale(plan, tl.load(state + tl.load(seg + SIGMA_AT)).to(tl.float64))
    gain = _gain(row, C)
    if block == 0:
        tl.store(dgains + member, (s * radial).to(C))
    p = (gain * s).to(C)
    q = (gain * ds * radial).to(C)
    kind = tl.load(seg + KIND)
    for k in tl.static_range(14):
        if (KINDS >> k) & 1:  # noqa: SIM102  known to the compiler, the next is not
            if kind == k:
                BB: tl.constexpr = 16 << (k // 2)
                _update(seg, row, state, block, p, q, T, G, C, TILE // BB, BB, k % 2 == 1)
