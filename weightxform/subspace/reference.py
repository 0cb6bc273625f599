"""theta = theta0 + P z with a P that is never stored, in plain torch: the oracle of every kernel.

P is [D, d]; D counts the elements of all tensors of a plan in its order, d the coordinates. Entries come from a
counter-based generator (``philox.py``), addressed by the key of the tensor and the index i of the element in it, so
that they depend on nothing else. fl() is one rounding to dt (float64 for float64 tensors, else float32); nothing is
fused or reassociated, so that every backend gives the same bits of theta.

**Blocks.** A tensor of n elements is cut at multiples of ``tile``, and the rest into its binary digits, largest first.
A block (start s, L elements) reads the columns (o + v) mod d, v = 0..L-1, with o = (start_t + s) mod d where windows
are packed, and otherwise o = (o_t + s + (s div d) delta_t) mod d, o_t = (w0 d) >> 32, delta_t = (w1 d) >> 32 if
d > tile else 0, with w0, w1 the first words of SETUP. In a tile of r elements, j lies in the block whose length is the
highest bit of r xor j.

**Kinds**, with zc_k = fl(z_k c_k), sign(i) the bit of element i, factor_t = fl(factors[t]):

- ``one_hot``: v = pi(j), pi the block's permutation; y_i = fl(factor_t sign_in(i) zc[o + v]). ``one_hot_unsigned``
  leaves the sign out.
- ``sparse``: the sum over strata r of ``one_hot`` on the columns [r d div K, (r+1) d div K), in the order of r, then
  the factor.
- ``block_hadamard``: y = sign_out(i) fl(H_L (sign_in(i) zc[o + j]) fl(factor_t L^-1/2)), H_L unnormalized, stages
  h = 1, 2, 4, ... (x_j, x_j+h) <- (fl(x_j + x_j+h), fl(x_j - x_j+h)).
- ``rademacher``: y_i = fl(factor_t sum_j +-z_j), j ascending; factor_t has 1/sqrt(D).
- ``gaussian``: the same with centred binomials (31 coins) for signs; factor_t has 1/sqrt(31 D).
- ``fastfood_global_*``: u = H_n (B pad(z)), q_I = fl(G_I u[pi(I) mod n]), y = factor_t H_LL q, n and LL the next powers
  of two of d and D (Li et al. 2018; the first length-LL transform collapses to length n because pad(z) is zero beyond
  n). ``fastfood_stacked_*``: blocks of n, each with own B, pi, G (Le et al. 2013). G: signs or binomials.

theta_i = fl(theta0_i + y_i), half types rounded once more at the end. The backward is z_bar = P' g: the transposed
steps in reverse order, then z_bar_k = fl(c_k acc_k).

Columns of one_hot and block_hadamard are exactly orthonormal for c_k = N_k^-1/2, N_k the number of times that column k
is read, because every factor before the window map is orthogonal.

Sources: Li, Farkhoor, Liu, Yosinski, "Measuring the intrinsic dimension of objective landscapes", ICLR 2018; Le,
Sarlos, Smola, "Fastfood", ICML 2013; Li, Hastie, Church, "Very sparse random projections", KDD 2006.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import opmath
from . import philox as draw

TILED = ("one_hot", "one_hot_unsigned", "sparse", "block_hadamard")
ENTRYWISE = ("rademacher", "gaussian")
FASTFOOD = tuple(f"fastfood_{form}_{diagonal}" for form in ("global", "stacked") for diagonal in ("sign", "binomial"))
KINDS = (*TILED, *ENTRYWISE, *FASTFOOD)

_CHUNK = 1 << 19  # elements that the reference holds at once


class Run(NamedTuple):
    """Blocks of one length: their starts in the tensor, [blocks]."""

    starts: Tensor
    length: int


def runs(n: int, tile: int, first: int, count: int, device: torch.device | str = "cpu") -> Iterator[Run]:
    """The blocks of a tensor of ``n`` elements that touch the elements [first, first + count)."""
    full = n // tile
    begin, end = first // tile, min(full, -(-(first + count) // tile))
    step = max(1, _CHUNK // tile)
    for at in range(begin, end, step):
        yield Run(torch.arange(at, min(at + step, end), device=device) * tile, tile)
    start, rest = full * tile, n - full * tile
    while rest:
        length = 1 << (rest.bit_length() - 1)
        if start < first + count and start + length > first:
            yield Run(torch.tensor([start], device=device), length)
        start, rest = start + length, rest - length


def stratum(d: int, strata: int, r: int) -> tuple[int, int]:
    """The columns [low, high) of stratum ``r``."""
    return r * d // strata, (r + 1) * d // strata


def windows(starts: Tensor, key: draw.Key, g: int, width: int, tile: int, packed: bool, r: int = 0) -> Tensor:
    """The first column o of each block, in a stratum of ``width`` columns. Never redrawn."""
    if packed:
        return (g + starts) % width
    w0, w1, *_ = draw.philox(key, draw.SETUP, torch.zeros((), dtype=torch.int64), r).tolist()
    delta = (w1 * width) >> 32 if width > tile else 0
    return (((w0 * width) >> 32) + starts + starts // width * delta) % width


def hadamard(x: Tensor) -> Tensor:
    """H x over the last axis (a power of two), unnormalized, strides 1, 2, 4, ..."""
    n, h = x.shape[-1], 1
    while h < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
        h *= 2
    return x


def root(length: int, dtype: torch.dtype) -> float:
    """L^-1/2 for a power of two; its float32 value for float32."""
    m = length.bit_length() - 1
    odd = torch.tensor(2.0, dtype=torch.float64).rsqrt().to(dtype).item() if m & 1 else 1.0
    return odd * 2.0 ** -(m >> 1)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64).to(dtype).item()


def _block_factor(factor: float, length: int, dtype: torch.dtype) -> float:
    return _rounded(_rounded(factor, dtype) * root(length, dtype), dtype)


class Row(NamedTuple):
    """One row of the layout: a tensor of the plan."""

    numel: int
    start: int
    key: draw.Key

    @staticmethod
    def of(layout: Tensor, member: int) -> Row:
        numel, start, k0, k1 = layout[member].tolist()
        return Row(numel, start, (k0, k1))


class _Tiles:
    """The tiled kinds: columns and signs of each run of blocks."""

    def __init__(self, kind: str, d: int, tile: int, strata: int, packed: bool, step: Tensor | None) -> None:
        self.kind, self.d, self.tile, self.strata, self.packed, self.step = kind, d, tile, strata, packed, step

    def columns(self, row: Row, run: Run, r: int) -> Tensor:
        low, high = stratum(self.d, self.strata, r)
        o = windows(run.starts, row.key, row.start, high - low, self.tile, self.packed, r)
        if self.kind == "block_hadamard":
            v = torch.arange(run.length, device=o.device).expand(len(o), -1)
        else:
            v = draw.permutation(row.key, draw.PERM, run.starts, run.length, r, self.step)
        return low + (o[:, None] + v) % (high - low)

    def signs(self, row: Row, run: Run, stream: int, r: int = 0) -> Tensor:
        i = run.starts[:, None] + torch.arange(run.length, device=run.starts.device)
        if self.kind == "one_hot_unsigned":
            return torch.zeros_like(i, dtype=torch.bool)
        return draw.bits(row.key, stream, i, r, self.step)

    def forward(self, row: Row, run: Run, zc: Tensor, factor: float) -> Tensor:
        """y of the blocks, [..., blocks, length]."""
        y = self._read(row, run, zc, 0)
        for r in range(1, self.strata):
            y = y + self._read(row, run, zc, r)
        if self.kind == "block_hadamard":
            y = hadamard(y) * _block_factor(factor, run.length, zc.dtype)
            return draw.flip(y, self.signs(row, run, draw.SIGN_OUT))
        return y * _rounded(factor, zc.dtype)

    def _read(self, row: Row, run: Run, zc: Tensor, r: int) -> Tensor:
        return draw.flip(zc[..., self.columns(row, run, r)], self.signs(row, run, draw.SIGN_IN, r))

    def backward(self, row: Row, run: Run, g: Tensor, factor: float, acc: Tensor) -> None:
        """Add what the blocks' gradients [..., blocks, length] give to ``acc`` [..., d]."""
        if self.kind == "block_hadamard":
            g = g * _block_factor(factor, run.length, g.dtype)
            g = hadamard(draw.flip(g, self.signs(row, run, draw.SIGN_OUT)))
        else:
            g = g * _rounded(factor, g.dtype)
        for r in range(self.strata):
            x = draw.flip(g, self.signs(row, run, draw.SIGN_IN, r))
            acc.index_add_(-1, self.columns(row, run, r).flatten(), x.flatten(-2))


def _columns(kind: str, row: Row, first: int, n: int, d: int, like: Tensor, step: Tensor | None) -> Iterator[Tensor]:
    """The d columns of P without its factor, for ``n`` elements from ``first`` on."""
    per_draw = 128 if kind == "rademacher" else 4
    draws = torch.arange(first // per_draw, -(-(first + n) // per_draw), device=like.device)
    skip = first % per_draw
    at_once = max(1, _CHUNK // max(1, n))
    for j in range(0, d, at_once):
        columns = torch.arange(j, min(j + at_once, d), device=like.device)
        words = draw.philox(row.key, draw.ENTRY, draws, columns[:, None], step).flatten(1)
        if kind == "rademacher":
            minus = (words[..., None] >> torch.arange(32, device=like.device)) & 1
            values = 1 - 2 * minus.flatten(1)
        else:
            values = draw.coins_of(words)
        yield from values[:, skip : skip + n].to(like.dtype)


class _Fastfood:
    """y of the whole concatenation, D elements, without its factor."""

    def __init__(self, kind: str, layout: Tensor, d: int, step: Tensor | None, device: torch.device) -> None:
        _, form, self.diagonal = kind.split("_")
        self.total, self.d, self.step = int(layout[:, 0].sum()), d, step
        self.n = 1 << (d - 1).bit_length()
        self.length = 1 << (self.total - 1).bit_length() if form == "global" else self.n
        self.key = Row.of(layout, 0).key
        starts = torch.arange(0, self.total, self.length, device=device)
        self.i = starts[:, None] + torch.arange(self.length, device=device)
        self.minus = draw.bits(self.key, draw.FF_B, self.i[:, : self.n], 0, step)
        self.index = draw.permutation(self.key, draw.FF_PERM, starts, self.length, 0, step) & (self.n - 1)

    def _diagonal(self, x: Tensor) -> Tensor:
        if self.diagonal == "sign":
            return draw.flip(x, draw.bits(self.key, draw.FF_G, self.i, 0, self.step))
        return draw.coins(self.key, draw.FF_G, self.i, 1, self.step).to(x.dtype) * x

    def forward(self, z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, self.n - self.d))[..., None, :]
        u = hadamard(draw.flip(padded, self.minus))
        index = self.index.expand(*u.shape[:-1], -1)
        return hadamard(self._diagonal(u.gather(-1, index))).flatten(-2)[..., : self.total]

    def backward(self, g: Tensor) -> Tensor:
        """[..., D] -> [..., d]."""
        padded = torch.nn.functional.pad(g, (0, self.i.numel() - self.total)).unflatten(-1, self.i.shape)
        r = self._diagonal(hadamard(padded))
        u = r.new_zeros((*r.shape[:-1], self.n)).scatter_add_(-1, self.index.expand(r.shape), r)
        return draw.flip(hadamard(u), self.minus).sum(-2)[..., : self.d]


def forward(
    z: Tensor,
    c: Tensor | None,
    theta0: Sequence[Tensor],
    members: Sequence[int],
    firsts: Sequence[int],
    layout: Tensor,
    factors: Tensor,
    step: Tensor | None,
    kind: str,
    tile: int,
    strata: int,
    packed: bool,
) -> list[Tensor]:
    """theta of each tensor in ``theta0``.

    Args:
        z: [d], or [K, d] for K of them at once; dt.
        c: [d], dt; ``None`` for ones.
        theta0: tensors, or of a sharded tensor the elements from ``firsts`` on; one dtype and device.
        members: the row of each in ``layout`` and ``factors``.
        firsts: the index of its first element in the whole tensor; 0 for a whole one.
        layout: int64 [tensors, 4] on the CPU, a row for each tensor of the plan: elements, first row of P, two words
            of the key.
        factors: float64 [tensors] on the CPU.
        step: of a P that is redrawn, int64 scalar; ``None`` for 0.
        kind: one of ``KINDS``.
        tile, strata, packed: of the tiled kinds.

    Returns:
        Tensors of the shapes, dtypes and strides of ``theta0``; for [K, d], contiguous ones with K in front.
    """
    zc = z if c is None else z * c
    d = z.shape[-1]
    tiles = _Tiles(kind, d, tile, strata, packed, step)
    whole = _Fastfood(kind, layout, d, step, z.device).forward(z) if kind in FASTFOOD else None
    outs = []
    for t0, member, first in zip(theta0, members, firsts, strict=True):
        row, factor = Row.of(layout, member), float(factors[member])
        n, batch = t0.numel(), tuple(z.shape[:-1])
        y = z.new_empty((*batch, n))
        if kind in TILED:
            for run in runs(row.numel, tile, first, n, z.device):
                value = tiles.forward(row, run, zc, factor).flatten(-2)
                begin = int(run.starts[0])
                low, high = max(begin, first), min(begin + len(run.starts) * run.length, first + n)
                y[..., low - first : high - first] = value[..., low - begin : high - begin]
        elif kind in ENTRYWISE:
            y.zero_()
            for j, entries in enumerate(_columns(kind, row, first, n, d, z, step)):
                y += entries * z[..., j, None]
            y *= _rounded(factor, z.dtype)
        else:
            assert whole is not None
            y = whole[..., row.start + first : row.start + first + n] * _rounded(factor, z.dtype)
        theta = (t0.reshape(-1).to(z.dtype) + y).to(t0.dtype).reshape((*batch, *t0.shape))
        outs.append(theta.contiguous() if batch else torch.empty_like(t0).copy_(theta))
    return outs


def backward(
    grads: Sequence[Tensor],
    c: Tensor | None,
    members: Sequence[int],
    firsts: Sequence[int],
    layout: Tensor,
    factors: Tensor,
    step: Tensor | None,
    kind: str,
    dim: int,
    batch: int,
    tile: int,
    strata: int,
    packed: bool,
) -> Tensor:
    """z_bar = P' g, for the gradients of the outputs of :func:`forward`; a tensor that is left out counts as zero.

    Args:
        dim: d.
        batch: 0 for gradients without a batch axis, else their K.

    Returns:
        [d] or [K, d], dt. Sums are in dt, over blocks in their order.
    """
    dt = opmath(grads[0].dtype)
    lead = (batch,) if batch else ()
    acc = torch.zeros((*lead, dim), dtype=dt, device=grads[0].device)
    tiles = _Tiles(kind, dim, tile, strata, packed, step)
    whole = None
    if kind in FASTFOOD:
        whole = torch.zeros((*lead, int(layout[:, 0].sum())), dtype=dt, device=grads[0].device)
    for grad, member, first in zip(grads, members, firsts, strict=True):
        row, factor = Row.of(layout, member), float(factors[member])
        g = grad.reshape(*lead, -1).to(dt)
        n = g.shape[-1]
        if kind in TILED:
            for run in runs(row.numel, tile, first, n, g.device):
                begin = int(run.starts[0])
                size = len(run.starts) * run.length
                low, high = max(begin, first), min(begin + size, first + n)
                part = g[..., low - first : high - first]
                if high - low < size:  # what another rank owns counts as zero
                    part = torch.nn.functional.pad(part, (low - begin, begin + size - high))
                tiles.backward(row, run, part.reshape(*lead, len(run.starts), run.length), factor, acc)
        elif kind in ENTRYWISE:
            scaled = g * _rounded(factor, dt)
            for j, entries in enumerate(_columns(kind, row, first, n, dim, acc, step)):
                acc[..., j] += (scaled * entries).sum(-1)
        else:
            assert whole is not None
            whole[..., row.start + first : row.start + first + n] = g * _rounded(factor, dt)
    if whole is not None:
        acc = _Fastfood(kind, layout, dim, step, whole.device).backward(whole)
    return acc if c is None else acc * c


def dense_forward(z: Tensor, basis: Tensor, theta0: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """theta = theta0 + E z with a stored E.

    Args:
        z: [d] or [K, d]; float64 for float64 tensors, else float32.
        basis: E, [D, d], contiguous, any float dtype; its entries are widened to the dtype of z.
        theta0: as in :func:`forward`.
        rows: the row of E where each tensor begins.
    """
    outs = []
    for t0, row in zip(theta0, rows, strict=True):
        part = basis[row : row + t0.numel()].to(z.dtype)
        theta = (t0.reshape(-1).to(z.dtype) + z @ part.T).to(t0.dtype).reshape((*z.shape[:-1], *t0.shape))
        outs.append(theta.contiguous() if z.ndim > 1 else torch.empty_like(t0).copy_(theta))
    return outs


def dense_backward(grads: Sequence[Tensor], basis: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    """z_bar = E' g, [d] or [K, d]; sums over tensors in float64."""
    dt = opmath(grads[0].dtype)
    lead = (batch,) if batch else ()
    acc = torch.zeros((*lead, basis.shape[1]), dtype=torch.float64, device=grads[0].device)
    for grad, row in zip(grads, rows, strict=True):
        g = grad.reshape(*lead, -1).to(dt)
        acc += g @ basis[row : row + g.shape[-1]].to(dt)
    return acc.to(dt)


def tile_scale(kind: str, total: int, dim: int) -> float:
    """The factor that the entries of a kind without column counts get: 1/sqrt(D), ...; 1 for the tiled kinds."""
    if kind == "rademacher":
        return 1 / math.sqrt(total)
    if kind == "gaussian":
        return 1 / math.sqrt(31 * total)
    if kind in FASTFOOD:
        _, form, diagonal = kind.split("_")
        size = total if form == "global" else dim
        return 1 / math.sqrt(total * (1 << (size - 1).bit_length()) * (1 if diagonal == "sign" else 31))
    return 1.0
