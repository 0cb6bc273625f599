"""Slot: when a computed weight is computed again, and when its state advances. ``kept.py`` says how long it serves."""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import versions
from ._torch import (
    capture_of,
    distributed,
    freezing_trace,
    in_backward,
    is_dtensor,
    special_mode,
)
from .evaluate import caches, evaluate, reset, state_reader
from .jobs import Job, Place, compute, in_its_context
from .kept import Kept, Reader
from .transform import Transform

if TYPE_CHECKING:
    from .bucket import Bucket


_computing = threading.RLock()  # one thread at a time: a state takes one step, and a group changes many slots


def _after_fork() -> None:
    global _computing
    _computing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Slot:
    """What a computed weight keeps beside its raw tensor and its transform. Tied modules share one.

    Attributes:
        weight: the last computed tensor.
        state: the last that a folded layer took in its place.
        folds: the module took the state, and not the weight, when it was last called.
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
        self.folds = False
        self.pending: str | None = None
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.weight = Place()
        self.state = Place()
        self.reader: tuple[nn.Module, Reader] | None = None  # of the state of a transform
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
        kept = "owner", "always_caches", "users", "managed", "captured", "folds", "pending"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_everything()

    # what the module tells

    def forget(self) -> None:
        """Drop the values, and every reference to the raw tensor (``swap_tensors`` wants none)."""
        self.home = self.shared = None
        for place in (self.weight, self.state):
            if place.kept is not None:
                place.kept.release()
        self.empty()

    def empty(self) -> None:
        for place in (self.weight, self.state):
            place.empty()

    def settle_in(self, raw: Tensor | None) -> None:
        """``raw`` is the raw tensor by the user's will; another that shows up later was put there by FSDP2."""
        if raw is not None:
            if is_dtensor(raw):
                self.managed = True
            self.home = weakref.ref(raw)

    def renew(self, transform: nn.Module, raw: Tensor | None) -> None:
        """Make the state fit ``raw``: now, or where only a shard is there, when the whole is."""
        self.empty()
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
        place = self.weight
        if place.kept is not None:
            value = place.kept.serve(place.row, raw, transform, name)
            if value is not None and "_is_replica" not in module.__dict__:
                return value
        return self._miss(module, name, raw, transform)

    def folded(self, module: nn.Module, name: str, child: str) -> Tensor | None:
        """What a folded layer needs in the place of the weight, or ``None`` where it has to read the weight.

        Computed, kept and advanced as the weight is: a read of either does it for both.
        """
        raw, transform = module._parameters.get(name), module._modules[child]
        if raw is None or not isinstance(transform, Transform) or not transform.foldable:
            return None
        if type(raw) is not nn.Parameter and (is_lazy(raw) or is_dtensor(raw)):
            return None
        if torch.compiler.is_compiling():
            return self._traced(module, name, raw, transform, folded=True)
        self.folds = True
        place = self.state
        if place.kept is not None:
            value = place.kept.serve(place.row, raw, transform, name)
            if value is not None and "_is_replica" not in module.__dict__:
                return value
        if freezing_trace() or "_is_replica" in module.__dict__:
            return None
        if special_mode():
            return transform.compute_state(raw, transform.training and not in_backward())
        return self._compute(module, name, raw, transform, folded=True)

    def _traced(
        self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module, folded: bool = False
    ) -> Tensor | None:
        """Under ``torch.compile`` and ``torch.export``: part of the graph, computed and advanced at every read."""
        if raw is None and not self.owner:
            return None
        if not folded and is_folded(module, transform):  # somebody reads the weight; its forward is what advances
            return evaluate(transform, raw, False)
        if not torch.compiler.is_exporting():
            if self.bucket is not None and self.bucket.group.is_open:
                return self.bucket.traced(self, folded)
            if transform.training:
                # A compiled part of an eager model: the others of the bucket must not advance it as well. Inside an
                # activation checkpoint Dynamo refuses this write (of something that is no constant), and so does not
                # recompute the weight from the state that the forward left behind.
                self.compiled = transform
        if folded:
            return transform.compute_state(raw, transform.training)  # type: ignore[operator]
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
        return self._compute(module, name, raw, transform)

    def _compute(
        self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module, folded: bool = False
    ) -> Tensor:
        if _computing.acquire(blocking=False):
            served = None
        else:  # another thread computes, perhaps this one
            _computing.acquire()
            served = (self.state if folded else self.weight).serve(raw, transform, name)
        try:
            return self._compute_alone(module, name, raw, transform, folded) if served is None else served
        finally:
            _computing.release()

    def _compute_alone(
        self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module, folded: bool
    ) -> Tensor:
        self._notice_fsdp(module, raw)
        place = self.state if folded else self.weight
        again = self._again(place, raw, transform) if self.bucket is None else self.bucket.again(place)
        if again is not None:
            return again
        if self.bucket is None:
            return compute([self.job(module, name, raw, transform, folded)])[0]
        job = self.job(module, name, raw, transform, folded)
        jobs = self.bucket.jobs(job) if job.keeps and not in_backward() else [job]  # where the others could not advance
        value = compute(jobs)[jobs.index(job)]
        self.bucket.remember(jobs)
        return value

    def _again(self, place: Place, raw: Tensor | None, transform: nn.Module) -> Tensor | None:
        """The weight as it was computed the last time, if nothing but the value of raw changed; else ``None``."""
        kept = place.kept
        if kept is None or kept.repeat is None or raw is not kept.raws[0] or transform is not kept.transforms[0]:
            return None
        if (
            self.pending is not None
            or self.compiled is not None
            or self.advanced is not kept.advanced[0]
            or in_backward()
        ):
            return None
        stamps = kept.only_raws_written()
        if stamps is None:
            return None
        kept.drop_all()
        values = in_its_context(partial(kept.repeat, stamps))
        if values is None:
            return None
        place.kept = kept = kept.again(values, stamps)
        kept.advanced = [self.advanced_with(kept, 0)]
        return values[0]

    def advanced_with(self, kept: Kept, row: int) -> tuple:
        """The state took its step for the value of the raw tensor that is in ``kept``."""
        stamp = kept.versions[row], kept.steps[row]
        self.advanced = id(kept.raws[row]), stamp, kept.ptrs[row], self.forwards, kept.capture
        return self.advanced

    def job(self, module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module, folded: bool) -> Job:
        capture = 0 if raw is None else capture_of(raw.device.type)
        stamp = None if raw is None else (id(raw), versions.stamp(raw), raw.data_ptr(), self.forwards, capture)
        caching = self.always_caches or caches(transform)
        advance = self._advances(stamp, transform, caching, capture)
        return Job(self, module, name, raw, transform, folded, advance, caching and self._keeps(raw, capture), stamp)

    def _keeps(self, raw: Tensor | None, capture: int) -> bool:
        if self.managed or (self.captured and not capture):
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

    def _advances(self, stamp: tuple | None, transform: nn.Module, caching: bool, capture: int) -> bool:
        if not transform.training or in_backward():
            return False
        if (self.captured and not capture) or not caching or (self.managed and not self.forwards):
            return True
        return self.advanced is None or self.advanced != stamp

    def computed(self, job: Job, capturing: bool) -> bool:
        """Note that ``job`` was done; whether its value can be kept."""
        raw = job.raw
        if capturing:
            self.captured = True  # replays write the raw tensor, and no counter moves: kept for the rest of the capture
        if job.advance:
            self.advanced = job.stamp
        forgets = self.managed or (self.captured and not capturing)
        return not (forgets or (raw is not None and (raw.is_inference() or raw.grad_fn is not None)))

    def state_of(self, transform: nn.Module) -> Reader:
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
        self.empty()
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


def is_folded(module: nn.Module, transform: nn.Module) -> bool:
    """Whether ``module`` is a layer of ``wx.nn`` that can take a state in the place of its weight."""
    return hasattr(module, "__wx_plain__") and isinstance(transform, Transform) and transform.foldable
