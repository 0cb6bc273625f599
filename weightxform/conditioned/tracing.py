"""Which Linear layers of a model read a flattened map, in its order: followed through one forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .condition import told

# Names of functions, without underscores. What is not here may put the numbers in another order.
_RESHAPES = {"flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "reshapeas", "viewas"}
_NAMES = """
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid
    sigmoid logsigmoid tanh tanhshrink softshrink hardshrink threshold clamp clip clamp_min clamp_max
    softmax log_softmax softmin where lerp nan_to_num
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize
    add sub mul div truediv true_divide divide multiply subtract radd rsub rmul iadd isub imul itruediv neg abs square
    sqrt rsqrt exp log log1p pow maximum minimum
    to type float double half bfloat16 cpu cuda contiguous clone detach requires_grad
    interpolate upsample pad pixel_shuffle pixel_unshuffle channel_shuffle
    chunk split tensor_split narrow
"""  # and pooling
_IN_PLACE = set(_NAMES.split())
_CATS = {"cat", "concat", "concatenate"}
_MIXING = {
    "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "lstm", "gru",
    "rnn_tanh", "rnn_relu", "scaled_dot_product_attention", "multi_head_attention_forward",
    "native_multi_head_attention", "transformer_encoder_layer_fwd",
}  # fmt: skip


class Kind(Enum):
    """What the numbers of a tensor that was made of a map are."""

    MAP = "the map, or its numbers in the same order"
    LOOSE = "in another order or shape"
    LOST = "loose, and flattened to [B, n]: which of them is of which place is not known"
    MIXED = "of all places: there was a product with a matrix"


class Seen(NamedTuple):
    """What a tensor has of the last map [batch, *shape], shape = [channels, *kernel], that it was made of."""

    kind: Kind
    batch: int
    shape: tuple[int, ...]

    @property
    def pooled(self) -> int:
        """So many numbers, or fewer, are not of places."""
        return self.batch * self.shape[0]

    @property
    def has_kernel(self) -> bool:
        return torch.Size(self.shape[1:]).numel() > 1

    def is_map(self, x: Tensor) -> bool:
        return self.kind is Kind.MAP and tuple(x.shape[1:]) == self.shape


def _map(x: Tensor) -> Seen:
    return Seen(Kind.MAP, x.shape[0], tuple(x.shape[1:]))


Sources = list[tuple[Tensor, Seen]]


class _Following(TorchFunctionMode):
    """Notes for each tensor what it has of a map."""

    def __init__(self, inputs: Iterable[object]) -> None:
        super().__init__()
        self.known: dict[int, tuple[weakref.ref[Tensor], Seen]] = {}
        for x in inputs:
            if isinstance(x, Tensor) and x.ndim > 2:
                self.note(x, _map(x))

    def note(self, tensor: Tensor, seen: Seen | None) -> None:
        self.known.pop(id(tensor), None)
        if seen is not None:
            self.known[id(tensor)] = weakref.ref(tensor), seen

    def seen(self, tensor: object) -> Seen | None:
        found = self.known.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        sources = [(a, seen) for a in tensors if (seen := self.seen(a)) is not None]
        out = func(*args, **kwargs)
        for y in tree_leaves(out):
            if isinstance(y, Tensor):
                self.note(y, _outcome(name, y, tensors, sources, args, kwargs))
        return out


def _outcome(name: str, out: Tensor, tensors: list[Tensor], sources: Sources, args: Any, kwargs: Any) -> Seen | None:
    if name.startswith("conv") and out.ndim > 2:
        return _map(out)
    if not sources:
        return None
    if name in _MIXING:
        return sources[0][1]._replace(kind=Kind.MIXED)
    if name in _CATS:
        kept = _joined(out, tensors, sources, kwargs.get("dim", args[1] if len(args) > 1 else 0))
    else:
        kept = next((k for x, seen in sources if (k := _kept(name, out, x, seen, args)) is not None), None)
    if kept is not None:
        return kept
    kinds = {seen.kind for _, seen in sources}
    if kinds == {Kind.MIXED} or kinds == {Kind.LOOSE, Kind.MIXED}:
        return next(seen for _, seen in sources if seen.kind is Kind.MIXED)
    x, seen = max(((x, seen) for x, seen in sources if seen.kind is not Kind.MIXED), key=lambda s: s[1].has_kernel)
    if not seen.has_kernel or out.ndim == 0 or out.numel() <= seen.pooled:
        return None
    vectors = out.ndim == 2 and out.shape[0] == x.shape[0]
    flattened = vectors and (seen.kind is not Kind.LOOSE if x.ndim == 2 else name in _RESHAPES)
    return seen._replace(kind=Kind.LOST if flattened else Kind.LOOSE)


def _kept(name: str, out: Tensor, x: Tensor, seen: Seen, args: Any) -> Seen | None:
    """What ``out`` is by its source ``x`` if this is a map, or the numbers of one in order, and they stay so."""
    if seen.kind is not Kind.MAP or not out.ndim:
        return None
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if len(index) == 1 and out.shape[1:] == x.shape[1:]:  # of the samples
            return seen._replace(batch=out.shape[0])
        if not all(isinstance(i, slice) or i is Ellipsis for i in index):
            return None
    elif name == "get":  # an attribute, as .data
        if out.shape != x.shape or out.stride() != x.stride():
            return None
    elif name in _RESHAPES:
        return seen if out.shape[0] == x.shape[0] and out.numel() == x.numel() else None
    elif name not in _IN_PLACE and "_pool" not in name:
        return None
    if out.shape == x.shape:
        return seen
    return _map(out) if seen.is_map(x) and out.ndim == x.ndim else None


def _joined(out: Tensor, tensors: list[Tensor], sources: Sources, axis: int) -> Seen | None:
    """Maps side by side in their channels, also flattened ones."""
    shapes = [seen.shape for _, seen in sources if seen.kind is Kind.MAP]
    if axis not in (1, 1 - out.ndim) or len(shapes) < len(tensors) or len({s[1:] for s in shapes}) > 1:
        return None
    if out.ndim > 2 and not all(seen.is_map(x) for x, seen in sources):
        return None
    return Seen(Kind.MAP, out.shape[0], (sum(s[0] for s in shapes), *shapes[0][1:]))


def trace(owner: str, model: nn.Module, sample: object) -> dict[str, tuple[int, ...] | None]:
    """The Linear layers whose input is a flattened map in ``model(sample)``: name -> [channels, *kernel].

    ``None`` as shape: it reads vectors that were made of a map, and which input is of which place is not known: it was
    permuted, joined with other features, or the layer reads several kinds. A map of one element (after global pooling)
    has no kernel, nor have vectors that came through a product with a matrix (a Linear layer, attention).

    Run in eval mode and without gradients; nothing of the model changes. ``sample``: the model's input, or a tuple or a
    mapping of its arguments.
    """
    args, kwargs = (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else (
        (sample,), {},
    )  # fmt: skip
    tensors = [a for a in tree_leaves((args, dict(kwargs))) if isinstance(a, Tensor)]
    if not tensors:
        raise TypeError(f"{owner}: sample must be the model's inputs, with a Tensor among them, got {told(sample)}")
    if not any(a.ndim for a in tensors):
        raise ValueError(f"{owner}: sample must have a batch axis, got {told(tensors[0])}")
    read: dict[str, set[Seen | None]] = {}
    modes = {m: m.training for m in model.modules()}
    mode = _Following(tensors)
    hooks = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            x = inputs[0] if inputs else named.get("input")
            seen = mode.seen(x) if isinstance(x, Tensor) and x.ndim == 2 else None
            if seen is None or seen.kind not in (Kind.MAP, Kind.LOST) or not seen.has_kernel:
                seen = None
            read.setdefault(path, set()).add(seen and seen._replace(batch=0))

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
    found: dict[str, tuple[int, ...] | None] = {}
    for path, kinds in read.items():
        seen = next(iter(kinds)) if len(kinds) == 1 else None
        if any(kinds):
            found[path] = seen.shape if seen is not None and seen.kind is Kind.MAP else None
    return found
