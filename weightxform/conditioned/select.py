"""Which layers of a model follow the condition, and as what shape their weights are seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..swap import slots_of
from ..transform import describe, require_float

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_RESHAPES = {
    f
    for owner in (torch, torch.Tensor)
    for f in (getattr(owner, n, None) for n in ("flatten", "reshape", "view", "squeeze"))
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
    found: Mapping[str, tuple[int, ...]],
    spatial: bool,
    warps: bool,
) -> list[Layer]:
    """The layers.

    Args:
        owner: for messages.
        model: to look into.
        layers: shell patterns for qualified names; ``None``: convolutions with more than one tap (without ``warps``:
            all convolutions), and the Linear layers of ``flattened`` and ``found``.
        flattened: name of a Linear -> [channels, *kernel], by the user.
        found: the same, by :func:`trace`.
        spatial: whether the transform needs a kernel; else a Linear may be named that has none.
        warps: whether it only maps taps.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    modules = dict(model.named_modules())
    shapes = {**found, **_checked(owner, modules, flattened)}
    if layers is None:
        chosen = [
            Layer(path, m, None if isinstance(m, CONVOLUTIONS) else shapes[path])
            for path, m in modules.items()
            if path in shapes or _convolves(m, 2 if warps else 1)
        ]
        if not chosen:
            raise ValueError(f"{owner}: model has no layer with a spatial kernel; name layers with layers=[...]")
    else:
        chosen = _named(owner, modules, layers, shapes, spatial)
    for layer in chosen:
        if "weight" in slots_of(layer.module):
            raise ValueError(f"{owner}: {layer.path}.weight is computed already; wx.bake it first, or leave it out")
        require_float(owner, f"{layer.path}.weight", layer.raw)
    return chosen


def _convolves(module: nn.Module, taps: int) -> bool:
    """A convolution with at least so many taps?"""
    raw = module._parameters.get("weight") if isinstance(module, CONVOLUTIONS) else None
    return raw is not None and raw.shape[2:].numel() >= taps


def _named(
    owner: str,
    modules: Mapping[str, nn.Module],
    layers: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    spatial: bool,
) -> list[Layer]:
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not all(isinstance(p, str) for p in layers):
        raise TypeError(f"{owner}: layers must be a list of patterns, got {layers!r}")
    chosen: dict[str, Layer] = {}
    for pattern in layers:
        matched = {path: m for path, m in modules.items() if path and fnmatchcase(path, pattern)}
        if not matched:
            there = [path for path, m in modules.items() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
            listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise ValueError(f"{owner}: layers pattern {pattern!r} matches nothing; there are: {listed or 'none'}")
        fitting = {}
        for path, m in matched.items():
            if isinstance(m, CONVOLUTIONS):
                fitting[path] = Layer(path, m, None)
            elif isinstance(m, nn.Linear) and (path in shapes or not spatial):
                fitting[path] = Layer(path, m, shapes.get(path))
        if not fitting:
            path, m = next(iter(matched.items()))
            hint = ""
            if isinstance(m, nn.Linear):
                hint = f": give sample=inputs, or flattened={{{path!r}: (channels, height, width)}}"
            raise ValueError(f"{owner}: layers: {path} is a {type(m).__name__} with no spatial kernel{hint}")
        chosen.update(fitting)
    return [chosen[path] for path in modules if path in chosen]


def _checked(
    owner: str, modules: Mapping[str, nn.Module], flattened: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    if flattened is None:
        return {}
    if not isinstance(flattened, Mapping):
        raise TypeError(f"{owner}: flattened must be a mapping of layer names to shapes, got {flattened!r}")
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


class _Flattenings(TorchFunctionMode):
    """Notes of every tensor [B, n] whether it is a flattened map [B, channels, *kernel]."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[int, tuple[Tensor, tuple[int, ...]]] = {}  # id -> (the tensor, which keeps the id its own, ...)

    def shape_of(self, tensor: object) -> tuple[int, ...] | None:
        found = self.maps.get(id(tensor))
        return None if found is None else found[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if not (isinstance(out, Tensor) and isinstance(source, Tensor)):
            return out
        known = self.shape_of(source)
        if func in _RESHAPES and source.ndim > 2 and out.ndim == 2 and source.shape[0] == out.shape[0]:
            self.maps[id(out)] = out, tuple(source.shape[1:])
        elif known is not None and out.shape == source.shape:  # dropout, an activation
            self.maps[id(out)] = out, known
        return out


def trace(owner: str, model: nn.Module, sample: object) -> dict[str, tuple[int, ...]]:
    """The Linear layers whose input is a flattened map in ``model(sample)``: name -> [channels, *kernel].

    Run in eval mode and without gradients; nothing of the model changes. A map of one element (after global pooling)
    has no kernel. ``sample``: the model's input, or a tuple or a mapping of its arguments.
    """
    args, kwargs = (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else (
        (sample,), {},
    )  # fmt: skip
    if not any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        raise TypeError(f"{owner}: sample must be the model's inputs, with a Tensor among them, got {sample!r}")
    for name, a in kwargs.items() if kwargs else enumerate(args):
        if isinstance(a, Tensor) and a.ndim == 0:
            raise ValueError(f"{owner}: sample must have a batch axis, got {describe(a)} as {name!r}")
    found: dict[str, tuple[int, ...]] = {}
    modes = {m: m.training for m in model.modules()}
    mode = _Flattenings()
    hooks = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            shape = mode.shape_of(inputs[0]) if inputs else None
            if shape is not None and torch.Size(shape[1:]).numel() > 1:
                found[path] = shape

        return hook

    try:
        for path, m in model.named_modules():
            if isinstance(m, nn.Linear):
                hooks.append(m.register_forward_pre_hook(look(path)))
        model.eval()
        with torch.no_grad(), mode:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes.items():
            m.training = training
    return found
