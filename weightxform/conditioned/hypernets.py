"""Networks that give weights: of each filter and a condition, low-rank, or dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import outside_autocast
from ..checks import require_bool, require_choice, require_int
from ..filter_mlp import function as filter_mlp
from ..filter_mlp.reference import ACTIVATIONS
from ..numerics import opmath
from .features import Features, Net
from .respond import over_channels, respond, responds
from .transform import Conditions, FilterTransform, Kernel, Needs


class _OfFeatures(FilterTransform):
    """A transform by a network of the features of one condition."""

    def __init__(self, condition: str | None, size: int | None, harmonics: int | None) -> None:
        super().__init__()
        self.features = Features.checked(type(self).__name__, condition, size, harmonics)

    def extra_repr(self) -> str:
        f = self.features
        return f"condition={f.condition!r}, size={f.size}, harmonics={f.harmonics}"

    def needs(self) -> Needs:
        return {self.features.condition: self.features.shape}


def _options(weight: Tensor) -> Any:
    return {"dtype": opmath(weight.dtype), "device": weight.device}


class FilterMLP(_OfFeatures):
    """Maps every filter by one small network of its K taps and the condition: ``w + s f(w / s, c)``.

    ``f(w, c) = w2 act(w1 [w, phi(c)] + b1) + b2``. The hidden layer of O I H numbers for each condition is not stored.
    s, the root mean square of the weight when it is attached, lets the network see numbers of the size of 1, whatever
    the layer: else the taps (0.05 and less) hardly count beside the condition.

    Args:
        hidden: H, units.
        condition: the name of the condition; ``None``: whichever single one there is.
        size: how many numbers one condition has; ``None``: one, of shape ().
        harmonics: phi(c) of an angle in radians: cos(m c), sin(m c), m = 1 ... ``harmonics``; ``None``: the numbers.
        activation: ``"relu"``, ``"silu"``, ``"tanh"``.
        residual: add the filter itself; w2 and b2 are then zero at first, and it is a change. Else ``s f(w / s, c)``.
        normalize: ``False``: s = 1.

    Parameters (made when it is attached; float64 for a float64 weight, else float32): ``w1`` [H, K + n], ``b1`` [H],
    ``w2`` [K, H], ``b2`` [K]; buffer ``scale``, s.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(
        self,
        hidden: int = 64,
        condition: str | None = None,
        size: int | None = None,
        harmonics: int | None = 1,
        activation: str = "relu",
        residual: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__(condition, size, harmonics)
        require_int("FilterMLP", "hidden", hidden, 1)
        require_choice("FilterMLP", "activation", activation, ACTIVATIONS)
        require_bool("FilterMLP", "residual", residual)
        require_bool("FilterMLP", "normalize", normalize)
        self.hidden, self.activation_name, self.residual, self.normalize = hidden, activation, residual, normalize
        for name in ("w1", "b1", "w2", "b2"):
            self.register_parameter(name, None)
        self.register_buffer("scale", None)

    def extra_repr(self) -> str:
        own = f"hidden={self.hidden}, activation={self.activation_name!r}, residual={self.residual}"
        return f"{own}, normalize={self.normalize}, {super().extra_repr()}"

    @property
    def is_change(self) -> bool:  # type: ignore[override]
        return self.residual

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        Kernel.of("FilterMLP", weight, module)

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        options, taps = _options(weight), weight.shape[2:].numel()
        first = nn.Linear(taps + self.features.width, self.hidden, **options)
        second = nn.Linear(self.hidden, taps, **options)
        if self.residual:
            nn.init.zeros_(second.weight)
            nn.init.zeros_(second.bias)
        self.w1, self.b1, self.w2, self.b2 = first.weight, first.bias, second.weight, second.bias
        scale = torch.ones((), **options)
        if self.normalize:
            rms = weight.detach().to(scale.dtype).square().mean().sqrt()
            scale = torch.where(rms > 0, rms, scale)  # also for a weight with no numbers
        self.scale = scale

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        return self._mapped(weight, conditions, dtype, False)

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        return self._mapped(weight, conditions, dtype, self.residual)

    def _mapped(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None, residual: bool) -> Tensor:
        taps = self.fitting(weight).shape[2:].numel()
        f = self.features.of(conditions, weight)
        s, w1, b1, w2, b2 = (t.to(f.dtype) for t in (self.scale, self.w1, self.b1, self.w2, self.b2))
        of_taps, of_features = w1.split([taps, f.shape[1]], 1)
        v = torch.addmm(b1, f, of_features.T)
        flat = weight.reshape(-1, taps)
        out = filter_mlp.apply(flat, v, of_taps / s, w2 * s, b2 * s, self.activation_name, residual, dtype)
        return out.reshape(v.shape[0], *weight.shape)


class LowRank(_OfFeatures):
    """Adds a matrix of low rank whose directions the condition weighs: ``W + U diag(g(c)) V``.

    W is read as [O, I K]. On a batch with a condition for each sample no weight for each sample is needed:
    ``y + U (g(c) V x)`` with V as a convolution of r outputs and U as one of 1x1.

    Args:
        rank: r.
        condition, size, harmonics: as for :class:`FilterMLP`.
        hidden: units (silu) of g; 0: g is a linear map of the features.

    Parameters (made when it is attached; float64 for a float64 weight, else float32): ``U`` [O, r], zero at first,
    ``V`` [r, I K], and those of ``g``. A layer of any kind, also a Linear.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; when it is attached, for a rank
            above that of the weight.
    """

    is_change = True
    needs_kernel = False
    U: nn.Parameter
    V: nn.Parameter

    def __init__(
        self,
        rank: int,
        condition: str | None = None,
        size: int | None = None,
        harmonics: int | None = 1,
        hidden: int = 0,
    ) -> None:
        super().__init__(condition, size, harmonics)
        require_int("LowRank", "rank", rank, 1)
        require_int("LowRank", "hidden", hidden, 0)
        self.rank, self.hidden = rank, hidden
        self.register_parameter("U", None)
        self.register_parameter("V", None)
        self.register_module("g", None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, hidden={self.hidden}, {super().extra_repr()}"

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        _require_matrix("LowRank", weight)
        most = min(weight.shape[0], weight.shape[1:].numel())
        if self.rank > most:
            raise ValueError(f"LowRank: rank must be at most {most} for a weight {list(weight.shape)}, got {self.rank}")

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        options, columns = _options(weight), weight.shape[1:].numel()
        self.U = nn.Parameter(torch.zeros(weight.shape[0], self.rank, **options))
        bound = columns**-0.5  # as nn.Linear
        self.V = nn.Parameter(torch.empty(self.rank, columns, **options).uniform_(-bound, bound))
        self.g = Net(self.features.width, self.hidden, self.rank, options)

    def _scaled(self, weight: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """(U diag(g) [C, O, r], V [r, I K])."""
        g = self.g(self.features.of(conditions, self.fitting(weight)))
        return self.U.to(g.dtype) * g[:, None, :], self.V.to(g.dtype)

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        u, v = self._scaled(weight, conditions)
        return (u.flatten(0, 1) @ v).reshape(-1, *weight.shape).to(dtype or weight.dtype)

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        u, v = self._scaled(weight, conditions)
        flat = weight.to(u.dtype).reshape(1, *u.shape[1:2], -1).expand(u.shape[0], -1, -1)
        out = torch.baddbmm(flat, u, v.expand(u.shape[0], -1, -1))
        return out.reshape(-1, *weight.shape).to(dtype or weight.dtype)

    def has_activation(self, weight: Tensor, layer: nn.Module) -> bool:
        return responds(layer)

    def response(
        self, layer: nn.Module, x: Tensor, weight: Tensor, conditions: Conditions, index: Tensor | None
    ) -> Tensor:
        g = self.g(self.features.of(conditions, self.fitting(weight)))
        groups: Any = getattr(layer, "groups", 1)
        v = self.V.to(x.dtype).reshape(self.rank, *weight.shape[1:]).repeat(groups, *[1] * (weight.ndim - 1))
        y = respond(layer, x, v)  # [B, groups r, ...], or for a Linear [B, ..., r]
        each = g.repeat(1, groups) if index is None else g.repeat(1, groups)[index]
        if isinstance(layer, nn.Linear):
            each = each.reshape(each.shape[0], *[1] * (x.ndim - 2), -1)
            return F.linear(y * each.to(y.dtype), self.U.to(y.dtype))
        y = y * over_channels(layer, each.to(y.dtype))
        axes = y.ndim - 2
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        return conv(y, self.U.to(y.dtype).reshape(*self.U.shape, *[1] * axes), groups=groups)


def _require_matrix(owner: str, weight: Tensor) -> None:
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(f"{owner}: the weight must be [O, I, ...], not empty, got {list(weight.shape)}")


class AffineHypernet(_OfFeatures):
    """Adds to the weight an affine map of hidden units that the condition sets: ``W + h(c) H``.

    ``h(c)`` are ``hidden`` units (silu of a linear map of the features), H has a row of the weight's size for each:
    hidden |W| parameters, 37.7 million for 64 units and one layer of 256x256x3x3. :class:`LowRank` has fewer.

    Args:
        hidden: units.
        condition, size, harmonics: as for :class:`FilterMLP`.

    Parameters (made when it is attached; float64 for a float64 weight, else float32): ``H`` [hidden, numbers of W],
    zero at first, ``w1`` [hidden, n], ``b1`` [hidden]. A layer of any kind, also a Linear.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    is_change = True
    needs_kernel = False
    H: nn.Parameter

    def __init__(
        self, hidden: int = 8, condition: str | None = None, size: int | None = None, harmonics: int | None = 1
    ) -> None:
        super().__init__(condition, size, harmonics)
        require_int("AffineHypernet", "hidden", hidden, 1)
        self.hidden = hidden
        for name in ("w1", "b1", "H"):
            self.register_parameter(name, None)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, {super().extra_repr()}"

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        options = _options(weight)
        first = nn.Linear(self.features.width, self.hidden, **options)
        self.w1, self.b1 = first.weight, first.bias
        self.H = nn.Parameter(torch.zeros(self.hidden, weight.numel(), **options))

    def _units(self, weight: Tensor, conditions: Conditions) -> Tensor:
        f = self.features.of(conditions, self.fitting(weight))
        return F.silu(F.linear(f, self.w1.to(f.dtype), self.b1.to(f.dtype)))

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        h = self._units(weight, conditions)
        return (h @ self.H.to(h.dtype)).reshape(-1, *weight.shape).to(dtype or weight.dtype)

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        h = self._units(weight, conditions)
        out = torch.addmm(weight.to(h.dtype).reshape(1, -1), h, self.H.to(h.dtype))
        return out.reshape(-1, *weight.shape).to(dtype or weight.dtype)
