"""Weight normalization, in plain torch (Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868, equations 2 and 3).

``weight`` is read as a matrix ``V`` [h, w]: ``dim`` in front, the rest flattened; ``g`` is [h]. For each row:

    out = g v / |v|
    dg  = <dout, v> / |v|
    dv  = g / |v| (dout - <dout, v> / |v|^2 v)

A row of zeros has no direction: its norm counts as 1 and its second term as 0, so that it gives zeros and passes the
gradient. Norms are float32 for half types, else in the dtype of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import opmath


def per_row(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """``values`` [h] in a shape that broadcasts over ``weight``."""
    return values.reshape([-1 if i == dim else 1 for i in range(weight.ndim)])


def row_sums(values: Tensor, dim: int) -> Tensor:
    """The sums of ``values`` over all axes but ``dim``: [h]."""
    return (
        values.movedim(dim, 0).reshape(values.shape[dim], -1).sum(1)
        if values.numel()
        else values.new_zeros(values.shape[dim])
    )


def row_norms(weight: Tensor, dim: int) -> Tensor:
    """|v| of each row, differentiable; 1 for a row of zeros."""
    squares = row_sums(weight**2, dim)
    return torch.where(squares == 0, 1.0, squares).sqrt()


def apply(weight: Tensor, g: Tensor, dim: int) -> Tensor:
    """out, differentiable to any order."""
    return weight * per_row(g / row_norms(weight, dim), weight, dim)


def forward(weight: Tensor, g: Tensor, dim: int, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(out, norms [h])."""
    raw = weight.to(opmath(weight.dtype))
    norms = row_norms(raw, dim)
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype)
    out.copy_(raw * per_row(g.to(raw.dtype) / norms, raw, dim))
    return out, norms


def backward(dout: Tensor, weight: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(dweight, dg [h])."""
    d, raw = dout.to(norms.dtype), weight.to(norms.dtype)
    dg = row_sums(d * raw, dim) / norms
    s = g.to(norms.dtype) / norms
    dweight = torch.empty_like(weight)
    dweight.copy_(per_row(s, raw, dim) * d - per_row(s * dg / norms, raw, dim) * raw)
    return dweight, dg
