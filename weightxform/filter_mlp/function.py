"""The network over each filter as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import outside_autocast, unrounded
from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from . import reference
from .op import filter_mlp_bwd, filter_mlp_fwd

_gradients = outside_autocast(reference.gradients)


class FilterMLPFunction(torch.autograd.Function):
    """``(weight [F, K], v [B, H], w1 [H, K], w2 [K, H], b2 [K], activation, residual, out_dtype) -> out [B, F, K]``."""

    @staticmethod
    def forward(weight, v, w1, w2, b2, activation, residual, out_dtype):
        return filter_mlp_fwd(weight, v, w1, w2, b2, activation, residual, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.v, ctx.w1, ctx.w2, _, ctx.activation, ctx.residual, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("filter_mlp", (ctx.weight, ctx.v, ctx.w1, ctx.w2))

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[:5]
        if grad is None or not any(needed):
            return (None,) * 8
        if ctx.unchanged is not None:
            ctx.unchanged.check([0, 1, 2] * any(needed[:4]) + [3] * any(needed[:3]))  # what they read; db2 nothing
        arguments = ctx.weight, ctx.v, ctx.w1, ctx.w2, ctx.activation, ctx.residual
        if through_ops():
            grads = filter_mlp_bwd(dense(grad).contiguous(), *arguments, needed[0])
        else:
            dweight, *others = _gradients(grad, *arguments)
            grads = (dweight.to(ctx.weight.dtype), *others)
        return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None)

    @staticmethod
    def vmap(info, in_dims, weight, v, w1, w2, b2, activation, residual, out_dtype):
        tensors = weight, v, w1, w2, b2
        if in_dims[1] is not None and all(d is None for k, d in enumerate(in_dims[:5]) if k != 1):  # more conditions
            folded = v.movedim(in_dims[1], 0)
            out = apply(weight, folded.flatten(0, 1), w1, w2, b2, activation, residual, out_dtype)
            return out.unflatten(0, folded.shape[:2]), 0
        members = []
        for i in range(info.batch_size):
            w, hidden, first, second, bias = (
                t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims[:5], strict=True)
            )
            members.append(apply(w, hidden, first, second, bias, activation, residual, out_dtype))
        return torch.stack(members), 0


class FilterMLPEager(FilterMLPFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        FilterMLPFunction.setup_context(ctx, inputs, output)
        ctx.out_dtype = output.dtype

    @staticmethod
    @outside_autocast
    def jvp(ctx, weight_t, v_t, w1_t, w2_t, b2_t, *_):
        w = ctx.weight.to(ctx.v.dtype)
        x = w @ ctx.w1.T + ctx.v[:, None, :]
        x_t = torch.zeros_like(x)
        if weight_t is not None:
            x_t = x_t + weight_t.to(w.dtype) @ ctx.w1.T
        if v_t is not None:
            x_t = x_t + v_t[:, None, :]
        if w1_t is not None:
            x_t = x_t + w @ w1_t.T
        tangent = (reference.slope(x, ctx.activation) * x_t) @ ctx.w2.T
        if w2_t is not None:
            tangent = tangent + reference.activated(x, ctx.activation) @ w2_t.T
        if b2_t is not None:
            tangent = tangent + b2_t
        if ctx.residual and weight_t is not None:
            tangent = tangent + weight_t.to(w.dtype)
        return tangent.to(ctx.out_dtype)


FilterMLPJoined = joined(FilterMLPEager)
differentiable(filter_mlp_fwd, FilterMLPFunction)


def apply(
    weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, activation: str, residual: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """out [B, F, K], differentiable in all five tensors; see ``reference.py``.

    v, w1, w2 and b2 are converted to float64 for a float64 weight, else to float32.
    """
    wide = opmath(weight.dtype)
    weight = weight.contiguous()
    v, w1, w2, b2 = (t.to(wide).contiguous() for t in (v, w1, w2, b2))
    if inlined():
        v, w1, w2, b2 = (unrounded(t) for t in (v, w1, w2, b2))
        return reference.apply(weight, v, w1, w2, b2, activation, residual).to(out_dtype or weight.dtype)
    function = variant(FilterMLPFunction, FilterMLPEager, FilterMLPJoined)
    return function.apply(weight, v, w1, w2, b2, activation, residual, out_dtype)
