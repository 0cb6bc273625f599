"""Computing weights: one, or several of a kind in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import versions
from ._torch import capture_of, saved_tensor_hooks_active
from .evaluate import evaluate, keeps_graph, reset
from .kept import Kept
from .retained import retained
from .transform import Repeat, Transform

if TYPE_CHECKING:
    from .slot import Slot

_T = TypeVar("_T")


class Place:
    """Where the last value is: in which :class:`Kept`, and in which of its rows."""

    __slots__ = "kept", "row"

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.row = 0

    def empty(self) -> None:
        if self.kept is not None:
            self.kept.drop(self.row)
            self.kept = None

    @property
    def value(self) -> Tensor | None:
        return None if self.kept is None else self.kept.values[self.row]

    def check_untouched(self, name: str) -> None:
        """Raise ``RuntimeError`` if somebody wrote into the value: the write would be lost."""
        if self.kept is not None:
            self.kept.check_untouched(self.row, name)

    def serve(self, raw: Tensor | None, transform: nn.Module, name: str) -> Tensor | None:
        return None if self.kept is None else self.kept.serve(self.row, raw, transform, name)


class Job(NamedTuple):
    """One weight to be computed."""

    slot: Slot
    module: nn.Module
    name: str
    raw: Tensor | None
    transform: nn.Module
    folded: bool  # what a folded layer needs, and not the weight
    advance: bool
    keeps: bool  # whether the value may be served again
    stamp: tuple | None  # of the raw tensor

    @property
    def place(self) -> Place:
        return self.slot.state if self.folded else self.slot.weight


class Last(NamedTuple):
    """A computation in which several took part, in columns."""

    jobs: list[Job]
    slots: list[Slot]
    places: list[Place]
    names: list[str]
    parameters: list[dict]
    children: list[str]
    modules: list[dict]
    repeat: Repeat | None


def compute(jobs: Sequence[Job]) -> list[Tensor]:
    """Compute the weights (several of one groupable class in one call) and put them in their slots."""
    for job in jobs:
        _prepare(job)
    values = values_of(jobs)
    raw, value = jobs[0].raw, values[0]
    kind = "cpu" if raw is None and not value.is_cuda else value.device.type
    capturing = capture_of(kind) != 0
    which = [i for i, job in enumerate(jobs) if job.slot.computed(job, capturing)]
    if which:
        readers = [jobs[i].slot.state_of(jobs[i].transform) for i in which]
        kept = Kept([jobs[i] for i in which], [values[i] for i in which], kind, readers)
        for row, i in enumerate(which):
            place = jobs[i].place
            place.kept, place.row = kept, row
        if len(jobs) == 1 and jobs[0].advance and jobs[0].keeps:
            kept.repeat = repetition(jobs, False)
    return values


def values_of(jobs: Sequence[Job]) -> list[Tensor]:
    return together(jobs) if jobs[0].folded else in_its_context(partial(_with_lasting_graphs, jobs))


def in_its_context(compute: Callable[[], _T]) -> _T:
    with torch.enable_grad():  # whatever the grad mode: one value serves reads under no_grad and others
        if saved_tensor_hooks_active():
            # Hidden from an enclosing activation checkpoint: it counts the tensors that are saved, and in its
            # recomputation the weight is a cache hit.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                return compute()
        return compute()


def _same(x: Any) -> Any:
    return x


def _prepare(job: Job) -> None:
    slot, raw, transform = job.slot, job.raw, job.transform
    if raw is not None:
        versions.watch(raw)
    place = job.place
    place.check_untouched(job.name)
    if slot.reader is None or slot.reader[0] is not transform:
        for tensor in slot.state_of(transform)():  # more than its own where transforms share one
            if isinstance(tensor, nn.Parameter):
                versions.watch(tensor)
    if slot.pending is not None:
        if slot.pending == "always" or not job.advance:
            reset(transform, raw)
        slot.pending = None
    place.empty()  # its memory may serve the new one


def _with_lasting_graphs(jobs: Sequence[Job]) -> list[Tensor]:
    outs = together(jobs)
    for i, job in enumerate(jobs):
        if not isinstance(outs[i], Tensor):
            kind, got = type(job.transform).__name__, type(outs[i]).__name__
            raise TypeError(f"{kind}: the weight must be a Tensor, got {got}")
        if not keeps_graph(job.transform):
            outs[i] = retained(outs[i], job.raw)
    return outs


def repetition(jobs: Sequence[Job], accumulates: bool) -> Repeat | None:
    """What computes ``jobs`` again; ``None``: nothing does better than :func:`together`."""
    transforms = [j.transform for j in jobs]
    if jobs[0].folded or not isinstance(transforms[0], Transform):
        return None
    cls: Any = type(transforms[0])
    return cls.repeat_group(transforms, [j.raw for j in jobs], [j.advance for j in jobs], accumulates)


def together(jobs: Sequence[Job]) -> list[Tensor]:
    """The values alone; several must be of one groupable class and of one group key."""
    first = jobs[0]
    if len(jobs) == 1:
        transform: Any = first.transform
        if first.folded:
            return [transform.compute_state(first.raw, first.advance)]
        return [evaluate(transform, first.raw, first.advance)]
    cls: Any = type(first.transform)
    group = cls.compute_state_group if first.folded else cls.compute_group
    return group([j.transform for j in jobs], [j.raw for j in jobs], [j.advance for j in jobs])
