"""Before and after the kernels of projections, in Triton: the columns' table, and the last sums of the backward.

``zx``, and a program's partial sums, have a stratum of w columns as w + TILE numbers: column k again at k + w, k + 2w,
..., so that a window is never broken. Partial sums are added in float64, in an order that depends on nothing but
their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import COLUMNS
from .triton_tiles import LOWS


@triton.jit(do_not_specialize=["dim", "extent"])
def extend(plan, z, c, zx, dim: tl.int64, extent: tl.int64, TILE: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr):
    """zx of one stratum: fl(z c), and TILE of them again."""
    r, b = tl.program_id(1), tl.program_id(2)
    low = tl.load(plan + LOWS + r).to(tl.int32)
    w = tl.load(plan + LOWS + r + 1).to(tl.int32) - low
    k = tl.program_id(0) * N + tl.arange(0, N)
    inside = k < w + TILE
    x = tl.load(z + b * dim + low + k % w, mask=inside, other=0.0)
    if SCALED:
        x *= tl.load(c + low + k % w, mask=inside, other=0.0)
    tl.store(zx + b * extent + low + r * TILE + k, x, mask=inside)


@triton.jit(do_not_specialize=["slices", "batch", "extent", "dim"])
def finish(
    plan, sums, c, out, slices: tl.int32, batch: tl.int32, extent: tl.int64, dim: tl.int64, TILE: tl.constexpr,
    SCALED: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """z_bar of COLUMNS columns of one stratum: ``sums`` [slices, batch, extent] and their copies."""
    r, b = tl.program_id(1), tl.program_id(2)
    low = tl.load(plan + LOWS + r).to(tl.int32)
    w = tl.load(plan + LOWS + r + 1).to(tl.int32) - low
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.arange(0, S)
    total = tl.zeros([S, COLUMNS], tl.float64)
    at = k
    while tl.min(at, axis=0) < w + TILE:
        inside = (s < slices)[:, None] & ((k < w) & (at < w + TILE))[None, :]
        from_ = (s * batch + b).to(tl.int64)[:, None] * extent + (low + r * TILE + at)[None, :]
        total += tl.load(sums + from_, mask=inside, other=0.0)
        at += w
    x = tl.sum(total, axis=0).to(C)
    if SCALED:
        x *= tl.load(c + low + k, mask=k < w, other=0.0)
    tl.store(out + b * dim + low + k, x, mask=k < w)
