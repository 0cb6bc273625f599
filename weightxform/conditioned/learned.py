"""Warps whose matrices are learned."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._torch import outside_autocast
from ..checks import require_int
from ..numerics import opmath
from .features import Features
from .transform import Conditions, Needs, Warp, warped
from .warps import Rotate

_SAMPLES = 720  # of the circle, to which a map is fitted


class _Network(Warp):
    """``A(c) = L phi(c) + MLP(phi(c))`` with phi = [1, :class:`Features`]; the MLP's output is zero at first."""

    L: nn.Parameter | None

    def __init__(self, condition: str | None, size: int | None, harmonics: int | None, hidden: int) -> None:
        super().__init__()
        owner = type(self).__name__
        self.features = Features.checked(owner, condition, size, harmonics)
        require_int(owner, "hidden", hidden, 0)
        self.hidden = hidden
        for name in ("L", "w1", "b1", "w2"):
            self.register_parameter(name, None)

    def extra_repr(self) -> str:
        f = self.features
        return f"condition={f.condition!r}, size={f.size}, harmonics={f.harmonics}, hidden={self.hidden}"

    def needs(self) -> Needs:
        return {self.features.condition: self.features.shape}

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        options: Any = {"dtype": opmath(weight.dtype), "device": weight.device}
        n, entries = self.features.width, self.seen().taps ** 2
        self.L = nn.Parameter(torch.zeros(1 + n, entries, **options))
        if self.hidden:
            bound = n**-0.5  # as nn.Linear
            self.w1 = nn.Parameter(torch.empty(self.hidden, n, **options).uniform_(-bound, bound))
            self.b1 = nn.Parameter(torch.empty(self.hidden, **options).uniform_(-bound, bound))
            self.w2 = nn.Parameter(torch.zeros(entries, self.hidden, **options))

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        taps = self.seen().taps
        f = self.features.of(conditions, like)
        assert self.L is not None
        of_one, of_features = self.L.to(f.dtype).split([1, f.shape[1]])
        out = torch.addmm(of_one, f, of_features)
        if self.hidden:
            h = torch.addmm(self.b1.to(f.dtype), f, self.w1.to(f.dtype).T)
            out = torch.addmm(out, h * torch.sigmoid(h), self.w2.to(f.dtype).T)
        return out.reshape(-1, taps, taps)


class LearnedResidual(_Network):
    """A learned change of a warp, zero at first: ``wx.Rotate() + wx.LearnedResidual()``.

    ``A(c) = L phi(c) + MLP(phi(c))``, [K, K] for the K taps of a filter, where phi has 1 and the features of the
    condition: for an angle cos(m c) and sin(m c), m = 1 ... ``harmonics``.

    Args:
        condition: the name of the condition; ``None``: whichever single one there is.
        size: how many numbers one condition has; ``None``: one, of shape ().
        harmonics: of an angle in radians; ``None``: the numbers as they are.
        hidden: units of the MLP (silu); 0: no MLP.

    Parameters (made when it is attached; float64 for a float64 weight, else float32): ``L`` [1 + n, K K] for n
    features, ``w1`` [hidden, n], ``b1`` [hidden], ``w2`` [K K, hidden]. L and w2 are zero at first.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    is_change: ClassVar[bool] = True

    def __init__(
        self, condition: str | None = None, size: int | None = None, harmonics: int | None = 1, hidden: int = 32
    ) -> None:
        super().__init__(condition, size, harmonics, hidden)


class Learned(_Network):
    """A learned warp: the map of each filter's K taps is a small network of the condition.

    ``A(c) = L phi(c) + MLP(phi(c))`` as for :class:`LearnedResidual`, but it is the whole map. It begins as the
    least-squares fit of ``init`` over the circle, which of a bilinear rotation of 3x3 taps leaves 57 % with one
    harmonic, 13 % with 4 and 5 % with 8 (of 5x5: 73 %, 37 %, 12 %).

    Args:
        condition, size, harmonics, hidden: as for :class:`LearnedResidual`.
        init: ``"rotate"``, ``"identity"``, or a warp of an angle with the same condition, whose map it begins with. A
            condition that is no angle (``harmonics=None``) needs ``"identity"``; for another beginning take
            ``wx.Scale() + wx.LearnedResidual("scale", harmonics=None)``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(
        self,
        condition: str | None = None,
        size: int | None = None,
        harmonics: int | None = 4,
        hidden: int = 32,
        init: str | Warp | None = None,
    ) -> None:
        super().__init__(condition, size, harmonics, hidden)
        if init is None:
            init = "rotate" if harmonics is not None else "identity"
        if not isinstance(init, Warp) and init not in ("rotate", "identity"):
            raise ValueError(f"Learned: init must be 'rotate', 'identity' or a warp, got {init!r}")
        if init != "identity" and harmonics is None:
            raise ValueError(f"Learned: init must be 'identity' where harmonics is None, got {init!r}")
        self.__dict__["init"] = init  # no child: its parameters are not this module's

    def _start(self) -> Warp | None:
        init = self.__dict__["init"]
        return None if init == "identity" else Rotate(condition="angle") if init == "rotate" else init

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        start = self._start()
        if start is not None:
            start.check(weight, module)
            if list(start.needs().values()) != [()]:
                raise ValueError(f"Learned: init must be a warp that needs one angle, got {start}")

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        assert self.L is not None
        with torch.no_grad():
            self.L.copy_(self._fit(weight, module))

    def _fit(self, weight: Tensor, module: nn.Module | None) -> Tensor:
        """L [1 + n, K K]."""
        assert self.L is not None
        start, taps = self._start(), self.seen().taps
        if start is None:
            fit = torch.zeros_like(self.L)
            fit[0] = torch.eye(taps, dtype=fit.dtype, device=fit.device).flatten()
            return fit
        like = torch.empty(1, 1, *weight.shape[2:], dtype=torch.float64)  # on the CPU, wherever the weight is
        start = copy.deepcopy(start).to("cpu", torch.float64)
        start.attach(like, module)
        name = next(iter(start.needs())) or "angle"
        angles = torch.arange(_SAMPLES, dtype=torch.float64) * (2 * math.pi / _SAMPLES)
        f = self.features._replace(condition=None).of({name: angles}, like)
        phi = torch.cat([torch.ones_like(f[:, :1]), f], 1)
        units = torch.eye(taps, dtype=torch.float64).reshape(taps, 1, *weight.shape[2:])
        images = warped(units, start.matrix({name: angles}, like), start.seen(), None)  # the columns of A, of all axes
        a = images.reshape(-1, taps, taps).transpose(1, 2).flatten(1)
        return torch.linalg.lstsq(phi, a).solution.to(self.L.dtype)
