"""The ops of modulation: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

import torch

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference


def _fake_fwd(weight, style, demodulate, eps, out_dtype):
    out = weight.new_empty((style.shape[0], *weight.shape), dtype=out_dtype or weight.dtype)
    return out, style.new_empty((style.shape[0], weight.shape[0]))


def _fake_bwd(grad, weight, style, d, demodulate, need_weight, need_style):
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    return dweight, style.new_empty(style.shape if need_style else (0,))


def _case_fwd(samples: int, outputs: int, inputs: int, taps: int, demodulate=True, out_dtype=None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight, style = normal(outputs, inputs, taps), normal(samples, inputs) + 0.5
        return weight.to(dtype).to(device), style.to(opmath(dtype)).to(device), demodulate, 1e-8, out_dtype

    return make


def _case_bwd(row: tuple, need_weight: bool, need_style: bool) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, style, demodulate, eps, out_dtype = _case_fwd(*row)(dtype, device, generator)
        d = reference.scales(weight, style, demodulate, eps)
        noise = torch.randn(style.shape[0], *weight.shape, generator=generator, dtype=torch.float64)
        grad = noise + weight.double().cpu() * style.double().cpu()[:, None, :, None]  # so that b does not cancel
        return grad.to(out_dtype or dtype).to(device), weight, style, d, demodulate, need_weight, need_style

    return make


# samples, output channels, input channels, taps
_CASES: dict[str, tuple] = {
    "conv3": (3, 17, 13, 9),
    "conv1": (4, 11, 37, 1),
    "conv5": (2, 5, 7, 25),
    "one_sample": (1, 33, 20, 9),
    "samples": (37, 6, 5, 9),
    "one_output": (3, 1, 19, 9),
    "to_rgb": (3, 3, 40, 1, False),
    "plain": (3, 17, 13, 9, False),
    "conv3d": (2, 5, 6, 27),
    "large": (3, 40, 130, 9),
    "no_sample": (0, 5, 4, 9),
    "no_output": (3, 0, 4, 9),
    "autocast": (3, 9, 8, 9, True, torch.bfloat16),
}

modulate_fwd = register(
    Op(
        name="modulate_fwd",
        schema="(Tensor weight, Tensor style, bool demodulate, float eps, ScalarType? out_dtype) -> (Tensor, Tensor)",
        reference=reference.forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda weight, style, demodulate, eps, out_dtype: (
            weight.nbytes
            + style.nbytes
            + style.shape[0] * weight.numel() * (out_dtype or weight.dtype).itemsize
            + style.shape[0] * weight.shape[0] * style.itemsize
        ),
    )
)

modulate_bwd = register(
    Op(
        name="modulate_bwd",
        schema=(
            "(Tensor grad, Tensor weight, Tensor style, Tensor d, bool demodulate, bool need_weight, bool need_style)"
            " -> (Tensor, Tensor)"
        ),
        reference=reference.backward,
        fake=_fake_bwd,
        cases={name: _case_bwd(row, True, True) for name, row in _CASES.items()}
        | {
            "frozen": _case_bwd((3, 17, 13, 9), False, True),
            "fixed": _case_bwd((3, 17, 13, 9), True, False),
        },
        bytes_moved=lambda grad, weight, style, d, demodulate, need_weight, need_style: (
            grad.nbytes + weight.nbytes * (1 + need_weight) + style.nbytes * (1 + need_style) + d.nbytes
        ),
    )
)
