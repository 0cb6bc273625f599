"""What one training step of a variant allocates and launches."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# They allocate or describe, but compute nothing.
_VIEWS = (
    "view", "_unsafe_view", "t", "transpose", "permute", "movedim", "reshape", "_reshape_alias", "as_strided", "expand",
    "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "unbind", "detach", "alias",
)  # fmt: skip
_NO_WORK = frozenset((*_VIEWS, "empty", "empty_like", "empty_strided", "new_empty"))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += func._schema.name.split("::")[1] not in _NO_WORK
        return func(*args, **(kwargs or {}))


def count_ops(body: Callable[[], object]) -> int:
    """ATen and custom ops that ``body`` calls, views and allocations left out. Blind inside compiled regions."""
    with _Count() as count:
        body()
    return count.ops


def count_kernels(body: Callable[[], object]) -> int:
    """Kernels that ``body`` launches on a CUDA device."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        body()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in prof.events())


def peak_bytes(body: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``body`` held at once, beyond what was there when it began. Sees torch's allocator only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        body()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports each start and stop on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        body()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
