"""Slot: when a computed weight is computed again, and when its state advances.

One entry a slot. An entry is served while nothing that the weight depends on was written: the raw tensor and the
tensors of the transform (by identity, version, address and optimizer steps), train or eval mode, autocast, inference
mode. Grad mode is not among them: a weight is always computed with its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import versions
from ._torch import (
    autocast_dtype,
    capturing_cuda_graph,
    distributed,
    freezing_trace,
    in_backward,
    is_dtensor,
    saved_tensor_hooks_active,
    special_mode,
)
from .evaluate import caches, evaluate, keeps_graph, reset, state_reader
from .retained import retained
from .transform import Transform

if TYPE_CHECKING:
    from .grouping import Bucket

_steps = versions._epochs.get


class Entry:
    """A computed weight, and what it was computed from."""

    __slots__ = (
        "key", "kind", "out", "out_ptr", "out_version", "raw", "raw_steps", "raw_version", "served", "state",
        "state_of", "transform",
    )  # fmt: skip

    def __init__(self, job: Job, out: Tensor, kind: str, state_of: Callable[[], Iterable[Tensor]]) -> None:
        self.raw = job.raw
        self.transform = job.transform
        self.kind = kind
        self.state_of = state_of
        self.state = tuple(state_of())  # held, so that their ids stay theirs
        self.served = job.keeps
        if job.raw is not None:
            self.raw_version, self.raw_steps = job.raw._version, _steps(id(job.raw), 0)
        self.key = self.now() if job.keeps else None
        self.out = out
        self.out_ptr = out.data_ptr()
        watched = not out.is_inference() and not _aliases(out, (*self.state, job.raw), job.transform)
        self.out_version = out._version if watched else None

    def now(self) -> list[Any]:
        """Equal to ``key`` while nothing was written and no mode changed."""
        raw, kind = self.raw, self.kind
        key: list[Any] = [
            self.transform.training,
            torch.is_inference_mode_enabled(),
            autocast_dtype(kind),
        ]
        if raw is not None:
            key += raw._version, _steps(id(raw), 0), raw.data_ptr(), raw.dtype, raw.requires_grad
        for t in self.state_of():
            key += id(t), 0 if t.is_inference() else t._version, _steps(id(t), 0)
        return key

    def is_current(self) -> bool:
        raw = self.raw
        if raw is not None and (raw._version != self.raw_version or _steps(id(raw), 0) != self.raw_steps):
            return False  # the usual reason, and the cheapest to see
        return self.served and self.key == self.now() and not (self.kind == "cuda" and capturing_cuda_graph())

    def check_untouched(self, name: str) -> None:
        """Raise if somebody wrote into the computed tensor: the write would be lost."""
        out = self.out
        if self.out_version is not None and (out._version != self.out_version or out.data_ptr() != self.out_ptr):
            raise RuntimeError(
                f"the computed tensor {name!r} was written in place; the write would be lost at its next computation. "
                f"Write wx.raw(module, {name!r}), use wx.assign(module, {name!r}, value), layer.reset_parameters() or "
                "model.apply(init_fn); wx.invalidate(module) forgets the write."
            )


def _aliases(out: Tensor, inputs: Iterable[Tensor | None], transform: nn.Module) -> bool:
    """Whether a write to an input is a write to ``out``: a transform in plain torch may return a view."""
    if keeps_graph(transform):
        return False
    storage = out.untyped_storage()._cdata
    return any(t is not None and t.untyped_storage()._cdata == storage for t in inputs)


class Job(NamedTuple):
    """One weight to be computed."""

    slot: Slot
    module: nn.Module
    name: str
    raw: Tensor | None
    transform: nn.Module
    advance: bool
    keeps: bool  # whether the computed tensor may be served again
    stamp: tuple | None  # of the raw tensor


class Slot:
    """What a computed weight keeps beside its raw tensor and its transform. Tied modules share one.

    Attributes:
        entry: the last computed tensor.
        advanced: stamp of the raw tensor at the last step of the state; one step is made per stamp.
        managed: FSDP2 puts other tensors in the raw tensor's place and writes to them behind version counters; nothing
            is kept then, and the state takes one step a forward.
        pending: the raw tensor was replaced: ``"eval"``, make the state fit unless it is about to advance (as in torch,
            one step then); ``"always"``, make it fit.
        owner: the transform has no raw tensor and owns its parameters.
        always_caches: read several times a forward, whatever ``cache`` says.
        users: how many modules it serves.
    """

    def __init__(self, owner: bool = False, always_caches: bool = False) -> None:
        self.owner = owner
        self.always_caches = always_caches
        self.users = 1
        self.managed = False
        self.captured = False
        self.pending: str | None = None
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.entry: Entry | None = None
        self.reader: tuple[nn.Module, Callable[[], Iterable[Tensor]]] | None = None  # of the state of a transform
        self.advanced: tuple | None = None
        self.shared: tuple[int, bool] | None = None  # whether the raw tensor at this address is in shared memory
        self.home: weakref.ref[Tensor] | None = None
        self.bucket: Bucket | None = None
        self.index = 0  # in the bucket
        self.compiled: nn.Module | None = None
        self.forwards = 0
        self.hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.in_forward = False  # of a module that reads the weight several times, under torch.compile
        self.traced_value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = "owner", "always_caches", "users", "managed", "captured", "pending"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_everything()

    # what the module tells

    def forget(self) -> None:
        """Drop the computed tensor, and every reference to the raw one (``swap_tensors`` wants none)."""
        self.entry = self.home = self.shared = None

    def settle_in(self, raw: Tensor | None) -> None:
        """``raw`` is the raw tensor by the user's will; another that shows up later was put there by FSDP2."""
        if raw is not None:
            if is_dtensor(raw):
                self.managed = True
            self.home = weakref.ref(raw)

    def renew(self, transform: nn.Module, raw: Tensor | None) -> None:
        """Make the state fit ``raw``: now, or where only a shard is there, when the whole is."""
        self.entry = None
        if is_dtensor(raw):
            self.pending = "always"
        else:
            reset(transform, raw)
            self.pending = None

    # reading

    def read(self, module: nn.Module, name: str, child: str) -> Tensor | None:
        """The computed weight. ``child``: the name of the transform in ``module``."""
        raw = module._parameters.get(name)
        transform = module._modules[child]
        assert transform is not None
        if torch.compiler.is_compiling():
            return self._traced(module, name, raw, transform)
        entry = self.entry
        if entry is not None:
            entry.check_untouched(name)
            if (
                entry.raw is raw
                and entry.transform is transform
                and entry.is_current()
                and not special_mode()
                and not freezing_trace()
                and "_is_replica" not in module.__dict__
            ):
                return entry.out
        return self._miss(module, name, raw, transform)

    def _traced(self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module) -> Tensor | None:
        """Under ``torch.compile`` and ``torch.export``: part of the graph, computed and advanced at every read."""
        if raw is None and not self.owner:
            return None
        if not torch.compiler.is_exporting():
            if self.bucket is not None and self.bucket.group.is_open:
                return self.bucket.traced(self)
            if transform.training:
                # A compiled part of an eager model: the others of the bucket must not advance it as well. Inside an
                # activation checkpoint Dynamo refuses this write (of something that is no constant), and so does not
                # recompute the weight from the state that the forward left behind.
                self.compiled = transform
        if self.in_forward:
            if self.traced_value is None:
                self.traced_value = evaluate(transform, raw, transform.training)
            return self.traced_value
        return evaluate(transform, raw, transform.training)

    def _miss(self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module) -> Tensor | None:
        if "_is_replica" in module.__dict__:
            raw = module.__dict__["_former_parameters"].get(name)
            return evaluate(transform, raw, transform.training and not in_backward())
        if raw is None and not self.owner:
            return None
        if raw is not None and type(raw) is not nn.Parameter:
            if is_lazy(raw):
                raise RuntimeError(f"{name!r} is not initialized: run one forward before it is computed")
            if is_dtensor(raw) and not getattr(transform, "tensor_parallel", False):
                self._watch_forwards(module)
                return raw  # FSDP2 asks for it while it is sharded
        if special_mode():
            return evaluate(transform, raw, transform.training and not in_backward())
        if freezing_trace():
            raise RuntimeError(
                f"the computed {name!r} would become a constant of the trace: wx.bake(model) first, or torch.export"
            )
        self._notice_fsdp(module, raw)
        job = self.job(module, name, raw, transform)
        jobs = [job] if self.bucket is None or not job.keeps else self.bucket.jobs(job)
        outs = compute(jobs)
        return outs[jobs.index(job)] if len(jobs) > 1 else outs[0]

    def job(self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module) -> Job:
        stamp = None if raw is None else (id(raw), versions.stamp(raw), raw.data_ptr(), self.forwards)
        caching = self.always_caches or caches(transform)
        advance = self._advances(stamp, transform, caching)
        return Job(self, module, name, raw, transform, advance, caching and self._keeps(raw), stamp)

    def _keeps(self, raw: Tensor | None) -> bool:
        if self.managed or self.captured:
            return False
        if raw is None:
            return True
        if raw is not self._home():  # functional_call: whoever handed it in may write it unseen
            return False
        return not (raw.is_inference() or raw.grad_fn is not None or self._is_shared(raw))

    def _is_shared(self, raw: Tensor) -> bool:
        """Whether another process may write it."""
        address = raw.data_ptr()
        if self.shared is None or self.shared[0] != address:
            self.shared = address, raw.is_cpu and raw.is_shared()
        return self.shared[1]

    def _home(self) -> Tensor | None:
        return None if self.home is None else self.home()

    def _advances(self, stamp: tuple | None, transform: nn.Module, caching: bool) -> bool:
        if not transform.training or in_backward():
            return False
        if self.captured or not caching or (self.managed and not self.forwards):
            return True
        return self.advanced is None or self.advanced != stamp

    def store(self, job: Job, out: Tensor) -> None:
        raw = job.raw
        kind = "cpu" if raw is None and not out.is_cuda else out.device.type
        if kind == "cuda" and capturing_cuda_graph():
            self.captured = True  # replays write the raw tensor, and no counter moves
        if job.advance:
            self.advanced = job.stamp
        if self.managed or self.captured or (raw is not None and (raw.is_inference() or raw.grad_fn is not None)):
            self.entry = None
        else:
            self.entry = Entry(job, out, kind, self._state_of(job.transform))

    def _state_of(self, transform: nn.Module) -> Callable[[], Iterable[Tensor]]:
        if self.reader is None or self.reader[0] is not transform or not isinstance(transform, Transform):
            self.reader = transform, state_reader(transform)
        return self.reader[1]

    # FSDP2

    def _notice_fsdp(self, module: nn.Module, raw: Tensor | None) -> None:
        if raw is None:
            return
        if self.home is None:
            self.settle_in(raw)
        elif not self.managed and self._home() is not raw and distributed():
            self.managed = True
        if self.managed:
            self._watch_forwards(module)

    def _watch_forwards(self, module: nn.Module) -> None:
        self.managed = True
        self.entry = None
        if module not in self.hooked:
            self.hooked.add(module)
            module.register_forward_pre_hook(_forward_begins)


def _forward_begins(module: nn.Module, args: object) -> None:
    for name, slot in module.__dict__["_wx"].items():
        if is_dtensor(module._parameters.get(name)):
            raise RuntimeError(
                f"{type(module).__name__}.{name} is a DTensor in forward (tensor parallelism), and its transform "
                "computes on plain tensors"
            )
        slot.forwards += 1


def compute(jobs: Sequence[Job]) -> list[Tensor]:
    """Compute the weights (several of one groupable class in one call) and put them in their slots."""
    for job in jobs:
        _prepare(job)
    with torch.enable_grad():  # whatever the grad mode: one entry serves reads under no_grad and others
        if saved_tensor_hooks_active():
            # Hidden from an enclosing activation checkpoint: it counts the tensors that are saved, and in its
            # recomputation the weight is a cache hit.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                outs = _with_lasting_graphs(jobs)
        else:
            outs = _with_lasting_graphs(jobs)
    for job, out in zip(jobs, outs, strict=True):
        job.slot.store(job, out)
    return outs


def _same(x: Any) -> Any:
    return x


def _prepare(job: Job) -> None:
    slot, raw, transform = job.slot, job.raw, job.transform
    if raw is not None:
        versions.watch(raw)
    if slot.entry is not None:
        slot.entry.check_untouched(job.name)
    if slot.reader is None or slot.reader[0] is not transform:
        for parameter in transform.parameters():
            versions.watch(parameter)
    if slot.pending is not None:
        if slot.pending == "always" or not job.advance:
            reset(transform, raw)
        slot.pending = None
    slot.entry = None  # its memory may serve the new one


def _with_lasting_graphs(jobs: Sequence[Job]) -> list[Tensor]:
    outs = together(jobs)
    for i, job in enumerate(jobs):
        if not isinstance(outs[i], Tensor):
            kind, got = type(job.transform).__name__, type(outs[i]).__name__
            raise TypeError(f"{kind}: the weight must be a Tensor, got {got}")
        if not keeps_graph(job.transform):
            outs[i] = retained(outs[i], job.raw)
    return outs


def together(jobs: Sequence[Job]) -> list[Tensor]:
    """The weights alone; several must be of one groupable class and of one group key."""
    if len(jobs) == 1:
        job = jobs[0]
        return [evaluate(job.transform, job.raw, job.advance)]
    group: Callable = type(jobs[0].transform).compute_group  # type: ignore[attr-defined]
    return group([j.transform for j in jobs], [j.raw for j in jobs], [j.advance for j in jobs])
