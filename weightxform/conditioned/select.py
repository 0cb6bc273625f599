"""Which layers of a model follow the condition, and as what shape their weights are seen."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..swap import slots_of
from ..transform import describe, require_float

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# Names of functions, without underscores. What is not here may put the numbers in another order.
_RESHAPES = {"flatten", "reshape", "view", "squeeze", "unflatten"}
_NAMES = """
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid
    sigmoid logsigmoid tanh tanhshrink softshrink hardshrink threshold clamp clip clamp_min clamp_max
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize
    add sub mul div truediv true_divide divide multiply subtract radd rsub rmul iadd isub imul itruediv neg abs square
    sqrt rsqrt exp log log1p pow maximum minimum
    to type float double half bfloat16 cpu cuda contiguous clone detach requires_grad
    interpolate upsample pad pixel_shuffle pixel_unshuffle channel_shuffle
"""  # and pooling
_IN_PLACE = set(_NAMES.split())


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
    if not layers:
        raise ValueError(f"{owner}: layers must have a pattern at least, got {layers!r}")
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
    """Notes which tensors are maps [B, channels, *kernel], and which are flattened ones [B, n]."""

    def __init__(self, inputs: Iterable[object]) -> None:
        super().__init__()
        # id -> (the tensor, its shape as a map without B)
        self.known: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...]]] = {}
        for x in inputs:
            self.note(x, tuple(x.shape[1:]) if isinstance(x, Tensor) and x.ndim > 2 else None)

    def note(self, tensor: object, shape: tuple[int, ...] | None) -> None:
        self.known.pop(id(tensor), None)
        if isinstance(tensor, Tensor) and shape is not None:
            self.known[id(tensor)] = weakref.ref(tensor), shape

    def shape_of(self, tensor: object) -> tuple[int, ...] | None:
        found = self.known.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in ("get", "set"):  # an attribute
            return func(*args, **(kwargs or {}))
        sources = [(a, self.shape_of(a)) for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.note(out, self._shape(name, out, sources, args, kwargs or {}))
        return out

    def _shape(self, name: str, out: Tensor, sources: list[Any], args: Any, kwargs: Any) -> tuple[int, ...] | None:
        if name.startswith("conv"):
            return tuple(out.shape[1:])
        if name in ("cat", "concat", "concatenate"):
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            maps = axis == 1 and out.ndim > 2 and all(shape == tuple(x.shape[1:]) for x, shape in sources)
            return tuple(out.shape[1:]) if maps else None
        for x, shape in sources:
            if shape is None or out.shape[:1] != x.shape[:1]:
                continue
            if name in _RESHAPES and (out.ndim == 2 or tuple(out.shape[1:]) == shape):
                return shape
            if (name in _IN_PLACE or "_pool" in name) and out.ndim == x.ndim:
                if x.ndim > 2:
                    return tuple(out.shape[1:])
                if out.shape == x.shape:
                    return shape
        return None


def trace(owner: str, model: nn.Module, sample: object) -> dict[str, tuple[int, ...]]:
    """The Linear layers whose input is a flattened map in ``model(sample)``: name -> [channels, *kernel].

    Run in eval mode and without gradients; nothing of the model changes. A map of one element (after global pooling)
    has no kernel; one that was permuted, mixed or joined with other features is not taken, nor a layer that reads
    several kinds. ``sample``: the model's input, or a tuple or a mapping of its arguments.
    """
    args, kwargs = (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else (
        (sample,), {},
    )  # fmt: skip
    if not any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        raise TypeError(f"{owner}: sample must be the model's inputs, with a Tensor among them, got {sample!r}")
    for name, a in kwargs.items() if kwargs else enumerate(args):
        if isinstance(a, Tensor) and a.ndim == 0:
            raise ValueError(f"{owner}: sample must have a batch axis, got {describe(a)} as {name!r}")
    seen: dict[str, set[tuple[int, ...] | None]] = {}
    modes = {m: m.training for m in model.modules()}
    mode = _Flattenings(tree_leaves((args, dict(kwargs))))
    hooks = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            seen.setdefault(path, set()).add(mode.shape_of(inputs[0] if inputs else named.get("input")))

        return hook

    try:
        for path, m in model.named_modules():
            if isinstance(m, nn.Linear):
                hooks.append(m.register_forward_pre_hook(look(path), with_kwargs=True))
        model.eval()
        with torch.no_grad(), mode:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes.items():
            m.training = training
    found = {path: shapes.pop() for path, shapes in seen.items() if len(shapes) == 1}
    return {path: shape for path, shape in found.items() if shape is not None and torch.Size(shape[1:]).numel() > 1}
