"""Tables of integers on the device that Triton kernels read, kept from call to call.

A table of what a list of tensors is (shapes, cuts) is uploaded once and used by every call with the same shapes; what
changes from call to call (addresses) is in a second, small one. A captured CUDA graph reads both when it is replayed,
long after the capture:

- a table that was used under capture is never given up. One that is missing then cannot be made, because a copy from
  the host would be repeated from memory that may be gone: an error asks for one run before the capture.
- the addresses are written under capture by kernels that take them by value, into memory of the graph. The graph
  repeats them and needs nothing else.
"""

from __future__ import annotations

import importlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._torch import capturing_cuda_graph

KEPT = 128  # tables of each sort


def ceil(x: int, y: int) -> int:
    return -(-x // y)


def bits_of(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


class Kept:
    """The tables that were used last; those that are held stay for good."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: OrderedDict[tuple, Any] = OrderedDict()

    def get(self, key: tuple) -> Any:
        found = self.entries.get(key)
        if found is not None:
            self.entries.move_to_end(key)
        return found

    def put(self, key: tuple, value: Any) -> None:
        self.entries[key] = value
        loose = [k for k, v in self.entries.items() if not getattr(v, "held", False)]
        for k in loose[: max(0, len(loose) - self.limit)]:
            del self.entries[k]


plans, addresses = Kept(KEPT), Kept(KEPT)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and capturing_cuda_graph()


def plan_for(owner: str, key: tuple, device: torch.device, build: Callable[[], Any]) -> Any:
    """The plan that ``build`` makes for ``key``, with its ``table`` (what ``finish()`` gives) on ``device``.

    Raises:
        RuntimeError: it does not exist, and a CUDA graph is being captured.
    """
    plan, captured = plans.get((owner, device, *key)), capturing(device)
    if plan is None:
        if captured:
            raise RuntimeError(
                f"{owner}: a CUDA graph is being captured, and the Triton kernels have not seen tensors of these "
                "shapes: run the same code once before the capture"
            )
        plan = build()
        plan.table = plan.finish().to(device)  # waits until it is there: from then on any stream may read it
        plans.put((owner, device, *key), plan)
        write_by_value([0], device)  # a capture must find that kernel loaded
    plan.held = plan.held or captured
    if device.type == "cuda" and not captured:
        plan.table.record_stream(torch.cuda.current_stream(device))
    return plan


def address_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of addresses on ``device``: kept from call to call (for one stream), or written into the graph."""
    flat = tuple(x for row in rows for x in row)
    if capturing(device):
        return write_by_value(flat, device)
    if device.type != "cuda":
        return torch.tensor(flat, dtype=torch.int64)
    key = (device, torch.cuda.current_stream(device).cuda_stream, flat)
    table = addresses.get(key)
    if table is None:
        host = torch.tensor(flat, dtype=torch.int64).pin_memory()
        table = host.to(device, non_blocking=True)
        addresses.put(key, table)
    return table


def write_by_value(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as int64 on ``device``, passed as the arguments of kernels, 16 at a time."""
    kernels = importlib.import_module(f"{__package__}.kernels")
    table = torch.empty(ceil(len(values), 16) * 16, dtype=torch.int64, device=device)
    for at in range(0, len(values), 16):
        sixteen = [*values[at : at + 16], *[0] * 16][:16]
        kernels.write[(1,)](table, at, *sixteen, num_warps=1)
    return table


def module(owner: str, name: str, device: torch.device) -> Any:
    """The module ``name`` of kernels, where it can run on ``device``.

    Triton is imported by the first call of a kernel: it takes long, and most processes never need it.
    """
    kernels = importlib.import_module(f"{__package__}.kernels")
    if device.type == "cpu" and not kernels.interpreted():
        raise RuntimeError(
            f"{owner}: Triton has no kernels for CPU tensors; TRITON_INTERPRET=1, set before Python starts, runs them "
            "in its interpreter (slow: for tests)"
        )
    return importlib.import_module(name)


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, and on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def type_of(dtype: torch.dtype) -> Any:
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))
