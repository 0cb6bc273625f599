"""Steerable: rotations that are smooth in the angle, on circular harmonics.

The harmonics are rings of radius r_j, with phi the angle of a tap and r its distance from the middle of the kernel:

    Psi[j, m](r, phi) = exp(-(r - r_j)^2 / (2 sigma_j^2)) (cos m phi, sin m phi)

Turning one by theta mixes its two parts by a rotation of m theta. With B [K, n] their values at the taps, Bc and Bs its
cosine and sine columns of frequency m, and B+ its pseudo-inverse (Bc+ and Bs+ the rows of these columns):

    A(theta) = sum over m of  cos(m theta) (Bc Bc+ + Bs Bs+)  +  sin(m theta) (Bc Bs+ - Bs Bc+)     +  residual

(Weiler, Hamprecht and Storath 2018, "Learning Steerable Filters for Rotation Equivariant CNNs"; rings, widths and
frequencies as e2cnn chooses them, Weiler and Cesa 2019.) A filter is in the span of B only in part: of 9 taps it has 6
dimensions, of 25 it has 11. The residual acts on the rest, (1 - B B+) w.

The taps of a kernel that is not square, or not dilated equally, hardly tell some of the harmonics from others, and B+
would blow these up: |A| = 39 for 3x7, 105 for 3x3 with dilation (1, 2). B+ is there without the singular values below
``CUTOFF`` of the largest, and what they stand for goes to the residual: |B R B+| <= 1 / CUTOFF for any turn R, and
measured |A| <= 2.9, and mostly below 2 (of squares 1.2 to 1.7, with no cutoff). Leaving out whole harmonics instead
turns smooth images worse: for 3x7 the relative error is 0.36, where this has 0.19.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import outside_autocast
from ..checks import require_choice, require_int
from ..numerics import opmath
from .transform import Conditions, Kernel
from .warps import Sampled

CUTOFF = 0.3


class Steerable(Sampled):
    """Turns every filter by an angle on circular harmonics: smooth in the angle, and exact on their span.

    Of a kernel that is not square, or not dilated equally, combinations of harmonics that lie mostly outside of its
    taps go to the residual, and the others turn as well as the taps tell. No filter becomes 3 times as long (measured
    for up to 8x8 taps, with dilations of up to 4; a square one, not 1.8 times).

    Args:
        angle, condition: as for :class:`Rotate`.
        residual: what happens to the part of a filter that the harmonics do not hold: ``"bilinear"``: it turns as
            :class:`Rotate` does it; ``"keep"``: it stays; ``"drop"``: it is lost, at angle 0 too.
        frequencies: the highest frequency; ``None``: as high as the taps allow.
        padding, axis: as for :class:`Rotate`; padding is that of the bilinear residual.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; as :class:`Rotate`.
    """

    constants: Tensor | None

    def __init__(
        self,
        angle: Tensor | float | None = None,
        condition: str = "angle",
        residual: str = "bilinear",
        frequencies: int | None = None,
        padding: str = "zeros",
        axis: int | None = None,
    ) -> None:
        super().__init__("angle", angle, condition, (), "bilinear", padding, axis)
        require_choice("Steerable", "residual", residual, ("bilinear", "keep", "drop"))
        if frequencies is not None:
            require_int("Steerable", "frequencies", frequencies, 0)
        self.residual, self.frequencies = residual, frequencies
        self.register_buffer("constants", None, persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual={self.residual!r}, frequencies={self.frequencies}"

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        self._make(weight.device, opmath(weight.dtype))

    def _make(self, device: torch.device, dtype: torch.dtype) -> None:
        """[1 + 2 M, K K], of 1, cos(theta), ..., sin(theta), ...; for a bilinear residual the last K rows are 1 - P."""
        assert self.kernel is not None
        a, b = (d - 2 for d in self.seen().axes)
        plane = Kernel((self.kernel.size[a], self.kernel.size[b]), (self.kernel.dilation[a], self.kernel.dilation[b]))
        self.constants = _constants(plane, self.frequencies, self.residual).to(device, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        if self.constants is not None and self.constants.device.type != "meta":
            self._make(self.constants.device, opmath(self.constants.dtype))  # not rounded to a half type
        return out

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        taps = self.seen().taps
        assert self.constants is not None
        theta = self.source.of(self, conditions, like)
        constants = self.constants.to(theta.dtype)
        steered = constants[: len(constants) - taps] if self.residual == "bilinear" else constants
        highest = len(steered) // 2 // taps
        steered = steered.reshape(-1, taps * taps)
        multiples = theta[:, None] * torch.arange(1, highest + 1, dtype=theta.dtype, device=theta.device)
        a = torch.addmm(steered[:1], torch.cat([multiples.cos(), multiples.sin()], 1), steered[1:])
        a = a.reshape(-1, taps, taps)
        if self.residual != "bilinear":
            return a
        axes = [d - 2 for d in self.seen().axes]
        return a + self.sampled(theta[:, None], "rotate", *axes) @ constants[-taps:]


def _constants(plane: Kernel, frequencies: int | None, residual: str) -> Tensor:
    """float64 [(1 + 2 M) K, K], and for a bilinear residual [(2 + 2 M) K, K]."""
    basis, orders = _basis(plane)
    if frequencies is not None:
        keep = [i for i, m in enumerate(orders) if m <= frequencies]
        basis, orders = basis[:, keep], [orders[i] for i in keep]
    even = len(set(plane.size)) == len(set(plane.dilation)) == 1
    inverse = torch.linalg.pinv(basis) if even else torch.linalg.pinv(basis, rtol=CUTOFF)
    rest = torch.eye(len(basis), dtype=basis.dtype) - basis @ inverse
    cosines, sines = [], []
    for m in range(1, max(orders) + 1):
        at = torch.tensor([i for i, order in enumerate(orders) if order == m], dtype=torch.int64)
        c, s = at[0::2], at[1::2]
        cosines.append(basis[:, c] @ inverse[c] + basis[:, s] @ inverse[s])
        sines.append(basis[:, c] @ inverse[s] - basis[:, s] @ inverse[c])
    at = torch.tensor([i for i, order in enumerate(orders) if order == 0], dtype=torch.int64)
    still = basis[:, at] @ inverse[at]
    if residual == "keep":
        still = still + rest
    return torch.cat([still, *cosines, *sines] + ([rest] if residual == "bilinear" else []))


def _basis(plane: Kernel) -> tuple[Tensor, list[int]]:
    """(B [K, n], the frequency of each column; of a frequency m > 0 the cosine and then the sine)."""
    (height, width), (dy, dx) = plane.size, plane.dilation
    unit = min(dy, dx)
    y = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None] * dy / unit
    x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2)[None, :] * dx / unit
    r, phi = torch.hypot(y, x).flatten(), torch.atan2(y + 0 * x, x + 0 * y).flatten()
    last = float(max(abs(x).max(), abs(y).max()))  # the outermost ring touches the farther edge
    columns, orders = [], []
    ring = last % 1
    while ring <= last:
        sigma = 0.005 if ring == 0 else 0.4 if ring == last else 0.6
        radial = torch.exp(-((r - ring) ** 2) / (2 * sigma**2))
        for m in range(_highest(ring, last) + 1):
            off = radial * (r > 0)  # the middle has no angle
            pair = [off * (m * phi).cos(), off * (m * phi).sin()] if m else [radial]
            norms = [float(torch.linalg.vector_norm(p)) for p in pair]
            if min(norms) > 1e-3:  # else these taps cannot tell the angle
                columns += [p / max(norms) for p in pair]  # one scale for both: they turn into each other
                orders += [m] * len(pair)
        ring += 1
    return torch.stack(columns, 1), orders


def _highest(ring: float, last: float) -> int:
    """The highest frequency of a ring that its taps hold without aliasing."""
    limit = math.floor(2 * ring)
    if ring == last:
        return min(limit, 2)
    return limit - (1 if ring and ring % 2 == 0 else 0)
