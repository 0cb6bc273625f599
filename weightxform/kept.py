"""Kept: tensors that were computed together, and what they were computed from.

A value is served while nothing that it depends on was written: the raw tensor and the tensors of the transform (by
identity, version, address and optimizer steps), no option of the transform was set, train or eval mode, autocast,
inference mode. Grad mode is not among them: a weight is always computed with its graph. The address is that of
``p.data = x`` (an exchange with averaged weights, ``vector_to_parameters``), which moves no version.

One row a weight, one column a fact: a group's facts are read and compared column by column, at a fraction of what as
many objects would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from operator import ne
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import versions
from ._torch import autocast_dtype, capture_of, ordinary
from .evaluate import keeps_graph
from .transform import Repeat, Transform, configured_after

if TYPE_CHECKING:
    from .jobs import Job, Last

Reader = Callable[[], Iterable[Tensor]]  # lists the tensors, besides raw, that a weight depends on

_values: Callable[[Any], Iterable[Any]] = dict.values
_steps = versions._epochs.get
_inference, _any_autocast = torch.is_inference_mode_enabled, torch._C._is_any_autocast_enabled
_WRITTEN = (
    "the computed tensor {name!r} was written in place, or given another .data: no gradient goes through that, and it "
    "would be lost at the next computation. {instead} wx.invalidate(module) forgets the write."
)


class Kept:
    """Values computed in one call, for :class:`Job`s of one mode and device type.

    Attributes:
        values: ``None`` for a row that has none now: it is computed again, or was, elsewhere.
        complete: no value is missing.
        served: whether the value may be served again.
        repeat: computes the value of a single row again.
        last: what a bucket needs to compute several rows again.
        advanced: what the slots had in ``advanced`` when they were computed.
        plain: every tensor in ``states`` has a version and an address.
        since: ``Transform.configured`` when the value of a row was last known to be of the present options.
        tracked: ``dicts`` (of parameters and buffers) have just the tensors that the transforms' readers list.
        shared: all rows depend on the same tensors, besides raw; see ``Transform.shares_state``.
    """

    __slots__ = (
        "advanced", "autocast", "capture", "complete", "configured", "dense", "dicts", "dtypes", "guarded", "ids",
        "inference", "kind", "last", "learned", "learned_steps", "plain", "ptrs", "raws", "readers", "repeat",
        "requires", "served", "shared", "since", "starts", "state_ptrs", "state_versions", "states", "steps", "tracked",
        "training", "transforms", "value_ptrs", "value_versions", "values", "versions",
    )  # fmt: skip

    def __init__(self, jobs: Sequence[Job], values: Sequence[Tensor], kind: str, readers: Sequence[Reader]) -> None:
        self.kind = kind
        self.repeat: Repeat | None = None
        self.last: Last | None = None
        self.advanced = [j.slot.advanced for j in jobs]
        self.raws: list[Any] = [j.raw for j in jobs]
        self.transforms = [j.transform for j in jobs]
        self.served = [j.keeps for j in jobs]
        self.ptrs = [None if r is None else r.data_ptr() for r in self.raws]
        self.dense = [None if r is None else r.is_contiguous() for r in self.raws]
        self.dtypes = [None if r is None else r.dtype for r in self.raws]
        self.requires = [None if r is None else r.requires_grad for r in self.raws]
        self.readers = readers
        self.dicts = [[d for d in (t._parameters, t._buffers) if d] for t in self.transforms]
        states = [tuple(read()) for read in readers]
        held = [tuple(x for d in row for x in d.values() if x is not None) for row in self.dicts]
        self.tracked = all(isinstance(t, Transform) and not t._modules for t in self.transforms) and all(
            set(map(id, state)) == set(map(id, row)) for state, row in zip(states, held, strict=True)
        )
        if self.tracked:
            states = held
        self.shared = all(getattr(t, "shares_state", False) for t in self.transforms)
        self.ids = [*map(id, chain.from_iterable(map(_values, chain(*self.dicts))))]
        self.states = [t for state in states for t in state]  # held, so that their ids stay theirs
        self.starts = [0, *accumulate(map(len, states))]
        self.plain = not any(t.is_inference() or address(t) is None for t in self.states)
        self.learned = [[t for t in state if isinstance(t, nn.Parameter)] for state in states]
        self.guarded = [
            not v.is_inference() and not _aliases(v, (*s, r), t)
            for v, s, r, t in zip(values, states, self.raws, self.transforms, strict=True)
        ]
        self.keep(values)

    def keep(self, values: Sequence[Tensor], stamps: tuple[list[int], list[int]] | None = None) -> None:
        """``values`` were computed just now, from raw tensors of these versions and optimizer steps."""
        self.configured = Transform.configured
        self.since = [self.configured] * len(values)
        self.training = self.transforms[0].training
        self.inference, self.autocast = torch.is_inference_mode_enabled(), autocast_dtype(self.kind)
        self.capture = capture_of(self.kind)  # what a CUDA graph computes is served in its capture, and nothing else is
        self.versions, self.steps = versions.stamps(self.raws) if stamps is None else stamps
        if self.plain:
            self.state_versions: list[Any] = [t._version for t in self.states]
            self.state_ptrs: list[Any] = [t.data_ptr() for t in self.states]
        else:
            self.state_versions = [0 if t.is_inference() else t._version for t in self.states]
            self.state_ptrs = [*map(address, self.states)]
        self.learned_steps = [[_steps(id(t), 0) for t in row] if row else () for row in self.learned]
        self.values: list[Any] = list(values)
        self.complete = True
        self.value_ptrs = [v.data_ptr() for v in values]
        self.value_versions = [v._version if g else None for v, g in zip(values, self.guarded, strict=True)]

    def again(self, values: Sequence[Tensor], stamps: tuple[list[int], list[int]]) -> Kept:
        """The same rows, computed again. Not in place: another thread may be comparing the facts of an old value."""
        kept = object.__new__(Kept)
        for name in _LASTING:
            setattr(kept, name, getattr(self, name))
        kept.raws = list(self.raws)  # each drops its own
        kept.keep(values, stamps)
        return kept

    def serve(self, row: int, raw: Tensor | None, transform: nn.Module, name: str) -> Tensor | None:
        """The value, if nothing was written and no mode changed since. At every read: so in one piece, names bound.

        Raises ``RuntimeError`` if somebody wrote into the value: the write would be lost.
        """
        value = self.values[row]
        if value is None:
            return None
        version = self.value_versions[row]
        if version is not None and (value._version != version or value.data_ptr() != self.value_ptrs[row]):
            raise RuntimeError(written(name, transform))
        if raw is not self.raws[row] or transform is not self.transforms[row]:
            return None
        if raw is not None and (
            raw._version != self.versions[row]
            or _steps(id(raw), 0) != self.steps[row]
            or raw.data_ptr() != self.ptrs[row]
            or raw.is_contiguous() is not self.dense[row]  # raw.data = raw.data.T
            or raw.dtype is not self.dtypes[row]
            or raw.requires_grad is not self.requires[row]
        ):
            return None
        if not self.served[row] or transform.training is not self.training or _inference() is not self.inference:
            return None
        if self.autocast is not None if not _any_autocast() else autocast_dtype(self.kind) is not self.autocast:
            return None
        if Transform.configured != self.since[row] and self._reconfigured(row):
            return None
        states, versions, ptrs, plain = self.states, self.state_versions, self.state_ptrs, self.plain
        k, end = self.starts[row], self.starts[row + 1]
        # Their identity too: functional_call puts in other tensors, and nothing counts that.
        for tensors in map(_values, self.dicts[row]) if self.tracked else (self.readers[row](),):
            for t in tensors:
                if t is None:
                    continue
                if k == end or t is not states[k]:
                    return None
                if plain:
                    if t._version != versions[k] or t.data_ptr() != ptrs[k]:
                        return None
                elif address(t) != ptrs[k] or (not t.is_inference() and t._version != versions[k]):
                    return None
                k += 1
        learned = self.learned[row]
        if k != end or (learned and [_steps(id(t), 0) for t in learned] != self.learned_steps[row]):
            return None
        return value if ordinary() and capture_of(self.kind) == self.capture else None

    def _reconfigured(self, row: int) -> bool:
        """Whether an option of the transform was set, and not of another one."""
        now = Transform.configured
        if configured_after(self.transforms[row], self.since[row]):
            return True
        self.since[row] = now
        return False

    def _same_modes(self) -> bool:
        if _inference() is not self.inference:
            return False
        return autocast_dtype(self.kind) is self.autocast if _any_autocast() else self.autocast is None

    def check_untouched(self, row: int, name: str) -> None:
        """The check of :meth:`serve` alone."""
        value, version = self.values[row], self.value_versions[row]
        if value is None or version is None:
            return
        if value._version != version or value.data_ptr() != self.value_ptrs[row]:
            raise RuntimeError(written(name, self.transforms[row]))

    def drop(self, row: int) -> None:
        """Forget a value, whose memory may serve the next one, and its raw tensor (``swap_tensors`` wants that)."""
        self.values[row] = self.raws[row] = self.repeat = self.last = None
        self.complete = False

    def release(self) -> None:
        """What computes the values again holds tensors where ``swap_tensors`` does not want them: no more."""
        for repeat in (self.repeat, self.last and self.last.repeat):
            release = getattr(getattr(repeat, "__self__", None), "release", None)
            if release is not None:
                release()

    def drop_all(self) -> None:
        self.values = [None] * len(self.raws)
        self.complete = False

    def only_raws_written(self) -> tuple[list[int], list[int]] | None:
        """Their versions and steps, if every raw tensor was written and nothing else happened.

        Only for rows that are all served, have a raw tensor each and transforms of the class :class:`Transform`.
        """
        raws, values = self.raws, self.values
        if not self.complete or not self.tracked or Transform.configured != self.configured:
            return None
        now = seen, steps = versions.stamps(raws)
        unchanged = (
            (all(map(ne, seen, self.versions)) or all(map(ne, steps, self.steps)))
            and self._same_tensors(raws, values)
            and [*map(id, chain.from_iterable(map(_values, chain(*self.dicts))))] == self.ids
        )
        return now if unchanged else None

    def _same_tensors(self, raws: list[Any], values: list[Any]) -> bool:
        """Whether these are where they were, nobody wrote a value, and no mode changed."""
        return (
            [r.data_ptr() for r in raws] == self.ptrs
            and [r.is_contiguous() for r in raws] == self.dense
            and [r.dtype for r in raws] == self.dtypes
            and [r.requires_grad for r in raws] == self.requires
            and [v._version if g else None for v, g in zip(values, self.guarded, strict=True)] == self.value_versions
            and [v.data_ptr() for v in values] == self.value_ptrs
            and self._same_modes()
            and capture_of(self.kind) == self.capture
        )

    def shared_state_written(self) -> tuple[list[int], list[int]] | None:
        """Versions and steps of the raw tensors, if what all rows depend on was written, so that all are stale.

        The raw tensors may have been written as well. ``None`` where it was not, or something else happened.
        """
        if not self.complete or not self.shared or Transform.configured != self.configured:
            return None
        states, k = tuple(self.readers[0]()), self.starts[1]
        if len(states) != k or any(a is not b for a, b in zip(states, self.states[:k], strict=True)) or not self.plain:
            return None
        learned = [_steps(id(t), 0) for t in self.learned[0]]
        if [t._version for t in states] == self.state_versions[:k] and learned == [*self.learned_steps[0]]:
            return None
        return versions.stamps(self.raws) if self._same_tensors(self.raws, self.values) else None


_LASTING = (
    "advanced", "dense", "dicts", "dtypes", "guarded", "ids", "kind", "last", "learned", "plain", "ptrs", "readers",
    "repeat", "requires", "served", "shared", "starts", "states", "tracked", "transforms",
)  # fmt: skip


def address(tensor: Tensor) -> int | None:
    """Where it lies; ``None`` for one that lies nowhere (sparse, wrapped, fake)."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def written(name: str, transform: nn.Module) -> str:
    """What to say of a computed tensor that somebody wrote: it would be lost."""
    instead = transform.instead_of_writing if isinstance(transform, Transform) else Transform.instead_of_writing
    return _WRITTEN.format(name=name, instead=instead.format(name=name))


def _aliases(out: Tensor, inputs: Iterable[Tensor | None], transform: nn.Module) -> bool:
    """Whether a write to an input is a write to ``out``: a transform in plain torch may return a view."""
    if keeps_graph(transform):
        return False
    storage = out.untyped_storage()._cdata
    return any(t is not None and t.untyped_storage()._cdata == storage for t in inputs)
