"""Spectral normalization of a weight, in plain torch (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

``weight`` is read as a matrix ``W`` [h, w]: ``dim`` in front, the rest flattened. |.| is the Euclidean norm and
unit(x) = x / max(|x|, eps).

    n_iter times:  u <- unit(W v),  v <- unit(W'u)          (v_first: v before u)
    sigma = u'Wv,  out = gain s(sigma) W                    with u and v constants
        s(sigma) = c/sigma  where active,  1 elsewhere      c = bound, or 1
        active:  sigma > c with a bound (W / max(1, sigma/c)),  else sigma != 0 (W / sigma)
    dgain = s <dout, W>
    dW    = gain (s dout + s' <dout, W> u v')               s' = -c/sigma^2 where active, 0 elsewhere

One read of W serves an iteration: with t = W v and z = W't, u = t/|t|, v = z/|z| and sigma = |z|/|t|.

A zero weight has no direction: s = 1, so the output is zero, the gradient passes, and u and v stay as they were. They
stay also where sigma is not finite (a weight with NaN or Inf; the output then is not finite either).

State is one flat tensor ``[u (h), v (w), sigma (1)]`` in float32 for half types, else in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import opmath


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """``weight`` with ``dim`` in front and the rest flattened: [h, w]."""
    return weight.movedim(dim, 0).reshape(matrix_shape(weight, dim))


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """(h, w) of :func:`as_matrix`; a vector is one column."""
    w = 1
    for i, size in enumerate(weight.shape):
        if i != dim:
            w *= size
    return weight.shape[dim], w


def from_matrix(matrix: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`as_matrix` for a ``weight`` of that shape."""
    rest = [s for i, s in enumerate(weight.shape) if i != dim]
    return matrix.reshape(weight.shape[dim], *rest).movedim(0, dim)


def unit(x: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def iterate(w: Tensor, u: Tensor, v: Tensor, n_iter: int, eps: float, v_first: bool) -> tuple[Tensor, Tensor]:
    """``n_iter`` power iterations of the matrix ``w`` [h, w] from u [h] and v [w]."""
    first_u, first_v = u, v
    for _ in range(n_iter):
        if v_first:
            v = unit(w.T @ u, eps)
            u = unit(w @ v, eps)
        else:
            u = unit(w @ v, eps)
            v = unit(w.T @ u, eps)
    if n_iter:
        sigma = u @ (w @ v)
        moved = torch.isfinite(sigma) & (sigma != 0)
        u, v = torch.where(moved, u, first_u), torch.where(moved, v, first_v)
    return u, v


def scale(sigma: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """s(sigma) and s'(sigma)."""
    c = 1.0 if bound is None else bound
    active = sigma != 0 if bound is None else sigma > c
    active = active | sigma.isnan()
    safe = torch.where(active, sigma, torch.ones_like(sigma))
    return torch.where(active, c / safe, torch.ones_like(sigma)), torch.where(active, -c / safe**2, 0.0)


def apply(weight: Tensor, u: Tensor, v: Tensor, gain: Tensor | None, dim: int, bound: float | None) -> Tensor:
    """out for given u and v, differentiable (to any order) in weight and gain."""
    sigma = u @ (as_matrix(weight, dim) @ v)
    s, _ = scale(sigma, bound)
    return weight * (s if gain is None else s * gain)


def forward(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    dim: int,
    n_iter: int,
    eps: float,
    v_first: bool,
    bound: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(out, state)."""
    dtype = opmath(weight.dtype)
    raw, u, v = weight.to(dtype), u.to(dtype), v.to(dtype)
    w = as_matrix(raw, dim)
    u, v = iterate(w, u, v, n_iter, eps, v_first)
    sigma = u @ (w @ v)
    s, _ = scale(sigma, bound)
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype)
    out.copy_(raw * (s if gain is None else s * gain.to(dtype)))
    return out, torch.cat([u, v, sigma.reshape(1)])


def backward(
    dout: Tensor, weight: Tensor, state: Tensor, gain: Tensor | None, dim: int, bound: float | None
) -> tuple[Tensor, Tensor]:
    """(dweight, dgain); state as :func:`forward` returned it, dgain 0-dim in the dtype of the state."""
    dtype = state.dtype
    h, w = matrix_shape(weight, dim)
    u, v, sigma = state.split([h, w, 1])
    s, ds = scale(sigma.reshape(()), bound)
    g, raw = dout.to(dtype), weight.to(dtype)
    radial = (g * raw).sum()
    direction = from_matrix(torch.outer(u, v), weight, dim)
    dweight = s * g + (ds * radial) * direction
    if gain is not None:
        dweight = gain.to(dtype) * dweight
    out = torch.empty_like(weight)
    out.copy_(dweight)
    return out, s * radial


def forward_list(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    gains: Sequence[Tensor],
    dims: Sequence[int],
    n_iters: Sequence[int],
    eps: float,
    v_first: bool,
    bound: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    """(outs, the members' states one after another); gains is empty or has one entry a member."""
    outs, states = [], []
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        gain = gains[i] if gains else None
        out, state = forward(weight, u, v, gain, dims[i], n_iters[i], eps, v_first, bound, out_dtype)
        outs.append(out)
        states.append(state)
    return outs, torch.cat(states)


def state_list(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_iters: Sequence[int],
    eps: float,
    v_first: bool,
) -> Tensor:
    """The state of :func:`forward_list`, without the outputs: for layers that fold s into their activations."""
    states = []
    for weight, u, v, dim, n_iter in zip(weights, us, vs, dims, n_iters, strict=True):
        dtype = opmath(weight.dtype)
        w = as_matrix(weight.to(dtype), dim)
        u, v = iterate(w, u.to(dtype), v.to(dtype), n_iter, eps, v_first)
        states.append(torch.cat([u, v, (u @ (w @ v)).reshape(1)]))
    return torch.cat(states)


def backward_list(
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    offsets: Sequence[int],
    gains: Sequence[Tensor],
    dims: Sequence[int],
    bound: float | None,
) -> tuple[list[Tensor], Tensor]:
    """(dweights, dgains [n]); offsets: where each of these members begins in ``state`` (others may lie between)."""
    dweights, dgains = [], []
    for i, (dout, weight) in enumerate(zip(douts, weights, strict=True)):
        h, w = matrix_shape(weight, dims[i])
        member = state[offsets[i] : offsets[i] + h + w + 1]
        dweight, dgain = backward(dout, weight, member, gains[i] if gains else None, dims[i], bound)
        dweights.append(dweight)
        dgains.append(dgain)
    return dweights, torch.stack(dgains)
