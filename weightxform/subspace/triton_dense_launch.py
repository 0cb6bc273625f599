"""The ops of a stored basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import FLOAT_DTYPES, opmath
from .reference import Row
from .triton_launch import Call, _check, _spread, ceil, finished, module, on, outputs

WARPS = 4


def _call(tensors: Sequence[Tensor], basis: Tensor, rows: Sequence[int], batch: int, gradients: bool) -> Call:
    _check(bool(tensors) and len(tensors) == len(rows), "tensors and rows must be equally many, at least one")
    dtype, device = tensors[0].dtype, tensors[0].device
    _check(dtype in FLOAT_DTYPES, "tensors must be float64, float32, bfloat16 or float16")
    _check(all(t.dtype == dtype and t.device == device for t in tensors), "tensors must have one dtype and one device")
    ok = basis.dim() == 2 and basis.dtype in FLOAT_DTYPES and basis.device == device and 0 < basis.shape[1] < 2**31
    _check(ok, "basis must be [D, d], of a float dtype, where the tensors are")
    plan = module("plan", device)
    sources = [t if t.is_contiguous() or _spread(t) else t.contiguous() for t in tensors]
    members = []
    for t, source, row in zip(tensors, sources, rows, strict=True):
        if gradients and batch:
            _check(t.dim() > 0 and t.shape[0] == batch, "gradients must have the batch in front")
        count = t.numel() // batch if gradients and batch else t.numel()
        _check(row >= 0 and row + count <= basis.shape[0], "a tensor has more elements than the basis has rows for it")
        members.append(plan.Member(Row(count, row, (0, 0)), 0, count, 1.0, not source.is_contiguous()))
    return Call(
        tuple(members), sources, [], "dense", basis, basis, None, basis.shape[1], max(1, batch), 1, 1, False
    )  # fmt: skip


def forward(z: Tensor, basis: Tensor, theta0: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """``subspace_dense_fwd``."""
    _check(z.ndim in (1, 2), "z must be [d] or [K, d]")
    call = _call(theta0, basis, rows, z.shape[0] if z.ndim == 2 else 0, False)
    fits = z.shape[-1] == call.d and z.dtype == call.compute and z.device == call.device
    _check(fits, "z must have as many coordinates as the basis, where the tensors are, float64 or float32")
    outs = outputs(theta0, z)
    call = call._replace(targets=[out if out.is_contiguous() else out.new_empty(out.shape) for out in outs])
    if call.elements and z.numel():
        with on(call.device):
            kernels = module("dense", call.device)
            table = call.table(kernels.ROWS.value)
            kernels.forward[(table.work.programs, call.K)](
                table.table, call.pointers(), z.contiguous(), basis.contiguous(), table.work.at, table.rows, call.d,
                **call.types, num_warps=WARPS,
            )  # fmt: skip
    return [out if out is t else out.copy_(t) for out, t in zip(outs, call.targets, strict=True)]


def backward(grads: Sequence[Tensor], basis: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    """``subspace_dense_bwd``."""
    call = _call(grads, basis, rows, batch, True)
    lead = (batch,) if batch else ()
    z_bar = torch.zeros((*lead, call.d), dtype=opmath(call.dtype), device=call.device)
    if call.elements:
        with on(call.device):
            kernels, plan = module("dense", call.device), module("plan", call.device)
            table = call.table(kernels.SPAN.value)
            work = table.work.programs
            each = ceil(work, plan.accumulators(work, call.K * call.d, call.K * call.elements))
            groups = ceil(work, each)
            acc = z_bar.new_empty((groups, call.K, call.d))
            kernels.backward[(ceil(call.d, kernels.ACROSS.value), call.K, groups)](
                table.table, call.pointers(), basis.contiguous(), acc, table.work.at, table.rows, work, each, call.d,
                **call.types, num_warps=WARPS,
            )  # fmt: skip
            finished(call, table, acc, None, z_bar, 0, 1)
    return z_bar
