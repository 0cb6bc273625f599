"""Has this tensor been written? Version counters, and the writes that they do not see.

``Tensor._version`` misses the fused optimizers (and any kernel that writes through a raw pointer). Every optimizer's
``step`` therefore bumps an *epoch* of the parameters it owns; :func:`invalidate` does so by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_epochs: dict[int, int] = {}  # id(tensor) -> writes that no version counter saw; only ids that were watched


def watch(tensor: Tensor) -> None:
    """From now on count the optimizer steps over ``tensor``. A reused id only costs a recomputation."""
    _epochs.setdefault(id(tensor), 0)


def bump(tensors: Iterable[Tensor]) -> None:
    """Tell every cache and every backward that depends on ``tensors`` that they were written."""
    for tensor in tensors:
        key = id(tensor)
        if key in _epochs:
            _epochs[key] += 1


def _after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    if _epochs:
        bump(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_step)


def stamp(tensor: Tensor) -> tuple[int, int]:
    """(version, epoch): equal stamps of one tensor object mean that nobody wrote to it in between."""
    return (0 if tensor.is_inference() else tensor._version, _epochs.get(id(tensor), 0))


def stamps(tensors: Iterable[Any]) -> tuple[list[int], list[int]]:
    """The versions and the optimizer steps of :func:`stamp`, in columns; ``None`` for no tensor counts as unwritten."""
    tensors = list(tensors)
    epochs = _epochs.get
    try:
        seen = [t._version for t in tensors]
    except (AttributeError, RuntimeError):  # none, or an inference tensor, which has no version
        seen = [0 if t is None or t.is_inference() else t._version for t in tensors]
    return seen, [epochs(id(t), 0) for t in tensors]


class Unchanged:
    """Holds tensors that a backward pass will read again, and raises if they were written meanwhile."""

    __slots__ = ("steps", "tensors", "versions", "what")

    def __init__(self, what: str, tensors: Iterable[Tensor], known: tuple[list[int], list[int]] | None = None) -> None:
        """``known``: the :func:`stamps` of the tensors, where they were read already."""
        self.what = what
        self.tensors = list(tensors)
        self.versions, self.steps = stamps(self.tensors) if known is None else known

    def check(self, which: Iterable[int] | None = None) -> None:
        """Raise if one of the tensors (of these, by position) was written."""
        versions, steps = stamps(self.tensors)
        if versions == self.versions and steps == self.steps:
            return
        for i in range(len(self.tensors)) if which is None else which:
            before, now = (self.versions[i], self.steps[i]), (versions[i], steps[i])
            if now != before:
                shape = tuple(self.tensors[i].shape)
                raise RuntimeError(
                    f"{self.what}: a tensor of shape {shape} that its backward needs was written between forward and "
                    f"backward ((version, optimizer steps) {before} then, {now} now). "
                    "Call backward before the write, or compute the weight again after it."
                )
