"""The ops of modulation on Triton: arguments and launches. The kernels are in ``triton_kernels.py``.

Two launches forward (without demodulation one of them writes d = 1), at most four backward, of which one reads G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register_triton
from ..triton_common.launch import check, check_dtypes, check_gradient
from ..triton_common.sums import add_rows
from ..triton_common.tables import bits_of, ceil, module, on, type_of
from . import op

TILE = 1024  # numbers of a program that writes the output
BLOCK = 1024  # numbers of the weight that a program of ``stream`` has
PROGRAMS = 512  # of ``stream``: with fewer the samples are cut


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def scales_block(samples: int, inputs: int, taps: int) -> dict[str, int]:
    """Taps at once, samples and input channels of a block."""
    across = min(32, power(taps))
    i = min(max(16, 1024 // across), power(inputs), 256)
    return {"TAPS": across, "N": min(16, power(samples)), "IN": i, "num_warps": 4}


def stream_block(outputs: int, inputs: int, taps: int) -> dict[str, int]:
    """Output and input channels, and taps, of a block."""
    across = power(taps)
    o = min(8, max(1, BLOCK // across), power(outputs))
    i = min(max(1, BLOCK // (o * across)), power(inputs))
    return {"OUT": o, "IN": i, "TAPS": across, "num_warps": 4 if o * i * across <= BLOCK else 16}


def _kernels(device: torch.device) -> Any:
    return module("modulate", f"{__package__}.triton_kernels", device)


def _check(weight: Tensor, style: Tensor, out_dtype: torch.dtype | None = None, **others: Tensor) -> None:
    check("modulate", weight.dim() == 3 and style.dim() == 2, "weight must be [O, I, K], style [N, I]")
    check_dtypes("modulate", weight, out_dtype, style=style, **others)
    check("modulate", style.shape[1] == weight.shape[1], "style must be [N, I] for a weight of [O, I, K]")
    small = max(weight.numel(), style.numel(), style.shape[0] * weight.shape[0]) < 2**31
    check("modulate", small, "a weight or style of 2^31 elements is more than the Triton kernels address")
    check("modulate", weight.shape[2] <= 1 << 13, "the Triton kernels take at most 8192 taps")


def forward(
    weight: Tensor, style: Tensor, demodulate: bool, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``modulate_fwd``."""
    _check(weight, style, out_dtype)
    (outputs, inputs, taps), samples = weight.shape, style.shape[0]
    out = weight.new_empty((samples, *weight.shape), dtype=out_dtype or weight.dtype)
    d = style.new_empty((samples, outputs)) if demodulate else style.new_ones((samples, outputs))
    kernels = _kernels(weight.device)
    weight, style = weight.contiguous(), style.contiguous()
    sizes, C = (samples, outputs, inputs), type_of(style.dtype)
    with on(weight.device):
        if demodulate and d.numel():
            block = scales_block(samples, inputs, taps)
            kernels.scales[(outputs * ceil(samples, block["N"]),)](
                weight, style, d, *sizes, bits_of(eps), C=C, K=taps, **block
            )
        if out.numel():
            n = min(4, power(samples))
            kernels.modulated[(ceil(weight.numel(), TILE) * ceil(samples, n),)](
                weight, style, d, out, *sizes, TO=type_of(out.dtype), C=C, K=taps, SCALED=demodulate, N=n, TILE=TILE,
                num_warps=4,
            )  # fmt: skip
    return out, d


def backward(
    grad: Tensor, weight: Tensor, style: Tensor, d: Tensor, demodulate: bool, need_weight: bool, need_style: bool
) -> tuple[Tensor, Tensor]:
    """``modulate_bwd``."""
    _check(weight, style, d=d)
    (outputs, inputs, taps), samples = weight.shape, style.shape[0]
    check("modulate", d.shape == (samples, outputs), "d must be [N, O]")
    check_gradient("modulate", grad, weight, samples, outputs, inputs, taps)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    dstyle = style.new_empty(style.shape if need_style else (0,))
    if not grad.numel():
        return dweight.zero_(), dstyle.zero_()
    kernels = _kernels(weight.device)
    weight, style, d = weight.contiguous(), style.contiguous(), d.contiguous()
    block = stream_block(outputs, inputs, taps)
    o_parts, i_parts = ceil(outputs, block["OUT"]), ceil(inputs, block["IN"])
    parts = min(ceil(samples, 4), ceil(PROGRAMS, o_parts * i_parts)) if need_weight else 1
    each = ceil(samples, parts)
    parts = ceil(samples, each)

    def room(needed: bool, *shape: int) -> Tensor:
        return style.new_empty(shape if needed else 1)

    dweights = room(need_weight, parts, *weight.shape)
    dstyles = room(need_style, o_parts, *style.shape)
    bs, energy = room(demodulate, i_parts, *d.shape), room(demodulate, outputs, inputs)
    sizes, C = (samples, outputs, inputs), type_of(style.dtype)
    with on(weight.device):
        kernels.stream[(o_parts * i_parts, parts)](
            grad.contiguous(), weight, style, d, dweights, dstyles, bs, energy, *sizes, each, C=C, K=taps,
            SCALED=demodulate, NEED_WEIGHT=need_weight, NEED_STYLE=need_style, **block,
        )  # fmt: skip
        if not demodulate:
            if need_weight:
                add_rows(dweights, dweight)
            if need_style:
                add_rows(dstyles, dstyle)
            return dweight, dstyle
        columns, t = kernels.ACROSS.value, torch.empty_like(d, dtype=torch.float64)
        kernels.cubes[(ceil(samples * outputs, columns),)](bs, d, t, i_parts, samples * outputs)
        if need_style:
            kernels.finish_style[(ceil(samples * inputs, columns),)](
                dstyles, style, t, energy, dstyle, o_parts, *sizes, C=C
            )
        if need_weight:
            kernels.finish_weight[(ceil(outputs * inputs, columns),)](
                dweights, weight, style, t, dweight, parts, *sizes, TO=type_of(weight.dtype), C=C, K=taps,
                TAPS=min(32, power(taps)),
            )  # fmt: skip
    return dweight, dstyle


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.modulate_fwd, forward)
    register_triton(op.modulate_bwd, backward)
