"""``wx.constrain``: one transform on every weight of a model, the weights computed together (``bucket.py``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import evaluate
from .bucket import Group
from .checks import require_bool
from .computed import install, new_slot, refuse
from .slot import Slot
from .swap import slots_of
from .transform import Transform

_KINDS = (
    nn.Linear, nn.Embedding,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class Target(NamedTuple):
    """A weight that a model has."""

    path: str
    module: nn.Module
    name: str

    @property
    def raw(self) -> Tensor:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    def matches(self, pattern: str) -> bool:
        owner = self.path.removesuffix(self.name).removesuffix(".")
        return fnmatchcase(self.path, pattern) or fnmatchcase(owner, pattern)


def constrain(
    model: nn.Module,
    transform: type[Transform] | Callable[[nn.Module, str], nn.Module | None],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    bucket_bytes: int = 25 * 2**20,
    accumulate_grad: bool = False,
    fold: bool = False,
    **options: Any,
) -> nn.Module:
    """Compute every ``weight`` of the Linear, Conv, ConvTranspose and Embedding layers of ``model``; returns ``model``.

    The weights are computed together, in buckets that follow one another in the order of registration.

    Args:
        model: its layers are changed in place.
        transform: a class of transforms, made once a weight with ``**options``; or a function of (module, qualified
            name of the weight) that returns the transform of this weight, or ``None`` to leave it alone.
        include, exclude: shell patterns for the qualified name of the layer (``"conv1"``, ``"layer2.*"``) or of its
            weight (``"*.weight"``); ``*`` matches dots too. Default: all, and none.
        bucket_bytes: a bucket ends once it holds this much. Weights of a bucket get their gradients together, so that
            buckets of about DDP's size leave the overlap with communication as it was.
        accumulate_grad: where a raw tensor has a gradient already (accumulation over micro-batches), let the backward
            kernel add to it, and give autograd none: one pass over the gradients instead of two. Hooks of the tensor
            and ``torch.autograd.grad`` get the gradient as ever (autograd adds it then), and so does DDP, but not a
            ``register_prehook`` on the tensor's ``AccumulateGrad`` node or a hook on ``weight.grad_fn``, which see
            ``None``. On the CPU, for ``SpectralNorm``; elsewhere it changes nothing.
        fold: make the ``nn.Linear`` and ``nn.Conv1d/2d/3d`` layers folded ones, as ``wx.nn.SpectralLinear``: the same
            numbers, and the computed weight is never written. Other layers, subclasses of these, and transforms that
            cannot be folded stay as they are.

    A tensor that several of the layers share (tied weights) is computed once and stays shared. One that is shared with
    a layer left out is the raw tensor there: ``UserWarning``.

    Raises (before anything is changed):
        ValueError: a pattern that matches nothing, a weight that is computed already, one that the transform refuses.
        TypeError: an argument of another kind.
    """
    _check_arguments(model, transform, include, exclude, bucket_bytes, options)
    require_bool("constrain", "accumulate_grad", accumulate_grad)
    require_bool("constrain", "fold", fold)
    targets = _choose(list(_candidates(model)), include, exclude)
    for path, module, name in targets:
        if name in slots_of(module):
            raise ValueError(f"constrain: {path} is computed already; exclude it, or wx.bake it first")
    transforms = _make_transforms(targets, transform, options)
    targets = [t for t in targets if id(t.raw) in transforms]
    if not targets:
        raise ValueError("constrain: model must have a Linear, Conv, ConvTranspose or Embedding weight, got none")
    for target in targets:
        refuse(target.module, target.name, target.raw, transforms[id(target.raw)])
    _warn_of_ties(model, targets)
    _install(targets, transforms)
    if fold:
        from .nn import fold_layer  # it has computed weights itself

        for target in targets:
            fold_layer(target.module)
    Group.over(model, [(t.module, t.name) for t in targets], bucket_bytes, accumulate_grad)
    return model


def _check_arguments(
    model: object, transform: Any, include: Any, exclude: Any, bucket_bytes: Any, options: dict[str, Any]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"constrain: model must be an nn.Module, got {_kind(model)}")
    if isinstance(transform, nn.Module):
        raise TypeError(
            f"constrain: transform must be a class such as wx.SpectralNorm, or a function, got an instance of "
            f"{_kind(transform)}; each weight needs its own"
        )
    if not callable(transform) or (isinstance(transform, type) and not issubclass(transform, nn.Module)):
        raise TypeError(f"constrain: transform must be a Transform class or a function, got {_kind(transform)}")
    if options and not isinstance(transform, type):
        raise TypeError(f"constrain: options are for a Transform class, got {', '.join(options)} with a function")
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or (patterns is not None and not all(isinstance(p, str) for p in patterns)):
            raise TypeError(f"constrain: {argument} must be a list of patterns, got {patterns!r}")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int):
        raise TypeError(f"constrain: bucket_bytes must be an int, got {bucket_bytes!r}")
    if bucket_bytes < 1:
        raise ValueError(f"constrain: bucket_bytes must be at least 1, got {bucket_bytes}")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _candidates(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        if isinstance(module, _KINDS) and module._parameters.get("weight") is not None:
            yield Target(f"{path}.weight" if path else "weight", module, "weight")


def _choose(targets: list[Target], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[Target]:
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(t.matches(pattern) for t in targets):
                there = (", ".join(t.path for t in targets[:8]) or "none") + (", ..." if len(targets) > 8 else "")
                raise ValueError(f"constrain: {argument} pattern {pattern!r} matches no weight; there are: {there}")

    def wanted(target: Target) -> bool:
        if include is not None and not any(target.matches(p) for p in include):
            return False
        return not any(target.matches(p) for p in exclude or ())

    return [t for t in targets if wanted(t)]


def _make_transforms(targets: list[Target], make: Any, options: dict) -> dict[int, nn.Module]:
    """One transform for each raw tensor, by its id; ties have one."""
    transforms: dict[int, nn.Module] = {}
    for target in targets:
        if id(target.raw) in transforms:
            continue
        transform = make(**options) if isinstance(make, type) else make(target.module, target.path)
        if transform is None:
            continue
        if not isinstance(transform, nn.Module):
            got = f"{_kind(transform)} for {target.path}"
            raise TypeError(f"constrain: transform must return a Transform or None, got {got}")
        if any(transform is t for t in transforms.values()):
            raise ValueError(f"constrain: transform must give each weight one of its own; {target.path} got another's")
        transforms[id(target.raw)] = transform
    return transforms


def _warn_of_ties(model: nn.Module, targets: list[Target]) -> None:
    taken = {id(t.raw): t.path for t in targets}
    places = {(id(t.module), t.name) for t in targets}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in taken and (id(module), name) not in places:
                other = f"{path}.{name}, which is left out and reads the raw tensor"
                warnings.warn(f"constrain: {taken[id(parameter)]} is tied to {other}", stacklevel=3)


def _install(targets: list[Target], transforms: dict[int, nn.Module]) -> None:
    attached: set[int] = set()
    for _, module, name in targets:
        raw = module._parameters[name]
        if id(raw) not in attached:
            attached.add(id(raw))
            evaluate.attach(transforms[id(raw)], raw, module, name)
    slots: dict[int, Slot] = {}
    for _, module, name in targets:
        raw = module._parameters[name]
        if id(raw) in slots:
            slots[id(raw)].users += 1
        slot = slots.setdefault(id(raw), new_slot(module, raw))
        install(module, name, raw, transforms[id(raw)], slot)
