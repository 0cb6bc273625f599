"""Layers whose weight is divided by its spectral norm without the quotient ever being written: *folded* layers.

``SpectralLinear(64, 10)`` is ``nn.Linear(64, 10)`` with ``weight = wx.ComputedParameter(weight, wx.SpectralNorm())``:
the same outputs, gradients, state and ``state_dict``. But 1/sigma goes to the activations, and the gradient of sigma is
one more row of a product that is made anyway; ``spectral_norm/folded.py`` has the maths. Training keeps one tensor less
of the size of the weight, and touches the weight once more than a plain layer does, where power iteration reads it.

Whoever reads ``layer.weight`` gets the normalized weight, computed for this reader; it is not part of the graph of the
outputs (``autograd.grad(loss, layer.weight)`` says so). A layer reads it itself, and so runs as an unfolded one, where

- the weight is smaller than ``SMALLEST`` bytes, on a CPU: folding takes more Python (60 us a layer were measured) than
  the passes over such a weight take;
- its input and output together have more elements than the weight, so that scaling them costs more (but for matrix
  products in float32 and float64 on the CPU, which scale at no cost, and under ``torch.compile``, which fuses it);
- it runs in float16, whose range is too narrow for products with the raw weight;
- torch.func, forward-mode AD or ``torch.export`` are at work, or the input is no plain tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._torch import functorch_active, ordinary
from .computed import ComputedParameter
from .spectral_norm import SpectralNorm, folded
from .swap import base_of, child_name, slots_of, swapped

__all__ = ["SpectralConv1d", "SpectralConv2d", "SpectralConv3d", "SpectralLinear"]

SMALLEST = 4 << 20  # bytes; at 1024 x 1024 float32 both forms took about the same, above the folded one less
_CHILD = child_name("weight")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _constructor(plain: Any) -> Any:
    """``__init__`` with the arguments of the torch class, and keyword-only those of :class:`SpectralNorm`."""

    def __init__(
        self: Any,
        *args: Any,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        order: Literal["u_first", "v_first"] = "u_first",
        bound: float | None = None,
        gain: float = 1.0,
        learn_gain: bool = False,
        **kwargs: Any,
    ) -> None:
        transform = SpectralNorm(n_power_iterations, eps, None, order, bound, gain, learn_gain)  # its errors come first
        plain.__init__(self, *args, **kwargs)
        self.weight = ComputedParameter(self.weight, transform)

    theirs = inspect.signature(plain.__init__).parameters.values()
    ours = [p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    __init__.__signature__ = inspect.Signature([*theirs, *ours])  # type: ignore[attr-defined]
    return __init__


class _Spectral:
    """What the folded layers share."""

    def forward(self, input: Tensor) -> Tensor:
        slot = slots_of(self).get("weight")  # type: ignore[arg-type]
        if slot is None or not foldable(self):  # type: ignore[arg-type]
            return super().forward(input)  # type: ignore[misc]
        raw = self._parameters["weight"]  # type: ignore[attr-defined]
        if raw is not None and raw.is_cpu and raw.nbytes < SMALLEST and not torch.compiler.is_compiling():
            slot.folds = False
            return super().forward(input)  # type: ignore[misc]
        dtype = _folding_dtype(self, input)
        output = None if dtype is None else self._fold(input, dtype)  # type: ignore[attr-defined]
        if output is not None:
            return output
        if not torch.compiler.is_compiling():
            slot.folds = False
        elif torch.compiler.is_exporting() or functorch_active():
            return self._unfolded(input)  # type: ignore[attr-defined]
        elif dtype is None:  # under torch.compile it is this that advances, and not a read of the weight
            slot.folded(self, "weight", _CHILD)  # type: ignore[arg-type]
        return super().forward(input)  # type: ignore[misc]


def foldable(layer: nn.Module) -> bool:
    """Whether its weight comes from a SpectralNorm alone, and of its matrix."""
    transform = layer._modules.get(_CHILD)
    return isinstance(transform, SpectralNorm) and transform.foldable


def _folding_dtype(layer: Any, x: Tensor) -> torch.dtype | None:
    """In which dtype the layer can run folded on x; ``None``: it cannot."""
    raw = layer._parameters.get("weight")
    if raw is None or type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point():
        return None
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or functorch_active():
            return None
    elif not ordinary() or x.layout != torch.strided or x.is_nested:
        return None
    transform = layer._modules[_CHILD]
    dtype = transform._out_dtype(raw) or raw.dtype
    fits = x.dtype == dtype or (dtype != raw.dtype and x.dtype in (torch.float32, torch.bfloat16, torch.float16))
    bias = layer._parameters.get("bias")
    fits = fits and (bias is None or bias.dtype == raw.dtype)
    return dtype if fits and dtype in _DTYPES and raw.numel() and x.device == raw.device else None


def _weight(layer: Any) -> Tensor:
    """The computed weight as part of a graph."""
    transform = layer._modules[_CHILD]
    return transform.compute(layer._parameters["weight"], transform.training)


def _worth(x: Tensor, outputs: int, raw: Tensor) -> bool:
    """Whether passes over x and as many outputs cost less than the passes over the weight that they replace."""
    return x.numel() + outputs <= raw.numel()


def _apply(layer: Any, x: Tensor, dtype: torch.dtype, by_numbers: bool, conv: tuple | None) -> Tensor | None:
    """The folded output for x [b, in] or a batch of images; ``None`` where the layer has to run unfolded."""
    state = slots_of(layer)["weight"].folded(layer, "weight", _CHILD)
    if state is None:
        return None
    raw, bias, transform = layer._parameters["weight"], layer.bias, layer._modules[_CHILD]
    fixed = transform.fixed_gain if transform.gain is None else 1.0
    plan = folded.Plan(transform._axis(raw), transform.bound, fixed, conv)
    numbers = None
    if by_numbers:
        numbers = folded.numbers(state, transform.gain, plan)
        if numbers is None:
            return None
    if dtype != raw.dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return folded.apply(x, raw, bias, transform.gain, state, plan, numbers)


class SpectralLinear(_Spectral, nn.Linear):
    """``nn.Linear`` with its weight divided by its spectral norm, folded: see :mod:`weightxform.nn`.

    Args:
        *args, **kwargs: those of ``nn.Linear``.
        n_power_iterations, eps, order, bound, gain, learn_gain: keyword-only, as in :class:`weightxform.SpectralNorm`,
            which is the submodule ``weight_transform`` and raises for them.
    """

    __wx_plain__ = nn.Linear
    __init__ = _constructor(nn.Linear)

    def _unfolded(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, _weight(self), self.bias)

    def _fold(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        raw = self._parameters["weight"]
        assert raw is not None
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            return None
        rows, compiling = x.numel() // self.in_features, torch.compiler.is_compiling()
        by_numbers = x.is_cpu and dtype != torch.bfloat16 and not compiling
        if not (by_numbers or compiling or _worth(x, rows * self.out_features, raw)):
            return None
        matrix = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        y = _apply(self, matrix, dtype, by_numbers, None)
        return y if y is None or x.ndim == 2 else y.reshape(*x.shape[:-1], self.out_features)


class _SpectralConv(_Spectral):
    def _unfolded(self: Any, x: Tensor) -> Tensor:
        return self._conv_forward(x, _weight(self), self.bias)

    def _fold(self: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        raw = self._parameters["weight"]
        axes = raw.ndim - 2
        if x.ndim not in (axes + 1, axes + 2) or x.shape[x.ndim - axes - 1] != self.in_channels:
            return None
        batched = x.ndim == axes + 2
        twice = self._reversed_padding_repeated_twice  # (before, after) of each axis, the last axis first
        if not torch.compiler.is_compiling() and not _worth(x, self._outputs(x, twice, batched), raw):
            return None
        batch = x if batched else x.unsqueeze(0)
        padding = tuple(reversed(twice[::2]))
        if self.padding_mode != "zeros" or twice[::2] != twice[1::2]:
            padding = (0,) * axes
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batch = nn.functional.pad(batch, twice, mode=mode)
        y = _apply(self, batch, dtype, False, (self.stride, padding, self.dilation, self.groups))
        return y if y is None or batched else y.squeeze(0)

    def _outputs(self: Any, x: Tensor, twice: Sequence[int], batched: bool) -> int:
        """How many elements the output has."""
        count, axes = self.out_channels * (x.shape[0] if batched else 1), len(self.kernel_size)
        for i, n in enumerate(x.shape[-axes:]):
            padded = n + twice[-2 * i - 1] + twice[-2 * i - 2]
            reach = self.dilation[i] * (self.kernel_size[i] - 1)
            count *= max((padded - reach - 1) // self.stride[i] + 1, 0)
        return count


def _like(plain: type) -> str:
    return (SpectralLinear.__doc__ or "").replace("nn.Linear", f"nn.{plain.__name__}")


class SpectralConv1d(_SpectralConv, nn.Conv1d):
    __doc__ = _like(nn.Conv1d)
    __wx_plain__ = nn.Conv1d
    __init__ = _constructor(nn.Conv1d)


class SpectralConv2d(_SpectralConv, nn.Conv2d):
    __doc__ = _like(nn.Conv2d)
    __wx_plain__ = nn.Conv2d
    __init__ = _constructor(nn.Conv2d)


class SpectralConv3d(_SpectralConv, nn.Conv3d):
    __doc__ = _like(nn.Conv3d)
    __wx_plain__ = nn.Conv3d
    __init__ = _constructor(nn.Conv3d)


_FOLDED: dict[type, type] = {
    cls.__wx_plain__: cls for cls in (SpectralLinear, SpectralConv1d, SpectralConv2d, SpectralConv3d)
}


def fold_layer(module: nn.Module) -> bool:
    """Make a layer that has its weight from a SpectralNorm a folded one, in place; whether it is one now.

    Only ``nn.Linear`` and ``nn.Conv1d/2d/3d`` themselves: a subclass may do anything with its weight. ``wx.bake`` gives
    the plain layer back.
    """
    cls = type(module)
    if "weight" not in slots_of(module) or not foldable(module):
        return False
    if isinstance(module, _Spectral):
        return True
    base = _FOLDED.get(base_of(cls))
    if base is None or "__wx_base__" not in vars(cls) or "forward" in module.__dict__:
        return False
    module.__class__ = swapped(base, tuple(sorted(slots_of(module))))
    return True
