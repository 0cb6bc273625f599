"""The ops of the network over each filter on Triton: arguments and launches. The kernels are in ``triton_kernels.py``.

One launch forward; backward one, and the sums of its parts in up to four.
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
from .reference import ACTIVATIONS

PROGRAMS = 1024  # backward, about


def forward_block(batch: int, taps: int, compute: torch.dtype) -> dict[str, int]:
    """Conditions, filters, hidden units and taps of a block; 64 rows of conditions and filters."""
    b = 1 if batch == 1 else 2 if batch == 2 else 4
    p = 16 if taps <= 16 or compute == torch.float64 else 32
    return {"B": b, "F": 64 // b, "J": 16, "P": p, "num_warps": 4}


def backward_block(taps: int, compute: torch.dtype) -> dict[str, int]:
    """Filters, hidden units and taps of a block: what registers allow."""
    if taps > 16:
        return {"F": 16, "J": 16, "P": 16, "num_warps": 8 if compute == torch.float64 else 4}
    return {"F": 16 if compute == torch.float64 else 32, "J": 32, "P": 16, "num_warps": 8}


def _kernels(device: torch.device) -> Any:
    return module("filter_mlp", f"{__package__}.triton_kernels", device)


def _check(
    weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor | None, activation: str, out_dtype: torch.dtype | None
) -> None:
    check("filter_mlp", activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}")
    check("filter_mlp", weight.dim() == 2 and v.dim() == 2, "weight must be [F, K], v [B, H]")
    check_dtypes("filter_mlp", weight, out_dtype, v=v, w1=w1, w2=w2, **({} if b2 is None else {"b2": b2}))
    taps, hidden = weight.shape[1], v.shape[1]
    fits = w1.shape == (hidden, taps) and w2.shape == (taps, hidden) and (b2 is None or b2.shape == (taps,))
    check("filter_mlp", fits, "w1 must be [H, K], w2 [K, H] and b2 [K] for a weight of [F, K] and v of [B, H]")
    small = max(hidden * taps, v.numel()) < 2**30
    check("filter_mlp", small, "layers of 2^30 numbers are more than the Triton kernels address")


def forward(
    weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, activation: str, residual: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``filter_mlp_fwd``."""
    _check(weight, v, w1, w2, b2, activation, out_dtype)
    (filters, taps), (batch, hidden) = weight.shape, v.shape
    out = weight.new_empty((batch, filters, taps), dtype=out_dtype or weight.dtype)
    if out.numel():
        kernels, block = _kernels(weight.device), forward_block(batch, taps, v.dtype)
        programs = ceil(taps, block["P"]) * ceil(batch, block["B"]) * ceil(filters, block["F"])
        with on(weight.device):
            kernels.forward[(programs,)](
                weight.contiguous(), v.contiguous(), w1.contiguous(), w2.contiguous(), b2.contiguous(), out, filters,
                batch, hidden, TO=type_of(out.dtype), C=type_of(v.dtype), K=taps, ACTIVATION=activation,
                RESIDUAL=residual, **block, **REGISTERS,
            )  # fmt: skip
    return out


def backward(
    grad: Tensor, weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, activation: str, residual: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``filter_mlp_bwd``."""
    _check(weight, v, w1, w2, None, activation, None)
    (filters, taps), (batch, hidden) = weight.shape, v.shape
    check_gradient("filter_mlp", grad, weight, batch, filters, taps)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    dv, dw1, dw2, db2 = (v.new_empty(shape) for shape in (v.shape, w1.shape, w2.shape, (taps,)))
    if not grad.numel():
        return dweight.zero_(), dv.zero_(), dw1.zero_(), dw2.zero_(), db2.zero_()
    block = backward_block(taps, v.dtype)
    units, parts, blocks = max(1, ceil(hidden, block["J"])), ceil(taps, block["P"]), ceil(filters, block["F"])
    each = ceil(blocks, max(1, PROGRAMS // (units * parts)))
    groups = ceil(blocks, each)
    dvs, dlayers = v.new_empty((blocks, *v.shape)), v.new_empty((groups, 2 * hidden * taps + taps))
    dweights = v.new_empty((units, *weight.shape) if need_weight else 1)
    kernels, C = _kernels(weight.device), type_of(v.dtype)
    with on(weight.device):
        kernels.backward[(parts * units * groups,)](
            grad.contiguous(), weight.contiguous(), v.contiguous(), w1.contiguous(), w2.contiguous(), dweights, dvs,
            dlayers, filters, each, batch, hidden, C=C, K=taps, ACTIVATION=activation, RESIDUAL=residual,
            NEED_WEIGHT=need_weight, **block,
        )  # fmt: skip
        columns = kernels.COLUMNS.value
        kernels.finish_layers[(ceil(dlayers.shape[1], columns),)](
            dlayers, dw1, dw2, db2, groups, hidden * taps, taps, C=C
        )
        add_rows(dvs, dv)
        if need_weight:
            add_rows(dweights, dweight)
    return dweight, dv, dw1, dw2, db2


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.filter_mlp_fwd, forward)
    register_triton(op.filter_mlp_bwd, backward)
