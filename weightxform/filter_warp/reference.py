"""Filters mapped tap by tap, in plain torch: every warp of a filter bank is this one operator.

``weight`` is [E, F, K]: E banks (experts; usually one) of F filters (for a convolution the pairs of an output and an
input channel) of K taps, flattened. ``a`` is [B, E, K, K]: for each condition and bank the matrix whose row p says of
which taps q the new tap p is made. With G the gradient of the output [B, F, K]:

    out[b, f, p] = sum over e, q of  a[b, e, p, q] weight[e, f, q]
    da[b, e, p, q] = sum over f of  G[b, f, p] weight[e, f, q]                     (a Gram matrix for each condition)
    dweight[e, f, q] = sum over b, p of  a[b, e, p, q] G[b, f, p]

Rotation, scaling, shear, reflection, steerable filters and learned maps differ only in ``a``
(Diaconu and Worrall, "Learning to Convolve", ICML 2019, write it so; ARC, Pu et al., ICCV 2023, for rotation).
Sums run in float32 for half types; ``a`` and ``da`` have that dtype, the output that of ``weight`` or ``out_dtype``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import opmath


def apply(weight: Tensor, a: Tensor) -> Tensor:
    """The output [B, F, K] in the dtype of ``a``, differentiable to any order."""
    banks, filters, taps = weight.shape
    sources = weight.to(a.dtype).transpose(0, 1).reshape(filters, banks * taps)
    return sources @ a.transpose(-1, -2).reshape(a.shape[0], banks * taps, taps)


def gram(grad: Tensor, weight: Tensor) -> Tensor:
    """da [B, E, K, K], differentiable."""
    return grad.transpose(-1, -2)[:, None] @ weight


def adjoint(grad: Tensor, a: Tensor) -> Tensor:
    """dweight [E, F, K], differentiable."""
    batch, banks, taps, _ = a.shape
    grads = grad.transpose(0, 1).reshape(grad.shape[1], batch * taps)
    return grads @ a.transpose(0, 1).reshape(banks, batch * taps, taps)


def forward(weight: Tensor, a: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    """out [B, F, K]."""
    return apply(weight, a).to(out_dtype or weight.dtype)


def backward(grad: Tensor, weight: Tensor, a: Tensor, need_weight: bool, need_a: bool) -> tuple[Tensor, Tensor]:
    """(dweight [E, F, K], da [B, E, K, K]); one that is not needed is empty, [0]."""
    g = grad.to(opmath(weight.dtype))
    dweight = adjoint(g, a).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dweight, gram(g, weight.to(g.dtype)) if need_a else a.new_empty(0)
