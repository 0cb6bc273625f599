"""Which layers of a model follow the condition, and as what shape their weights are seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..filter_warp.module import AdaptiveRotatedConv2d
from ..swap import slots_of
from ..transform import require_float
from .condition import told
from .transform import FilterTransform, Warp, leaves
from .warps import Source

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_MADE_BY = {
    "weight_mask": "pruned; torch.nn.utils.prune.remove first",
    "weight_g": "made by torch.nn.utils.weight_norm; remove_weight_norm first",
    "weight_orig": "made by torch.nn.utils.spectral_norm; remove_spectral_norm first",
}


class Layer(NamedTuple):
    """A layer that follows. ``shape``: [channels, *kernel] as which a Linear's inputs are seen; else ``None``."""

    path: str
    module: Any
    shape: tuple[int, ...] | None

    @property
    def raw(self) -> nn.Parameter:
        return self.module._parameters["weight"]


def choose(
    owner: str,
    model: nn.Module,
    layers: Sequence[str] | None,
    flattened: Mapping[str, Sequence[int]] | None,
    found: Mapping[str, tuple[int, ...] | None],
    transform: nn.Module,
) -> list[Layer]:
    """The layers.

    Args:
        owner: for messages.
        model: to look into.
        layers: shell patterns for qualified names; ``None``: convolutions with more than one tap (unless all that
            ``transform`` does is warp taps: all convolutions), but not those of a router of
            :class:`AdaptiveRotatedConv2d`, and the Linear layers of ``found``.
        flattened: name of a Linear -> [channels, *kernel], by the user: these follow in any case.
        found: the same, by :func:`trace`; ``None`` as shape: one that reads a map in no known order, of which a
            ``UserWarning`` tells.
        transform: which may need a kernel; else a Linear may be named that has none.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    parts = leaves(transform) if isinstance(transform, FilterTransform) else []
    _check_copies(owner, transform, parts)
    modules = dict(model.named_modules())
    by_hand = _checked(owner, modules, flattened)
    shapes = {path: shape for path, shape in found.items() if shape is not None} | by_hand
    spatial = any(part.needs_kernel for part in parts)
    if layers is None:
        taps = 2 if parts and all(isinstance(part, Warp) for part in parts) else 1
        routers = tuple(path and f"{path}." for path, m in modules.items() if isinstance(m, AdaptiveRotatedConv2d))
        names = {p for p, m in modules.items() if _convolves(m, taps) and not p.startswith(routers)} | set(shapes)
        if not names:
            raise ValueError(f"{owner}: model has no layer with a spatial kernel; name layers with layers=[...]")
        wanted = set(found)
    else:
        names = _named(owner, modules, layers, shapes, spatial) | set(by_hand)
        wanted = {path for path in found if any(fnmatchcase(path, pattern) for pattern in layers)}
    if spatial or not parts:
        for path in sorted(wanted - names):
            warnings.warn(
                f"{owner}: {path} reads the numbers of a map flattened, in an order that sample= could not follow, and "
                f"is left out: if they lie by channels, height, width, give "
                f"flattened={{{path!r}: (channels, height, width)}}",
                stacklevel=3,
            )
    chosen = []
    for path, m in modules.items():
        if path in names:
            chosen.append(Layer(path, m, None if isinstance(m, CONVOLUTIONS) else shapes.get(path)))
            _check_weight(owner, path, m)
    return chosen


def _check_copies(owner: str, transform: nn.Module, parts: Iterable[FilterTransform]) -> None:
    """Raise where a gradient would go to a copy: each layer has a transform of its own, with the same parameters."""
    for part in parts:
        for name, tensor in part.named_buffers():
            if tensor.requires_grad:
                source = getattr(part, "source", None)
                argument = source.argument if isinstance(source, Source) else name
                raise TypeError(
                    f"{owner}: {type(part).__name__}: {argument} must be an nn.Parameter where it requires gradients "
                    f"(or leave it out, and give the tensor as the condition), got {told(tensor)}"
                )


def _check_weight(owner: str, path: str, module: nn.Module) -> None:
    """Raise unless the layer has a weight of its own that can be followed."""
    if "weight" in slots_of(module):
        raise ValueError(f"{owner}: {path}.weight is computed already; wx.bake it first, or leave it out")
    raw, why = module._parameters.get("weight"), ""
    if isinstance(module, LazyModuleMixin):
        why = "lazy, and has no values yet; run the model once first"
    elif is_parametrized(module, "weight"):
        why = "parametrized; torch.nn.utils.parametrize.remove_parametrizations first"
    elif raw is None:
        why = next((how for name, how in _MADE_BY.items() if hasattr(module, name)), "no parameter of the layer")
    if why:
        raise ValueError(f"{owner}: {path}.weight is {why}; or leave the layer out with layers=[...]")
    require_float(owner, f"{path}.weight", raw)


def _convolves(module: nn.Module, taps: int) -> bool:
    """A convolution with at least so many taps?"""
    return isinstance(module, CONVOLUTIONS) and prod(module.kernel_size) >= taps


def _named(
    owner: str,
    modules: Mapping[str, nn.Module],
    layers: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    spatial: bool,
) -> set[str]:
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not all(isinstance(p, str) for p in layers):
        raise TypeError(f"{owner}: layers must be a list of patterns, got {told(layers)}")
    if not layers:
        raise ValueError(f"{owner}: layers must have a pattern at least, got {layers!r}")
    chosen: set[str] = set()
    for pattern in layers:
        matched = {path: m for path, m in modules.items() if path and fnmatchcase(path, pattern)}
        if not matched:
            there = [path for path, m in modules.items() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
            listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise ValueError(f"{owner}: layers pattern {pattern!r} matches nothing; there are: {listed or 'none'}")
        fitting = {
            path
            for path, m in matched.items()
            if isinstance(m, CONVOLUTIONS) or (isinstance(m, nn.Linear) and (path in shapes or not spatial))
        }
        if not fitting:
            path, m = next(iter(matched.items()))
            hint = ""
            if isinstance(m, nn.Linear):
                hint = f": give sample=inputs, or flattened={{{path!r}: (channels, height, width)}}"
            raise ValueError(f"{owner}: layers: {path} is a {type(m).__name__} with no spatial kernel{hint}")
        chosen |= fitting
    return chosen


def _checked(
    owner: str, modules: Mapping[str, nn.Module], flattened: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    if flattened is None:
        return {}
    if not isinstance(flattened, Mapping):
        raise TypeError(f"{owner}: flattened must be a mapping of layer names to shapes, got {told(flattened)}")
    shapes = {}
    for path, shape in flattened.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            got = "no layer" if module is None else type(module).__name__
            raise ValueError(f"{owner}: flattened: {path!r} must be a Linear layer, got {got}")
        sizes = tuple(shape)
        if len(sizes) < 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"{owner}: flattened[{path!r}] must be (channels, *kernel), got {shape!r}")
        if torch.Size(sizes).numel() != module.in_features:
            raise ValueError(
                f"{owner}: flattened[{path!r}] must have {module.in_features} elements, the layer's inputs, got {sizes}"
            )
        shapes[path] = sizes
    return shapes
