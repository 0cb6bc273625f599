"""Modulation and demodulation of a filter bank, in plain torch (Karras et al. 2020, "Analyzing and improving the image
quality of StyleGAN", https://arxiv.org/abs/1912.04958, equations 1 and 3).

``weight`` is [O, I, K] (taps flattened), ``style`` [N, I]: a factor for each sample and input channel.

    out[n, o, i, p] = weight[o, i, p] style[n, i] d[n, o]
    E[o, i]  = sum over p of  weight[o, i, p]^2
    d[n, o]  = (sum over i of  style[n, i]^2 E[o, i]  +  eps)^(-1/2)               1 without demodulation

so that d is a matrix product, and nothing of the size of the output is read to find it. With G the gradient of the
output, a[n, o, i] = sum over p of G[n, o, i, p] weight[o, i, p] and b[n, o] = sum over i of style[n, i] a[n, o, i]:

    dstyle[n, i]     = sum over o of  d[n, o] a[n, o, i]  -  style[n, i] sum over o of  d[n, o]^3 b[n, o] E[o, i]
    dweight[o, i, p] = sum over n of  d[n, o] style[n, i] G[n, o, i, p]
                       -  weight[o, i, p] sum over n of  d[n, o]^3 b[n, o] style[n, i]^2

(without demodulation the first term of each). Sums run in float32 for half types; ``style`` and d have that dtype, the
output that of ``weight`` or ``out_dtype``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scales(weight: Tensor, style: Tensor, demodulate: bool, eps: float) -> Tensor:
    """d [N, O], differentiable."""
    if not demodulate:
        return style.new_ones(style.shape[0], weight.shape[0])
    return ((style**2) @ (weight.to(style.dtype) ** 2).sum(-1).T + eps).rsqrt()


def apply(weight: Tensor, style: Tensor, demodulate: bool, eps: float) -> Tensor:
    """The output [N, O, I, K] in the dtype of ``style``, differentiable to any order."""
    d = scales(weight, style, demodulate, eps)
    return weight.to(style.dtype) * (d[:, :, None] * style[:, None, :])[..., None]


def forward(
    weight: Tensor, style: Tensor, demodulate: bool, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(out [N, O, I, K], d [N, O])."""
    out = apply(weight, style, demodulate, eps).to(out_dtype or weight.dtype)
    return out, scales(weight, style, demodulate, eps)


def gradients(grad: Tensor, weight: Tensor, style: Tensor, d: Tensor, demodulate: bool) -> tuple[Tensor, Tensor]:
    """(dweight, dstyle) in the dtype of ``style``; differentiable in grad, weight, style and d."""
    g, w = grad.to(style.dtype), weight.to(style.dtype)
    a = (g * w).sum(-1)
    dstyle = (d[:, :, None] * a).sum(1)
    dweight = (g * (d[:, :, None] * style[:, None, :])[..., None]).sum(0)
    if demodulate:
        t = d**3 * (a * style[:, None, :]).sum(-1)
        dstyle = dstyle - style * (t @ (w**2).sum(-1))
        dweight = dweight - w * (t.T @ style**2)[..., None]
    return dweight, dstyle


def backward(
    grad: Tensor, weight: Tensor, style: Tensor, d: Tensor, demodulate: bool, need_weight: bool, need_style: bool
) -> tuple[Tensor, Tensor]:
    """(dweight [O, I, K], dstyle [N, I]); one that is not needed is empty, [0]."""
    dweight, dstyle = gradients(grad, weight, style, d, demodulate)
    return (
        dweight.to(weight.dtype) if need_weight else weight.new_empty(0),
        dstyle if need_style else style.new_empty(0),
    )
