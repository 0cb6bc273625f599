"""Weight normalization as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from . import reference
from .op import weight_norm_bwd, weight_norm_fwd


def _differentiable_backward(dout: Tensor, weight: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(dweight, dg) in torch ops that autograd and vmap see through; the norms are a function of weight again."""
    d, raw = dout.to(norms.dtype), weight.to(norms.dtype)
    norms = reference.row_norms(raw, dim)
    dg = reference.row_sums(d * raw, dim) / norms
    s = g.to(norms.dtype) / norms
    along = reference.per_row(s * dg / norms, raw, dim) * raw
    return (reference.per_row(s, raw, dim) * d - along).to(weight.dtype), dg


class WeightNormFunction(torch.autograd.Function):
    """``(weight, g, dim, out_dtype) -> (out, norms)``."""

    @staticmethod
    def forward(weight, g, dim, out_dtype):
        return weight_norm_fwd(weight, g, dim, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.g, ctx.dim, _ = inputs
        ctx.norms = output[1]
        ctx.mark_non_differentiable(ctx.norms)
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("weight_norm", (ctx.weight, ctx.g))

    @staticmethod
    def backward(ctx, dout, dnorms):
        if dout is None:
            return None, None, None, None
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        backward = weight_norm_bwd if through_ops() else _differentiable_backward
        dweight, dg = backward(dense(dout), ctx.weight, ctx.g, ctx.norms, ctx.dim)
        need_weight, need_g, *_ = ctx.needs_input_grad
        return dweight if need_weight else None, dg.to(ctx.g.dtype) if need_g else None, None, None

    @staticmethod
    def vmap(info, in_dims, weight, g, dim, out_dtype):
        def member(tensor: Tensor, d: int | None, i: int) -> Tensor:
            return tensor if d is None else tensor.select(d, i)

        members = [
            apply(member(weight, in_dims[0], i), member(g, in_dims[1], i), dim, out_dtype)
            for i in range(info.batch_size)
        ]
        outs, norms = zip(*members, strict=True)
        return (torch.stack(outs), torch.stack(norms)), (0, 0)


class WeightNormEager(WeightNormFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        WeightNormFunction.setup_context(ctx, inputs, output)
        ctx.out_dtype = output[0].dtype

    @staticmethod
    def jvp(ctx, weight_t, g_t, *_):
        raw = ctx.weight.to(ctx.norms.dtype)
        norms = reference.row_norms(raw, ctx.dim)
        direction = raw / reference.per_row(norms, raw, ctx.dim)
        tangent = torch.zeros_like(raw)
        if weight_t is not None:
            along = reference.row_sums(direction * weight_t, ctx.dim)
            across = weight_t - reference.per_row(along, raw, ctx.dim) * direction
            tangent = reference.per_row(ctx.g / norms, raw, ctx.dim) * across
        if g_t is not None:
            tangent = tangent + reference.per_row(g_t, raw, ctx.dim) * direction
        return tangent.to(ctx.out_dtype), None


WeightNormJoined = joined(WeightNormEager)
differentiable(weight_norm_fwd, WeightNormFunction)


def apply(weight: Tensor, g: Tensor, dim: int, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(out, norms), differentiable in weight and g; see ``reference.py`` for the maths."""
    if inlined():
        raw = weight.to(opmath(weight.dtype))
        out = reference.apply(raw, g.to(raw.dtype), dim).to(out_dtype or weight.dtype)
        return out, reference.row_norms(raw, dim).detach()
    return variant(WeightNormFunction, WeightNormEager, WeightNormJoined).apply(weight, g, dim, out_dtype)
