"""The norm of a vector needs no iteration: sigma = |w|, with its exact derivatives of any order::

out = gain s(sigma) w,  dw = gain (s dout + s' <dout, w> w/sigma),  s as in ``reference.py``, sigma at least eps
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import dense, guard, joined, variant
from ..numerics import opmath
from . import reference


def _parts(weight: Tensor, eps: float, bound: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """s(sigma), s'(sigma) and the unit vector d sigma / d weight, each a function of ``weight``."""
    norm = torch.linalg.vector_norm(weight)
    sigma = torch.where(norm == 0, norm, norm.clamp_min(eps))
    s, ds = reference.scale(sigma, bound)
    return s, torch.where(norm < eps, torch.zeros_like(ds), ds), weight / torch.where(norm == 0, 1.0, sigma)


class VectorNormFunction(torch.autograd.Function):
    """``(weight, gain, eps, bound, out_dtype) -> out``."""

    @staticmethod
    def forward(weight, gain, eps, bound, out_dtype):
        raw = weight.to(opmath(weight.dtype))
        s, _, _ = _parts(raw, eps, bound)
        return (raw * (s if gain is None else s * gain.to(raw.dtype))).to(out_dtype or weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.gain, ctx.eps, ctx.bound, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("spectral_norm", (ctx.weight, ctx.gain))

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 5
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        dtype = opmath(ctx.weight.dtype)
        g, raw = dense(dout).to(dtype), ctx.weight.to(dtype)
        s, ds, direction = _parts(raw, ctx.eps, ctx.bound)
        radial = (g * raw).sum()
        dweight = s * g + (ds * radial) * direction
        if ctx.gain is not None:
            dweight = ctx.gain.to(dtype) * dweight
        dgain = (s * radial).to(ctx.gain.dtype) if ctx.gain is not None and ctx.needs_input_grad[1] else None
        return dweight.to(ctx.weight.dtype) if ctx.needs_input_grad[0] else None, dgain, None, None, None

    @staticmethod
    def vmap(info, in_dims, weight, gain, *options):
        def member(tensor: Tensor | None, d: int | None, i: int) -> Any:
            return tensor if d is None or tensor is None else tensor.select(d, i)

        outs = [
            apply_vector(member(weight, in_dims[0], i), member(gain, in_dims[1], i), *options)
            for i in range(info.batch_size)
        ]
        return torch.stack(outs), 0


class VectorNormEager(VectorNormFunction):
    """The same with forward-mode AD, which Dynamo cannot trace."""

    @staticmethod
    def jvp(ctx, weight_t, gain_t, *_):
        raw = ctx.weight.to(opmath(ctx.weight.dtype))
        s, ds, direction = _parts(raw, ctx.eps, ctx.bound)
        tangent = torch.zeros_like(raw)
        if weight_t is not None:
            along = (direction * weight_t.to(raw.dtype)).sum()
            tangent = s * weight_t + (ds * along) * raw
            if ctx.gain is not None:
                tangent = ctx.gain * tangent
        if gain_t is not None:
            tangent = tangent + gain_t * s * raw
        return tangent.to(ctx.weight.dtype)


VectorNormJoined = joined(VectorNormEager)


def apply_vector(
    weight: Tensor, gain: Tensor | None, eps: float, bound: float | None, out_dtype: torch.dtype | None
) -> Tensor:
    """``weight`` [n] over its norm (or what ``bound`` and ``gain`` make of it), differentiable in weight and gain."""
    function = variant(VectorNormFunction, VectorNormEager, VectorNormJoined)
    return function.apply(weight, gain, eps, bound, out_dtype)
