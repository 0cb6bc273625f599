"""Modulation as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import outside_autocast, unrounded
from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from . import reference
from .op import modulate_bwd, modulate_fwd


@outside_autocast
def _differentiable_backward(grad, weight, style, demodulate, eps):
    """As the op, in torch ops that autograd and vmap see through; d is a function of both again."""
    d = reference.scales(weight, style, demodulate, eps)
    dweight, dstyle = reference.gradients(grad, weight, style, d, demodulate)
    return dweight.to(weight.dtype), dstyle


class ModulateFunction(torch.autograd.Function):
    """``(weight [O, I, K], style [N, I], demodulate, eps, out_dtype) -> (out [N, O, I, K], d [N, O])``."""

    @staticmethod
    def forward(weight, style, demodulate, eps, out_dtype):
        return modulate_fwd(weight, style, demodulate, eps, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.style, ctx.demodulate, ctx.eps, _ = inputs
        ctx.d = output[1]
        ctx.mark_non_differentiable(ctx.d)
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("modulate", (ctx.weight, ctx.style))

    @staticmethod
    def backward(ctx, grad, _):
        need_weight, need_style, *_ = ctx.needs_input_grad
        if grad is None or not (need_weight or need_style):
            return None, None, None, None, None
        if ctx.unchanged is not None:
            # without demodulation each of them reads the other
            ctx.unchanged.check(None if ctx.demodulate else [1] * need_weight + [0] * need_style)
        weight, style = ctx.weight, ctx.style
        if through_ops():
            dweight, dstyle = modulate_bwd(
                dense(grad).contiguous(), weight, style, ctx.d, ctx.demodulate, need_weight, need_style
            )
        else:
            dweight, dstyle = _differentiable_backward(grad, weight, style, ctx.demodulate, ctx.eps)
        return dweight if need_weight else None, dstyle if need_style else None, None, None, None

    @staticmethod
    def vmap(info, in_dims, weight, style, demodulate, eps, out_dtype):
        of_weight, of_style, *_ = in_dims
        if of_weight is None:  # more samples
            folded = style.movedim(of_style, 0)
            out, d = _both(weight, folded.flatten(0, 1), demodulate, eps, out_dtype)
            return (out.unflatten(0, folded.shape[:2]), d.unflatten(0, folded.shape[:2])), (0, 0)
        members = [
            _both(
                weight.select(of_weight, i),
                style if of_style is None else style.select(of_style, i),
                demodulate,
                eps,
                out_dtype,
            )
            for i in range(info.batch_size)
        ]
        outs, ds = zip(*members, strict=True)
        return (torch.stack(outs), torch.stack(ds)), (0, 0)


class ModulateEager(ModulateFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ModulateFunction.setup_context(ctx, inputs, output)
        ctx.out_dtype = output[0].dtype

    @staticmethod
    @outside_autocast
    def jvp(ctx, weight_t, style_t, *_):
        style = ctx.style
        d = reference.scales(ctx.weight, style, ctx.demodulate, ctx.eps)  # ctx.d has no graph, which reverse mode needs
        w = ctx.weight.to(style.dtype)
        energy = (w**2).sum(-1)
        scale_t, sigma_t = torch.zeros_like(d[:, :, None] * style[:, None, :]), torch.zeros_like(d)
        tangent = torch.zeros((), dtype=style.dtype, device=style.device)
        if weight_t is not None:
            wt = weight_t.to(style.dtype)
            sigma_t = sigma_t + 2 * (style**2) @ (w * wt).sum(-1).T
            tangent = wt * (d[:, :, None] * style[:, None, :])[..., None]
        if style_t is not None:
            sigma_t = sigma_t + 2 * (style * style_t) @ energy.T
            scale_t = d[:, :, None] * style_t[:, None, :]
        if ctx.demodulate:
            scale_t = scale_t - (0.5 * d**3 * sigma_t)[:, :, None] * style[:, None, :]
        return (tangent + w * scale_t[..., None]).to(ctx.out_dtype), None


ModulateJoined = joined(ModulateEager)
differentiable(modulate_fwd, ModulateFunction)


def _both(
    weight: Tensor, style: Tensor, demodulate: bool, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    function = variant(ModulateFunction, ModulateEager, ModulateJoined)
    return function.apply(weight.contiguous(), style.contiguous(), demodulate, eps, out_dtype)


def apply(weight: Tensor, style: Tensor, demodulate: bool, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """out [N, O, I, K] of weight [O, I, K] and style [N, I], differentiable in both; see ``reference.py``.

    ``style`` is converted to float64 for a float64 weight, else to float32.
    """
    style = style.to(opmath(weight.dtype))
    if inlined():
        return reference.apply(weight, unrounded(style), demodulate, eps).to(out_dtype or weight.dtype)
    return _both(weight, style, demodulate, eps, out_dtype)[0]
