"""The ops of the network over each filter: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

import torch

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference


def _fake_fwd(weight, v, w1, w2, b2, activation, residual, out_dtype):
    return weight.new_empty((v.shape[0], *weight.shape), dtype=out_dtype or weight.dtype)


def _fake_bwd(grad, weight, v, w1, w2, activation, residual, need_weight):
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    return dweight, v.new_empty(v.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape), w2.new_empty(w2.shape[0])


def _case_fwd(batch: int, filters: int, taps: int, hidden: int, activation="relu", residual=False, out_dtype=None):
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight, v = normal(filters, taps), normal(batch, hidden)
        w1, w2, b2 = normal(hidden, taps) / taps**0.5, normal(taps, hidden) / hidden**0.5, normal(taps)
        if activation == "relu":  # no hidden unit so near to 0 that a rounding turns it on or off
            weight, v, w1 = (t.mul(8).round().div(8) for t in (weight, v, w1))
            v = v + 1 / 128
        layers = [t.to(opmath(dtype)).to(device) for t in (v, w1, w2, b2)]
        return weight.to(dtype).to(device), *layers, activation, residual, out_dtype

    return make


def _case_bwd(row: tuple, need_weight: bool) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, v, w1, w2, _, activation, residual, out_dtype = _case_fwd(*row)(dtype, device, generator)
        grad = torch.randn(v.shape[0], *weight.shape, generator=generator, dtype=torch.float64)
        return grad.to(out_dtype or dtype).to(device), weight, v, w1, w2, activation, residual, need_weight

    return make


# conditions, filters, taps, hidden units
_CASES: dict[str, tuple] = {
    "conv3": (3, 41, 9, 16),
    "silu": (2, 67, 9, 20, "silu"),
    "tanh": (2, 37, 9, 33, "tanh", True),
    "residual": (3, 130, 9, 64, "relu", True),
    "one_condition": (1, 300, 9, 8, "silu", True),
    "conditions": (19, 20, 9, 8),
    "one_tap": (2, 23, 1, 7, "silu"),
    "conv5": (2, 19, 25, 24, "relu", True),
    "conv7": (2, 9, 49, 40, "tanh"),
    "one_hidden": (2, 30, 9, 1, "silu"),
    "wide": (2, 21, 9, 257, "silu", True),
    "no_condition": (0, 5, 9, 8),
    "no_filter": (2, 0, 9, 8),
    "large": (2, 2011, 9, 32, "silu", True),
    "autocast": (2, 24, 9, 16, "relu", True, torch.bfloat16),
}

filter_mlp_fwd = register(
    Op(
        name="filter_mlp_fwd",
        schema=(
            "(Tensor weight, Tensor v, Tensor w1, Tensor w2, Tensor b2, str activation, bool residual,"
            " ScalarType? out_dtype) -> Tensor"
        ),
        reference=reference.forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda weight, v, w1, w2, b2, activation, residual, out_dtype: (
            weight.nbytes
            + v.nbytes
            + w1.nbytes
            + w2.nbytes
            + v.shape[0] * weight.numel() * (out_dtype or weight.dtype).itemsize
        ),
    )
)

filter_mlp_bwd = register(
    Op(
        name="filter_mlp_bwd",
        schema=(
            "(Tensor grad, Tensor weight, Tensor v, Tensor w1, Tensor w2, str activation, bool residual,"
            " bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        reference=reference.backward,
        fake=_fake_bwd,
        cases={name: _case_bwd(row, True) for name, row in _CASES.items()}
        | {"frozen": _case_bwd((3, 130, 9, 24, "silu", True), False)},
        bytes_moved=lambda grad, weight, v, w1, w2, activation, residual, need_weight: (
            grad.nbytes + weight.nbytes * (1 + need_weight) + 2 * (v.nbytes + w1.nbytes + w2.nbytes)
        ),
    )
)
