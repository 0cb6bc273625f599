"""The ops of weight normalization: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

import torch

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference


def _fake_fwd(weight, g, dim, out_dtype):
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype)
    return out, weight.new_empty(weight.shape[dim], dtype=opmath(weight.dtype))


def _fake_bwd(dout, weight, g, norms, dim):
    return torch.empty_like(weight), torch.empty_like(norms)


def _case_fwd(shape: tuple[int, ...], dim: int, layout: str = "contiguous", out_dtype=None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        if layout == "channels_last":
            weight = weight.to(memory_format=torch.channels_last)
        elif layout == "slice":
            weight = weight[..., ::2]
        g = torch.rand(weight.shape[dim], generator=generator, dtype=torch.float64) + 0.5
        return weight, g.to(opmath(dtype)).to(device), dim, out_dtype

    return make


def _case_bwd(*row) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, g, dim, out_dtype = _case_fwd(*row)(dtype, device, generator)
        _, norms = reference.forward(weight, g, dim, None)
        noise = torch.randn(*weight.shape, generator=generator, dtype=torch.float64).to(device)
        dout = (noise + weight.double()).to(
            out_dtype or dtype
        )  # a part along the weight, so that <dout, v> does not cancel
        return dout, weight, g, norms, dim

    return make


_CASES: dict[str, tuple] = {
    "linear": ((33, 65), 0),
    "one_row": ((1, 37), 0),
    "vector": ((19,), 0),
    "prime_tall": ((257, 13), 0),
    "large": ((300, 1100), 0),
    "conv": ((16, 5, 3, 3), 0),
    "conv_channels_last": ((16, 5, 3, 3), 0, "channels_last"),
    "conv_transpose": ((6, 10, 3, 3), 1),
    "last_dim": ((31, 47), 1),
    "slice": ((31, 47), 0, "slice"),
    "empty_rows": ((0, 5), 0),
    "empty_columns": ((5, 0), 0),
    "autocast": ((24, 40), 0, "contiguous", torch.bfloat16),
}

weight_norm_fwd = register(
    Op(
        name="weight_norm_fwd",
        schema="(Tensor weight, Tensor g, int dim, ScalarType? out_dtype) -> (Tensor, Tensor)",
        reference=reference.forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda weight, g, dim, out_dtype: (
            weight.nbytes + weight.numel() * (out_dtype or weight.dtype).itemsize
        ),
    )
)

weight_norm_bwd = register(
    Op(
        name="weight_norm_bwd",
        schema="(Tensor dout, Tensor weight, Tensor g, Tensor norms, int dim) -> (Tensor, Tensor)",
        reference=reference.backward,
        fake=_fake_bwd,
        cases={
            name: _case_bwd(*row) for name, row in _CASES.items() if name != "vector"
        },  # its dweight is exactly zero
        bytes_moved=lambda dout, weight, *_: dout.nbytes + 2 * weight.nbytes,
    )
)
