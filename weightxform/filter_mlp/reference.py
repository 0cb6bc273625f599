"""A small network over each filter of a bank, in plain torch.

``weight`` is [F, K]: F filters of K taps. Every filter is mapped by the same two layers, with a hidden bias ``v``
[B, H] for each of B conditions (``v = w_c c + b_1`` for a first layer that also reads the condition c):

    u[f, j]      = sum over q of  w1[j, q] weight[f, q]
    h[b, f, j]   = activation(u[f, j] + v[b, j])
    out[b, f, p] = sum over j of  w2[p, j] h[b, f, j]  +  b2[p]   ( + weight[f, p]  for ``residual``)

With G the gradient of the output and e[b, f, j] = activation'(u + v) sum over p of w2[p, j] G[b, f, p]:

    dv[b, j]      = sum over f of  e[b, f, j]              dw1[j, q] = sum over b, f of  e[b, f, j] weight[f, q]
    dw2[p, j]     = sum over b, f of  G[b, f, p] h[b, f, j]          db2[p] = sum over b, f of  G[b, f, p]
    dweight[f, q] = sum over b, j of  e[b, f, j] w1[j, q]   ( + sum over b of  G[b, f, q] )

Nothing of size [B, F, H] has to be stored: h is computed again. Sums run in float32 for half types; all arguments but
``weight`` have that dtype, the output that of ``weight`` or ``out_dtype``. The learned map of a filter and a condition
is the network of https://discuss.pytorch.org/t/learning-to-transform-cnn-filter-weights/127906 with a hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "silu", "tanh")


def activated(x: Tensor, activation: str) -> Tensor:
    return torch.relu(x) if activation == "relu" else torch.tanh(x) if activation == "tanh" else x * torch.sigmoid(x)


def slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of :func:`activated`; of relu at 0 it is 0."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "tanh":
        return 1 - torch.tanh(x) ** 2
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


def apply(weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, activation: str, residual: bool) -> Tensor:
    """The output [B, F, K] in the dtype of ``v``, differentiable to any order."""
    w = weight.to(v.dtype)
    out = activated(w @ w1.T + v[:, None, :], activation) @ w2.T + b2
    return out + w if residual else out


def forward(
    weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, activation: str, residual: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """out [B, F, K]."""
    return apply(weight, v, w1, w2, b2, activation, residual).to(out_dtype or weight.dtype)


def gradients(
    grad: Tensor, weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, activation: str, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dweight, dv, dw1, dw2, db2) in the dtype of ``v``, differentiable in all arguments."""
    g, w = grad.to(v.dtype), weight.to(v.dtype)
    x = w @ w1.T + v[:, None, :]
    h, e = activated(x, activation), (g @ w2) * slope(x, activation)
    over_conditions = e.sum(0)
    dweight = over_conditions @ w1
    if residual:
        dweight = dweight + g.sum(0)
    dw2 = g.flatten(0, 1).T @ h.flatten(0, 1)
    return dweight, e.sum(1), over_conditions.T @ w, dw2, g.sum((0, 1))


def backward(
    grad: Tensor, weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, activation: str, residual: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dweight [F, K], or [0] if it is not needed; dv [B, H]; dw1 [H, K]; dw2 [K, H]; db2 [K])."""
    dweight, *others = gradients(grad, weight, v, w1, w2, activation, residual)
    return (dweight.to(weight.dtype) if need_weight else weight.new_empty(0), *others)  # type: ignore[return-value]
