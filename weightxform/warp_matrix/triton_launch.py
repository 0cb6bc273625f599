"""The ops of warp matrices on Triton: arguments and launches, one each. The kernels are in ``triton_kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register_triton
from ..triton_common.launch import check
from ..triton_common.tables import bits_of, ceil, module, on, type_of
from . import op
from .reference import INTERPOLATIONS, KINDS, PADDINGS


def block(taps: int) -> dict[str, int]:
    """Columns of a block."""
    return {"Q": 16, "num_warps": 2} if taps <= 16 else {"Q": 64, "num_warps": 8}


def _check(ok: bool, what: str) -> None:
    check("warp_matrix", ok, what)


def _call(params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str, padding: str):
    """(the kernels, their numbers, their constants)."""
    _check(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check(interpolation in INTERPOLATIONS, f"interpolation must be one of {', '.join(INTERPOLATIONS)}")
    _check(padding in PADDINGS, f"padding must be one of {', '.join(PADDINGS)}")
    _check(params.dtype in (torch.float32, torch.float64), "params must be float32 or float64")
    _check(params.dim() == 2 and params.shape[1] == KINDS[kind], f"params must be [B, {KINDS[kind]}] for {kind}")
    _check(height > 0 and width > 0 and height * width < 2**31, "height and width must be from 1 on")
    kernels: Any = module("warp_matrix", f"{__package__}.triton_kernels", params.device)
    numbers = height, width, *map(bits_of, (dy / dx, 1 / dx, dx / dy, 1 / dy))
    options = dict(
        KIND=kind, NUMBERS=KINDS[kind], CUBIC=interpolation == "bicubic", BORDER=padding == "border",
        C=type_of(params.dtype), **block(height * width),
    )  # fmt: skip
    return kernels, numbers, options


def forward(
    params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str, padding: str
) -> Tensor:
    """``warp_matrix_fwd``."""
    kernels, numbers, options = _call(params, kind, height, width, dy, dx, interpolation, padding)
    batch, taps = params.shape[0], height * width
    out = params.new_empty((batch, taps, taps))
    if batch:
        with on(params.device):
            programs = ceil(taps, kernels.TAPS.value) * ceil(taps, options["Q"]) * batch
            kernels.forward[(programs,)](params.contiguous(), out, batch, *numbers, **options)
    return out


def backward(
    grad: Tensor, params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str,
    padding: str,
) -> Tensor:  # fmt: skip
    """``warp_matrix_bwd``."""
    kernels, numbers, options = _call(params, kind, height, width, dy, dx, interpolation, padding)
    batch, taps = params.shape[0], height * width
    fits = grad.shape == (batch, taps, taps) and grad.dtype == params.dtype and grad.device == params.device
    _check(fits, f"grad must be {[batch, taps, taps]}, as params are")
    out = torch.empty_like(params, memory_format=torch.contiguous_format)
    if batch:
        with on(params.device):
            kernels.backward[(batch,)](grad.contiguous(), params.contiguous(), out, *numbers, **options)
    return out


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.warp_matrix_fwd, forward)
    register_triton(op.warp_matrix_bwd, backward)
