"""Weights that are computed in one call.

A group only says which weights to compute *beside* one that has to be computed: those of its bucket that are stale as
well. Each weight keeps its own slot, so a member that was not written is not computed again, and one that cannot join
(another device, dtype or mode; sharded by FSDP2; under ``torch.func``) is computed alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._torch import in_backward
from .jobs import Job, Last, Place, in_its_context, repetition, together, values_of
from .kept import Kept
from .slot import Slot, is_folded
from .swap import child_name, slots_of
from .transform import Transform


class Group:
    """The buckets of one ``constrain``. It lives in the forward hooks of the model, and is copied with it."""

    def __init__(self, buckets: list[list[tuple[nn.Module, str]]], accumulates: bool) -> None:
        self.accumulates = accumulates
        self.buckets = [Bucket(self, members) for members in buckets]
        self.is_open = False
        self.link()

    @staticmethod
    def over(
        model: nn.Module, targets: list[tuple[nn.Module, str]], bucket_bytes: int, accumulates: bool
    ) -> Group | None:
        """Group what can be grouped of ``targets``; ``None`` if nothing can."""
        buckets: list[list[tuple[nn.Module, str]]] = [[]]
        seen: set[Slot] = set()
        size = 0
        for module, name in targets:
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
        if not buckets:
            return None
        group = Group(buckets, accumulates)
        model.register_forward_pre_hook(group.begin)
        model.register_forward_hook(group.end, always_call=True)
        return group

    def leave(self, model: nn.Module) -> None:
        """Undo :meth:`over`."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for number in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[number]
                model._forward_hooks_always_called.pop(number, None)

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
            bucket.values = {}


def _compiling() -> bool:
    """Not for an export, where a scope would be a side effect: members are computed alone there."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class Bucket:
    """Weights that are computed in one call where they can be."""

    def __init__(self, group: Group, members: list[tuple[nn.Module, str]]) -> None:
        self.group = group
        self.members = members
        self.values: dict[bool, list[Tensor | None]] = {}  # by Job.folded, while a compiled forward is traced

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}

    def link(self) -> bool:
        complete = True
        for i, (module, name) in enumerate(self.members):
            slots = slots_of(module)
            if name in slots:
                slots[name].bucket, slots[name].index = self, i
            elif "_modules" not in module.__dict__:  # being unpickled
                complete = False
        return complete

    def remember(self, jobs: list[Job]) -> None:
        """``jobs`` were computed together: the next time will probably be for the same reason."""
        kept = jobs[0].place.kept
        if len(jobs) == 1 or kept is None or len(kept.raws) != len(jobs) or not all(j.keeps for j in jobs):
            return
        if all(j.advance == j.transform.training for j in jobs):
            kept.last = Last(
                jobs,
                [j.slot for j in jobs],
                [j.place for j in jobs],
                [j.name for j in jobs],
                [j.module._parameters for j in jobs],
                [child_name(j.name) for j in jobs],
                [j.module._modules for j in jobs],
                repetition(jobs, self.group.accumulates),
            )

    def again(self, place: Place) -> Tensor | None:
        """The value at ``place``, computed with those with which it was computed the last time.

        ``None`` where more has happened since than that all their raw tensors, or what they share, were written. This
        is the usual case, after an optimizer's step, and it is seen and served at a fraction of the cost of
        :meth:`jobs`.
        """
        kept = place.kept
        if kept is None or kept.last is None:
            return None
        last, row = kept.last, place.row
        if not self._stands(kept, last) or (last.jobs[0].advance and in_backward()):
            return None
        stamps = kept.shared_state_written() if kept.shared else kept.only_raws_written()
        if stamps is None:
            return None
        kept.drop_all()
        values = None if last.repeat is None else in_its_context(partial(last.repeat, stamps))
        values = values_of(last.jobs) if values is None else values
        kept = kept.again(values, stamps)
        for k, other in enumerate(last.places):
            other.kept, other.row = kept, k
        if last.jobs[0].advance:
            kept.advanced = [s.advanced_with(kept, k) for k, s in enumerate(last.slots)]
        return values[row]

    @staticmethod
    def _stands(kept: Kept, last: Last) -> bool:
        """Whether values, raw tensors and transforms are where they were, and nothing else advanced a state."""
        return (
            all([p.kept is kept for p in last.places])
            and all(map(is_, map(dict.get, last.parameters, last.names), kept.raws))
            and all(map(is_, map(dict.get, last.modules, last.children), kept.transforms))
            and not any([s.compiled is not None or s.pending is not None for s in last.slots])
            and (not last.jobs[0].advance or all(map(is_, [s.advanced for s in last.slots], kept.advanced)))
        )

    def jobs(self, first: Job) -> list[Job]:
        """``first`` and those that are to be computed with it, in the order of registration."""
        key = _key(first)
        if key is None:
            return [first]
        jobs = []
        for module, name in self.members:
            job = first if first.slot is slots_of(module).get(name) else self._stale(module, name, first.folded)
            if job is first or (job is not None and _key(job) == key):
                jobs.append(job)
        # Of tied modules the one in the bucket may have got a raw tensor of its own.
        return jobs if any(job is first for job in jobs) else [first]

    def _stale(self, module: nn.Module, name: str, folded: bool) -> Job | None:
        """The computation that a member needs now, if it does and may be done early."""
        slot = slots_of(module).get(name)
        if slot is None or slot.bucket is not self or slot.compiled is not None or slot.folds is not folded:
            return None
        raw, transform = module._parameters.get(name), module._modules[child_name(name)]
        if type(raw) is not nn.Parameter or transform is None:
            return None
        place = slot.state if folded else slot.weight
        if place.serve(raw, transform, name) is not None:
            return None
        job = slot.job(module, name, raw, transform, folded)
        return job if job.keeps else None

    def traced(self, slot: Slot, folded: bool) -> Tensor:
        """Inside a compiled forward of the model: the first read computes the bucket.

        Not the hook: for most classes that is another frame to Dynamo, and so another graph. If the first read is
        inside an activation checkpoint, Dynamo refuses the write to ``values``: the graph breaks, or with fullgraph,
        raises.
        """
        if folded not in self.values:
            self.values[folded] = self._compute_traced(folded)
        value = self.values[folded][slot.index]
        assert value is not None
        return value

    def _compute_traced(self, folded: bool) -> list[Tensor | None]:
        values: list[Tensor | None] = [None] * len(self.members)
        parts: list[_Part] = []
        for i, (module, name) in enumerate(self.members):
            slot, raw = slots_of(module).get(name), module._parameters.get(name)
            if slot is None or slot.bucket is not self or raw is None:
                continue
            transform = module._modules[child_name(name)]
            assert transform is not None
            if is_folded(module, transform) is not folded:
                continue
            job = Job(slot, module, name, raw, transform, folded, transform.training, False, None)
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
    return None if key is None else (type(transform), transform.training, job.folded, key)
