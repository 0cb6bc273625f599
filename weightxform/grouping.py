"""``wx.constrain``: one transform on every weight of a model, the weights computed together.

A group only says which weights to compute *beside* one that has to be computed: those of its bucket that are stale as
well. Each weight keeps its own slot, so a member that was not written is not computed again, and one that cannot join
(another device, dtype or mode; sharded by FSDP2; under ``torch.func``) is computed alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import evaluate
from .computed import install, new_slot, refuse
from .slot import Job, Slot, together
from .swap import child_name, slots_of
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

    A tensor that several of the layers share (tied weights) is computed once and stays shared. One that is shared with
    a layer left out is the raw tensor there: ``UserWarning``.

    Raises (before anything is changed):
        ValueError: a pattern that matches nothing, a weight that is computed already, one that the transform refuses.
        TypeError: an argument of another kind.
    """
    _check_arguments(model, transform, include, exclude, bucket_bytes, options)
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
    Group.over(model, targets, bucket_bytes)
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


class Group:
    """The buckets of one ``constrain``. It lives in the forward hooks of the model, and is copied with it."""

    def __init__(self, buckets: list[list[tuple[nn.Module, str]]]) -> None:
        self.buckets = [Bucket(self, members) for members in buckets]
        self.is_open = False
        self.link()

    @staticmethod
    def over(model: nn.Module, targets: list[Target], bucket_bytes: int) -> None:
        buckets: list[list[tuple[nn.Module, str]]] = [[]]
        seen: set[Slot] = set()
        size = 0
        for _, module, name in targets:
            slot = slots_of(module)[name]
            if slot in seen or not getattr(module._modules[child_name(name)], "groupable", False):
                continue
            seen.add(slot)
            if size >= bucket_bytes:
                buckets.append([])
                size = 0
            raw = module._parameters[name]
            assert raw is not None
            buckets[-1].append((module, name))
            size += raw.numel() * raw.element_size()
        buckets = [members for members in buckets if len(members) > 1]
        if buckets:
            group = Group(buckets)
            model.register_forward_pre_hook(group.begin)
            model.register_forward_hook(group.end, always_call=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.is_open = False
        self.link()

    def link(self) -> None:
        """Tell the slots. A copy is linked here, or if its modules are not there yet, when the model is called."""
        self.linked = all([bucket.link() for bucket in self.buckets])

    # Under torch.compile no version says when a weight must be computed again: a forward of the model does.

    def begin(self, model: nn.Module, args: object) -> None:
        if not self.linked:
            self.link()
        if _compiling():
            self._set_open(True)

    def end(self, model: nn.Module, args: object, output: object) -> None:
        if _compiling():
            self._set_open(False)

    def _set_open(self, is_open: bool) -> None:
        self.is_open = is_open
        for bucket in self.buckets:
            bucket.values = None


def _compiling() -> bool:
    """Not for an export, where a scope would be a side effect: members are computed alone there."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class Bucket:
    """Weights that are computed in one call where they can be."""

    def __init__(self, group: Group, members: list[tuple[nn.Module, str]]) -> None:
        self.group = group
        self.members = members
        self.values: list[Tensor | None] | None = None  # while a compiled forward is traced

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": None}

    def link(self) -> bool:
        complete = True
        for i, (module, name) in enumerate(self.members):
            slots = slots_of(module)
            if name in slots:
                slots[name].bucket, slots[name].index = self, i
            elif "_modules" not in module.__dict__:  # being unpickled
                complete = False
        return complete

    def jobs(self, first: Job) -> list[Job]:
        """``first`` and those that are to be computed with it, in the order of registration."""
        key = _key(first)
        if key is None:
            return [first]
        jobs = []
        for module, name in self.members:
            job = first if first.slot is slots_of(module).get(name) else self._stale(module, name)
            if job is first or (job is not None and _key(job) == key):
                jobs.append(job)
        return jobs

    def _stale(self, module: nn.Module, name: str) -> Job | None:
        """The computation that a member needs now, if it does and may be done early."""
        slot = slots_of(module).get(name)
        if slot is None or slot.bucket is not self or slot.compiled is not None:
            return None
        raw, transform = module._parameters.get(name), module._modules[child_name(name)]
        if type(raw) is not nn.Parameter or transform is None:
            return None
        entry = slot.entry
        if entry is not None and entry.raw is raw and entry.transform is transform and entry.is_current():
            return None
        job = slot.job(module, name, raw, transform)
        return job if job.keeps else None

    def traced(self, slot: Slot) -> Tensor:
        """Inside a compiled forward of the model: the first read computes the bucket.

        Not the hook: for most classes that is another frame to Dynamo, and so another graph. If the first read is
        inside an activation checkpoint, Dynamo refuses the write to ``values``: the graph breaks, or with fullgraph,
        raises.
        """
        if self.values is None:
            self.values = self._compute_traced()
        value = self.values[slot.index]
        assert value is not None
        return value

    def _compute_traced(self) -> list[Tensor | None]:
        values: list[Tensor | None] = [None] * len(self.members)
        parts: list[_Part] = []
        for i, (module, name) in enumerate(self.members):
            slot, raw = slots_of(module).get(name), module._parameters.get(name)
            if slot is None or slot.bucket is not self or raw is None:
                continue
            transform = module._modules[child_name(name)]
            assert transform is not None
            job = Job(slot, module, name, raw, transform, transform.training, False, None)
            key = _key(job)
            part = _find(parts, key)
            part.where.append(i)
            part.jobs.append(job)
        for part in parts:
            for i, value in zip(part.where, together(part.jobs), strict=True):
                values[i] = value
        return values


class _Part(NamedTuple):
    key: Hashable | None
    where: list[int]
    jobs: list[Job]


def _find(parts: list[_Part], key: Hashable | None) -> _Part:
    """The part of this key; a new one if there is none, or for ``None``."""
    for part in parts:
        if key is not None and part.key == key:
            return part
    parts.append(_Part(key, [], []))
    return parts[-1]


def _key(job: Job) -> Hashable | None:
    """Equal for weights that one call can compute."""
    transform = job.transform
    if not isinstance(transform, Transform) or not transform.groupable or job.raw is None:
        return None
    key = transform.group_key(job.raw)
    return None if key is None else (type(transform), transform.training, key)
