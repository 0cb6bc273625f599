"""Experts: a weighted sum of several filter banks, and factors for taps and channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import outside_autocast
from ..checks import require_bool, require_int, require_number
from ..numerics import opmath
from ..transform import describe
from .features import Features, Net
from .respond import over_channels, respond, responds
from .transform import Conditions, FilterTransform, Needs, numbers

_FACTORS = ("expert", "spatial", "input", "output")
_WITHIN = ("spatial", "input")  # of a filter bank's rows


class Experts(FilterTransform):
    """A weight that the condition mixes of n: ``sum over e of r_e W_e``, times factors of its taps and channels.

    With the factors of ODConv, ``W'[o, i, p] = output[o] input[i] spatial[p] sum over e of expert[e] W_e[o, i, p]``.
    W_0 is the stored weight, the others begin as copies of it with noise, and are parameters.

    (Yang et al. 2019, "CondConv"; Li et al. 2022, "Omni-Dimensional Dynamic Convolution".) No [C, n, O, I, K] is made.

    Args:
        n: how many weights; 1 for factors alone.
        factors: of ``"expert"`` [n], ``"spatial"`` [K], ``"input"`` [I] and ``"output"`` [O], for a weight
            [O, I, *kernel] as it is stored: of a grouped layer I is that of a group; a ConvTranspose stores its input
            channels first, so that there ``"output"`` scales its inputs and ``"input"`` its outputs.
        condition: where the factors are given and there is one: the name of its condition; ``None``: whichever single
            one there is. Several factors are conditions of their own names. With a net: the name of its condition.
        size, harmonics, hidden: a net of one condition gives the factors: of ``size`` numbers, or the ``harmonics`` of
            an angle, with ``hidden`` units (silu) or 0. It begins with equal experts (a softmax) and all other
            factors 1 (twice a sigmoid).
        softmax: of an ``"expert"`` that is given.
        noise: of the copies, in root mean squares of the weight.

    Parameters (made when it is attached): ``experts`` [n - 1, O, I, *kernel], in the dtype of the weight, and those of
    ``net`` (float64 for a float64 weight, else float32).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    experts: nn.Parameter | None

    def __init__(
        self,
        n: int,
        factors: Sequence[str] = ("expert",),
        condition: str | None = None,
        size: int | None = None,
        harmonics: int | None = None,
        hidden: int = 0,
        softmax: bool = False,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        require_int("Experts", "n", n, 1)
        if isinstance(factors, str) or not factors or any(f not in _FACTORS for f in factors):
            raise ValueError(f"Experts: factors must be some of {', '.join(map(repr, _FACTORS))}, got {factors!r}")
        if n > 1 and "expert" not in factors:
            raise ValueError(f"Experts: factors must have 'expert' for n = {n}, got {factors!r}")
        require_int("Experts", "hidden", hidden, 0)
        require_bool("Experts", "softmax", softmax)
        require_number("Experts", "noise", noise)
        self.n, self.factors = n, tuple(f for f in _FACTORS if f in factors)
        self.features = Features.checked("Experts", condition, size, harmonics)
        self.has_net = size is not None or harmonics is not None
        if condition is not None and len(self.factors) > 1 and not self.has_net:
            raise ValueError(
                f"Experts: condition must be None where several factors are given (they are conditions called "
                f"{', '.join(map(repr, self.factors))}), got {condition!r}"
            )
        self.hidden, self.softmax, self.noise = hidden, softmax, noise
        self.register_parameter("experts", None)
        self.register_module("net", None)

    @property
    def needs_kernel(self) -> bool:  # type: ignore[override]
        return "spatial" in self.factors

    def extra_repr(self) -> str:
        f = self.features
        net = f", size={f.size}, harmonics={f.harmonics}, hidden={self.hidden}" if self.has_net else ""
        return f"n={self.n}, factors={self.factors}, condition={f.condition!r}{net}"

    def needs(self) -> Needs:
        if self.has_net:
            return {self.features.condition: self.features.shape}
        shapes: Any = {f: (self.n,) if f == "expert" else None for f in self.factors}
        return {self.features.condition: shapes[self.factors[0]]} if len(shapes) == 1 else shapes

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        if weight.ndim < 2 or (weight.ndim < 3 and "spatial" in self.factors):
            shape = "[O, I, *kernel]" if "spatial" in self.factors else "[O, I, ...]"
            raise ValueError(f"Experts: the weight must be {shape}, got {describe(weight)}")

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        with torch.no_grad():
            rms = weight.to(opmath(weight.dtype)).square().mean().sqrt()
            noise = torch.randn(self.n - 1, *weight.shape, dtype=rms.dtype, device=weight.device)
            copies = weight + noise * (self.noise * rms)
        self.experts = nn.Parameter(copies.to(weight.dtype)) if self.n > 1 else None
        if self.has_net:
            options = {"dtype": opmath(weight.dtype), "device": weight.device}
            self.net = Net(self.features.width, self.hidden, sum(self._sizes().values()), options, zero=True)

    def _sizes(self) -> dict[str, int]:
        assert self.shape is not None
        o, i, *kernel = self.shape
        sizes = {"expert": self.n, "spatial": torch.Size(kernel).numel(), "input": i, "output": o}
        return {f: sizes[f] for f in self.factors}

    def _values(self, weight: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """factor -> [C, size]."""
        self.fitting(weight)
        sizes = self._sizes()
        if self.has_net:
            outputs = self.net(self.features.of(conditions, weight)).split(list(sizes.values()), 1)
            found = dict(zip(sizes, outputs, strict=True))
            return {f: v.softmax(1) if f == "expert" else 2 * v.sigmoid() for f, v in found.items()}
        name = self.features.condition
        found = {
            f: numbers("Experts", conditions, f if len(sizes) > 1 else name, (n,), weight) for f, n in sizes.items()
        }
        if self.softmax and "expert" in found:
            found["expert"] = found["expert"].softmax(1)
        return found

    def _banks(self, weight: Tensor, dim: int) -> Tensor:
        """W_0 ... as [n, O, I K] for dim = 0, [O, n, I K] for dim = 1."""
        banks = [weight.flatten(1).unsqueeze(dim)]
        if self.experts is not None:
            banks.append(self.experts.to(weight.dtype).flatten(2).movedim(0, dim))
        return torch.cat(banks, dim) if len(banks) > 1 else banks[0]

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        values = self._values(weight, conditions)
        out = self._mixed(weight.to(opmath(weight.dtype)), values.get("expert"), values.get("output"))
        out = out.reshape(out.shape[0], weight.shape[0], weight.shape[1], -1)  # [C, O, I, K]
        within = [values[f][:, :, None] if f == "input" else values[f][:, None] for f in self.factors if f in _WITHIN]
        if within:  # multiplied first, so that the weights are gone over once
            out = out * (within[0] if len(within) == 1 else within[0] * within[1])[:, None]
        return out.reshape(-1, *weight.shape).to(dtype or weight.dtype)

    def _mixed(self, weight: Tensor, expert: Tensor | None, output: Tensor | None) -> Tensor:
        """[C, O, I K]; C is 1 where neither is there."""
        if output is None:
            banks = self._banks(weight, 0)
            return banks if expert is None else (expert @ banks.flatten(1)).reshape(-1, *banks.shape[1:])
        factors = output.T[:, :, None]  # [O, C, n]
        if expert is not None:
            factors = factors * expert
        return (factors @ self._banks(weight, 1)).transpose(0, 1)

    def has_activation(self, weight: Tensor, layer: nn.Module) -> bool:
        return "spatial" not in self.factors and responds(layer) and getattr(layer, "groups", 1) == 1

    def response(
        self, layer: nn.Module, x: Tensor, weight: Tensor, conditions: Conditions, index: Tensor | None
    ) -> Tensor:
        """The stored weights serve all samples: their n outputs are mixed."""
        values = {
            f: (v if index is None else v[index]).to(x.dtype) for f, v in self._values(weight, conditions).items()
        }
        linear = isinstance(layer, nn.Linear)
        channels = -1 if linear else 1

        def fit(v: Tensor) -> Tensor:  # [B, size] to the activations
            return v.reshape(v.shape[0], *[1] * (x.ndim - 2), -1) if linear else over_channels(layer, v)

        if "input" in values:
            each = values["input"]
            x = x * fit(each.repeat_interleave(weight.shape[2:].numel(), 1) if linear else each)
        banks = self._banks(weight.to(x.dtype), 0).reshape(-1, *weight.shape[1:])
        y = respond(layer, x, banks)
        if "expert" in values:
            parts = y.unflatten(channels, (self.n, weight.shape[0])).unbind(-2 if linear else 1)
            ys = [part * fit(values["expert"][:, e : e + 1]) for e, part in enumerate(parts)]
            y = sum(ys[1:], ys[0])
        return y * fit(values["output"]) if "output" in values else y
