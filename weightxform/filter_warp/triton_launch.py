"""The ops of filter warps on Triton: arguments and launches. The kernels are in ``triton_kernels.py``.

One launch forward; backward one for dweight, and for da one and the sum of its parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register_triton
from ..triton_common.launch import REGISTERS, check, check_dtypes, check_gradient
from ..triton_common.sums import add_rows
from ..triton_common.tables import ceil, module, on, type_of
from . import op

PROGRAMS = 1024  # of ``gram``, about
LEAST = 16  # blocks of filters that a slice has


def apply_block(size: int) -> dict[str, int]:
    """Filters, columns and terms of a block, where the result has ``size`` columns."""
    n = 16 if size <= 16 else 32 if size <= 32 else 64
    return {"F": 64 if n == 64 else 128, "N": n, "D": 16, "num_warps": 4}


def gram_block(rows: int, columns: int) -> dict[str, int]:
    """Rows, columns and filters of a block of a matrix of that size."""
    n = apply_block(columns)["N"]
    return {"M": 128 if n == 16 and rows > 64 else 64, "N": n, "F": 16, "num_warps": 8 if n == 64 else 4}


def _kernels(device: torch.device) -> Any:
    return module("filter_warp", f"{__package__}.triton_kernels", device)


def _check(weight: Tensor, a: Tensor, out_dtype: torch.dtype | None = None) -> None:
    check("filter_warp", weight.dim() == 3 and a.dim() == 4, "weight must be [E, F, K], a [B, E, K, K]")
    check_dtypes("filter_warp", weight, out_dtype, a=a)
    banks, _, taps = weight.shape
    check("filter_warp", a.shape[1:] == (banks, taps, taps), "a must be [B, E, K, K] for a weight of [E, F, K]")
    check("filter_warp", a.numel() < 2**31, "a must have fewer than 2^31 numbers for the Triton kernels")


def _apply(source: Tensor, a: Tensor, out: Tensor, adjoint: bool) -> None:
    batch, banks, taps, _ = a.shape
    filters = out.shape[1]
    size = taps * (banks if adjoint else batch)
    kernels, block = _kernels(out.device), apply_block(size)
    with on(out.device):
        kernels.apply[(ceil(filters, block["F"]) * ceil(size, block["N"]),)](
            source.contiguous(), a.contiguous(), out, filters, batch, banks, TO=type_of(out.dtype),
            C=type_of(a.dtype), K=taps, ADJOINT=adjoint, **block, **REGISTERS,
        )  # fmt: skip


def forward(weight: Tensor, a: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    """``filter_warp_fwd``."""
    _check(weight, a, out_dtype)
    out = weight.new_empty((a.shape[0], *weight.shape[1:]), dtype=out_dtype or weight.dtype)
    if out.numel():
        _apply(weight, a, out, False)
    return out


def backward(grad: Tensor, weight: Tensor, a: Tensor, need_weight: bool, need_a: bool) -> tuple[Tensor, Tensor]:
    """``filter_warp_bwd``."""
    _check(weight, a)
    (batch, _, taps, _), filters = a.shape, weight.shape[1]
    check_gradient("filter_warp", grad, weight, batch, filters, taps)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    da = a.new_empty(a.shape if need_a else (0,))
    if not grad.numel():
        return dweight.zero_(), da.zero_()
    if need_weight:
        _apply(grad, a, dweight, True)
    if need_a:
        _gram(grad, weight, da)
    return dweight, da


def _gram(grad: Tensor, weight: Tensor, da: Tensor) -> None:
    batch, banks, taps, _ = da.shape
    filters = weight.shape[1]
    kernels, block = _kernels(da.device), gram_block(batch * taps, banks * taps)
    programs = ceil(batch * taps, block["M"]) * ceil(banks * taps, block["N"])
    each = block["F"] * max(LEAST, ceil(ceil(filters, block["F"]), max(1, PROGRAMS // programs)))
    slices = ceil(filters, each)
    acc = da[None] if slices == 1 else da.new_empty((slices, *da.shape))
    with on(da.device):
        kernels.gram[(programs, slices)](
            grad.contiguous(), weight.contiguous(), acc, filters, each, batch, banks, C=type_of(da.dtype), K=taps,
            **block,
        )  # fmt: skip
        if slices > 1:
            add_rows(acc, da)


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.filter_warp_fwd, forward)
    register_triton(op.filter_warp_bwd, backward)
