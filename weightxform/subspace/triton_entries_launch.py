"""The launches of rademacher and gaussian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_launch import REGISTERS, Call, ceil, finished, module


def warps(together: int, compute: torch.dtype) -> int:
    """For ``together`` members of a batch: as many as leave each thread enough registers."""
    return 4 if together == 1 and compute == torch.float32 else 8


def _options(call: Call, like: Tensor, most: int) -> tuple[Tensor, dict[str, Any]]:
    step, redrawn = call.redrawn(like)
    together = 1 if call.K == 1 else most  # of the batch: as many as their sums find registers
    return step, dict(
        call.types, SIGNS=call.kind == "rademacher", KB=together, num_warps=warps(together, call.compute),
        **REGISTERS,
        enable_fp_fusion=False, **redrawn,
    )  # fmt: skip


def forward(call: Call, z: Tensor, c: Tensor | None) -> None:
    kernels = module("entries", call.device)
    z = z if c is None else z * c
    table = call.table(kernels.CHUNK.value // 4)
    step, options = _options(call, z, 4)
    kernels.forward[(table.work.programs, ceil(call.K, options["KB"]))](
        table.table, call.pointers(), z, step, table.work.at, table.rows, call.K, call.d, ALIGNED=call.aligned(),
        **options,
    )  # fmt: skip


def backward(call: Call, c: Tensor | None, z_bar: Tensor) -> None:
    kernels, plan = module("entries", call.device), module("plan", call.device)
    table = call.table(kernels.CHUNK.value)
    work = table.work.programs
    each = ceil(work, plan.accumulators(work, call.K * call.d, call.K * call.elements))
    programs = ceil(work, each)
    acc = z_bar.new_empty((programs, call.K, call.d), dtype=torch.float64)
    step, options = _options(call, z_bar, 1 if call.kind == "rademacher" else 2)
    kernels.backward[(ceil(call.d, kernels.COLUMNS.value), programs, ceil(call.K, options["KB"]))](
        table.table, call.pointers(), acc, step, table.work.at, work, table.rows, each, call.K, call.d, **options
    )
    finished(call, table, acc, c, z_bar, 0, 1)
