"""Filter warps as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import outside_autocast, unrounded
from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from . import reference
from .op import filter_warp_bwd, filter_warp_fwd


@outside_autocast
def _differentiable_backward(grad, weight, a, need_weight, need_a):
    """As the op, in torch ops that autograd and vmap see through."""
    g = grad.to(a.dtype)
    dweight = reference.adjoint(g, a).to(weight.dtype) if need_weight else None
    return dweight, reference.gram(g, weight.to(a.dtype)) if need_a else None


class FilterWarpFunction(torch.autograd.Function):
    """``(weight [E, F, K], a [B, E, K, K], out_dtype) -> out [B, F, K]``."""

    @staticmethod
    def forward(weight, a, out_dtype):
        return filter_warp_fwd(weight, a, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.a, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("filter_warp", (ctx.weight, ctx.a))

    @staticmethod
    def backward(ctx, grad):
        need_weight, need_a, *_ = ctx.needs_input_grad
        if grad is None or not (need_weight or need_a):
            return None, None, None
        if ctx.unchanged is not None:
            ctx.unchanged.check([1] * need_weight + [0] * need_a)  # what each of them reads
        ops = through_ops()
        backward = filter_warp_bwd if ops else _differentiable_backward
        grad = dense(grad)
        dweight, da = backward(grad.contiguous() if ops else grad, ctx.weight, ctx.a, need_weight, need_a)
        return dweight if need_weight else None, da if need_a else None, None

    @staticmethod
    def vmap(info, in_dims, weight, a, out_dtype):
        of_weight, of_a, _ = in_dims
        if of_weight is None:  # more conditions
            folded = a.movedim(of_a, 0)
            out = apply(weight, folded.flatten(0, 1), out_dtype)
            return out.reshape(*folded.shape[:2], *out.shape[1:]), 0
        members = [
            apply(weight.select(of_weight, i), a if of_a is None else a.select(of_a, i), out_dtype)
            for i in range(info.batch_size)
        ]
        return torch.stack(members), 0


class FilterWarpEager(FilterWarpFunction):
    """The same with forward-mode AD."""

    @staticmethod
    @outside_autocast
    def jvp(ctx, weight_t, a_t, _):
        weight, a = ctx.weight.to(ctx.a.dtype), ctx.a
        tangent = None if weight_t is None else reference.apply(weight_t, a)
        if a_t is not None:
            along = reference.apply(weight, a_t)
            tangent = along if tangent is None else tangent + along
        return None if tangent is None else tangent.to(ctx.out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        FilterWarpFunction.setup_context(ctx, inputs, output)
        ctx.out_dtype = output.dtype


FilterWarpJoined = joined(FilterWarpEager)
differentiable(filter_warp_fwd, FilterWarpFunction)


def apply(weight: Tensor, a: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """out [B, F, K] of weight [E, F, K] and a [B, E, K, K], differentiable in both; see ``reference.py``.

    ``a`` is converted to float64 for a float64 weight, else to float32.
    """
    weight, a = weight.contiguous(), a.to(opmath(weight.dtype)).contiguous()
    if inlined():
        return reference.apply(weight, unrounded(a)).to(out_dtype or weight.dtype)
    return variant(FilterWarpFunction, FilterWarpEager, FilterWarpJoined).apply(weight, a, out_dtype)
