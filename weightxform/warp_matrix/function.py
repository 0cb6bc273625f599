"""Warp matrices as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import outside_autocast, unrounded
from ..autograd import differentiable, guard, inlined, joined, through_ops, variant
from . import reference
from .op import warp_matrix_bwd, warp_matrix_fwd

_backward, _tangent = outside_autocast(reference.backward), outside_autocast(reference.tangent)


class Options(NamedTuple):
    """Which warp of which kernel; see ``reference.py``."""

    kind: str
    height: int
    width: int
    dy: float = 1.0
    dx: float = 1.0
    interpolation: str = "bilinear"
    padding: str = "zeros"


class WarpMatrixFunction(torch.autograd.Function):
    """``(params [B, P], *options) -> A [B, K, K]``."""

    @staticmethod
    def forward(params, kind, height, width, dy, dx, interpolation, padding):  # written out: Dynamo miscounts *options
        return warp_matrix_fwd(params, kind, height, width, dy, dx, interpolation, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.params, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("warp_matrix", (ctx.params,))

    @staticmethod
    def backward(ctx, grad):
        nothing = (None,) * len(ctx.options)
        if grad is None:
            return None, *nothing
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        if through_ops():
            return warp_matrix_bwd(grad.contiguous(), ctx.params, *ctx.options), *nothing
        return _backward(grad, ctx.params, *ctx.options), *nothing

    @staticmethod
    def vmap(info, in_dims, params, *options):
        folded = params.movedim(in_dims[0], 0)
        a = apply(folded.flatten(0, 1), Options(*options))
        return a.reshape(*folded.shape[:2], *a.shape[1:]), 0


class WarpMatrixEager(WarpMatrixFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def jvp(ctx, params_t, *_):
        return _tangent(params_t, ctx.params, *ctx.options)


WarpMatrixJoined = joined(WarpMatrixEager)
differentiable(warp_matrix_fwd, WarpMatrixFunction)


def apply(params: Tensor, options: Options) -> Tensor:
    """A [B, K, K] of params [B, P], float64 or float32, differentiable."""
    params = params.contiguous()
    if inlined():
        return reference.forward(unrounded(params), *options).to(params.dtype)
    return variant(WarpMatrixFunction, WarpMatrixEager, WarpMatrixJoined).apply(params, *options)
