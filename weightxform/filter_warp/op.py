"""The ops of filter warps: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

import torch

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference


def _fake_fwd(weight, a, out_dtype):
    return weight.new_empty((a.shape[0], *weight.shape[1:]), dtype=out_dtype or weight.dtype)


def _fake_bwd(grad, weight, a, need_weight, need_a):
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    return dweight, a.new_empty(a.shape if need_a else (0,))


def _case_fwd(batch: int, banks: int, filters: int, taps: int, out_dtype=None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a = normal(batch, banks, taps, taps) / taps**0.5
        a = a * (normal(batch, banks, taps, taps) > -0.5)  # with zeros, as warps have
        return normal(banks, filters, taps).to(dtype).to(device), a.to(opmath(dtype)).to(device), out_dtype

    return make


def _case_bwd(row: tuple, need_weight: bool, need_a: bool) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, a, out_dtype = _case_fwd(*row)(dtype, device, generator)
        grad = torch.randn(a.shape[0], *weight.shape[1:], generator=generator, dtype=torch.float64)
        return grad.to(out_dtype or dtype).to(device), weight, a, need_weight, need_a

    return make


# name: conditions, banks, filters, taps
_CASES: dict[str, tuple] = {
    "conv3": (3, 1, 41, 9),
    "one_condition": (1, 1, 1200, 9),
    "conditions": (19, 1, 130, 9),
    "one_filter": (2, 1, 1, 9),
    "one_tap": (3, 1, 37, 1),
    "conv2": (2, 1, 67, 4),
    "conv1d": (2, 1, 67, 3),
    "conv5": (2, 1, 35, 25),
    "conv3d": (2, 1, 33, 27),
    "conv7": (2, 1, 33, 49),
    "head": (2, 1, 18, 20),
    "many_taps": (2, 1, 10, 144),
    "experts": (3, 4, 50, 9),
    "experts_of_many_taps": (2, 2, 9, 36),
    "no_condition": (0, 1, 5, 9),
    "no_filter": (3, 1, 0, 9),
    "large": (2, 1, 5003, 9),
    "autocast": (3, 1, 24, 9, torch.bfloat16),
}

filter_warp_fwd = register(
    Op(
        name="filter_warp_fwd",
        schema="(Tensor weight, Tensor a, ScalarType? out_dtype) -> Tensor",
        reference=reference.forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda weight, a, out_dtype: (
            weight.nbytes + a.nbytes + a.shape[0] * weight[0].numel() * (out_dtype or weight.dtype).itemsize
        ),
    )
)

filter_warp_bwd = register(
    Op(
        name="filter_warp_bwd",
        schema="(Tensor grad, Tensor weight, Tensor a, bool need_weight, bool need_a) -> (Tensor, Tensor)",
        reference=reference.backward,
        fake=_fake_bwd,
        cases={name: _case_bwd(row, True, True) for name, row in _CASES.items()}
        | {
            "frozen": _case_bwd((3, 1, 301, 9), False, True),
            "frozen_experts": _case_bwd((3, 2, 65, 25), False, True),
            "fixed": _case_bwd((3, 1, 301, 9), True, False),
        },
        bytes_moved=lambda grad, weight, a, need_weight, need_a: (
            grad.nbytes + weight.nbytes * (1 + need_weight) + a.nbytes * (1 + need_a)
        ),
    )
)
