"""Spectral normalization as ``torch.autograd.Function``s with explicit backward passes; see ``autograd.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import outside_autocast, unrounded
from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from . import reference
from .op import spectral_norm_bwd, spectral_norm_bwd_list, spectral_norm_fwd, spectral_norm_fwd_list, state_size


@outside_autocast
def _differentiable_backward(dout: Tensor, weight: Tensor, state: Tensor, gain: Tensor | None, dim: int, bound: Any):
    """(dweight, dgain) in torch ops that autograd and vmap see through; sigma is a function of weight again."""
    h, w = reference.matrix_shape(weight, dim)
    u, v, _ = state.split([h, w, 1])
    g, raw = dout.to(state.dtype), weight.to(state.dtype)
    s, ds = reference.scale(u @ (reference.as_matrix(raw, dim) @ v), bound)
    radial = (g * raw).sum()
    dweight = s * g + (ds * radial) * reference.from_matrix(torch.outer(u, v), weight, dim)
    if gain is not None:
        dweight = gain * dweight
    return dweight.to(weight.dtype), s * radial


class SpectralNormFunction(torch.autograd.Function):
    """``(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype) -> (out, state)``."""

    @staticmethod
    def forward(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype):
        return spectral_norm_fwd(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, _, _, ctx.gain, ctx.dim, _, _, _, ctx.bound, _ = inputs
        ctx.state = output[1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("spectral_norm", (ctx.weight, ctx.gain))

    @staticmethod
    def backward(ctx, dout, dstate):
        if dout is None:
            return (None,) * 10
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        backward = spectral_norm_bwd if through_ops() else _differentiable_backward
        dweight, dgain = backward(dense(dout), ctx.weight, ctx.state, ctx.gain, ctx.dim, ctx.bound)
        dgain = dgain.to(ctx.gain.dtype) if ctx.gain is not None and ctx.needs_input_grad[3] else None
        return (dweight if ctx.needs_input_grad[0] else None, None, None, dgain, *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, weight, u, v, gain, *options):
        def member(tensor: Tensor | None, d: int | None, i: int) -> Any:
            return tensor if d is None or tensor is None else tensor.select(d, i)

        members = [
            apply(*(member(t, d, i) for t, d in zip((weight, u, v, gain), in_dims, strict=False)), *options)
            for i in range(info.batch_size)
        ]
        outs, states = zip(*members, strict=True)
        return (torch.stack(outs), torch.stack(states)), (0, 0)


class SpectralNormEager(SpectralNormFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        SpectralNormFunction.setup_context(ctx, inputs, output)
        ctx.out_dtype = output[0].dtype

    @staticmethod
    @outside_autocast
    def jvp(ctx, weight_t, u_t, v_t, gain_t, *_):
        weight, state, gain = ctx.weight.to(ctx.state.dtype), ctx.state, ctx.gain
        h, w = reference.matrix_shape(weight, ctx.dim)
        u, v, _ = state.split([h, w, 1])
        s, ds = reference.scale(u @ (reference.as_matrix(weight, ctx.dim) @ v), ctx.bound)
        tangent = torch.zeros_like(weight)
        if weight_t is not None:
            along = u @ (reference.as_matrix(weight_t.to(weight.dtype), ctx.dim) @ v)
            tangent = s * weight_t + (ds * along) * weight
            if gain is not None:
                tangent = gain * tangent
        if gain_t is not None:
            tangent = tangent + gain_t * s * weight
        return tangent.to(ctx.out_dtype), None


def _inline(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype) -> tuple[Tensor, Tensor]:
    """:func:`apply` in torch ops that every transform of ``torch.func`` sees through."""
    state_dtype = opmath(weight.dtype)
    raw = unrounded(weight.to(state_dtype))
    w = reference.as_matrix(raw, dim).detach()
    u, v = reference.iterate(w, u.to(raw.dtype).detach(), v.to(raw.dtype).detach(), n_iter, eps, v_first)
    out = reference.apply(raw, u, v, gain, dim, bound).to(out_dtype or weight.dtype)
    return out, torch.cat([u, v, (u @ (w @ v)).reshape(1)]).to(state_dtype)


SpectralNormJoined = joined(SpectralNormEager)
differentiable(spectral_norm_fwd, SpectralNormFunction)


def apply(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype) -> tuple[Tensor, Tensor]:
    """(out, state) for one weight, differentiable in weight and gain; see ``reference.py`` for the maths."""
    if inlined():
        return _inline(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype)
    function = variant(SpectralNormFunction, SpectralNormEager, SpectralNormJoined)
    return function.apply(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype)


class SpectralNormListFunction(torch.autograd.Function):
    """``((dims, n_iters, eps, v_first, bound, out_dtype), us, vs, *weights, *gains) -> (*outs, state)``."""

    @staticmethod
    def forward(options, us, vs, *tensors):
        dims, n_iters, eps, v_first, bound, out_dtype = options
        weights, gains = tensors[: len(us)], tensors[len(us) :]
        outs, state = spectral_norm_fwd_list(
            list(weights), list(us), list(vs), list(gains), list(dims), list(n_iters), eps, v_first, bound, out_dtype
        )
        return (*outs, state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        options, us, _, *tensors = inputs
        ctx.dims, ctx.bound = options[0], options[4]
        ctx.weights, ctx.gains = tensors[: len(us)], tensors[len(us) :]
        ctx.state = output[-1]
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("spectral_norm", tensors)

    @staticmethod
    def backward(ctx, *grads):
        return (None, None, None, *list_gradients(ctx, grads[:-1]))


def list_gradients(ctx: Any, douts: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of ``ctx.weights`` and ``ctx.gains``; ``None`` for members that nobody used."""
    n = len(douts)
    offsets, at = [], 0
    for weight, dim in zip(ctx.weights, ctx.dims, strict=True):
        offsets.append(at)
        at += state_size(weight, dim)
    used = [i for i in range(n) if douts[i] is not None]
    dweights: list[Tensor | None] = [None] * n
    dgains: list[Tensor | None] = [None] * len(ctx.gains)
    if not used:
        return [*dweights, *dgains]
    if ctx.unchanged is not None:  # of the members that are used: the others may have been written
        ctx.unchanged.check([*used, *(n + i for i in used if ctx.gains)])
    if through_ops():
        gains = [ctx.gains[i] for i in used] if ctx.gains else []
        results, dgain = spectral_norm_bwd_list(
            [dense(douts[i]) for i in used],
            [ctx.weights[i] for i in used],
            ctx.state,
            [offsets[i] for i in used],
            gains,
            [ctx.dims[i] for i in used],
            ctx.bound,
        )
        for k, i in enumerate(used):
            dweights[i] = results[k]
            if gains:
                dgains[i] = dgain[k].to(gains[k].dtype)
    else:
        for i in used:
            weight, dim = ctx.weights[i], ctx.dims[i]
            state = ctx.state[offsets[i] : offsets[i] + state_size(weight, dim)]
            gain = ctx.gains[i] if ctx.gains else None
            dweights[i], dgain = _differentiable_backward(dense(douts[i]), weight, state, gain, dim, ctx.bound)
            if gain is not None:
                dgains[i] = dgain.to(gain.dtype)
    return [*dweights, *dgains]


SpectralNormListJoined = joined(SpectralNormListFunction)


class _ListOp:
    """The same with the arguments and outputs of the op, which are lists."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        weights, us, vs, gains, dims, *rest = inputs
        outs, state = output
        flat = ((dims, *rest), us, vs, *weights, *gains)
        SpectralNormListFunction.setup_context(ctx, flat, (*outs, state))

    @staticmethod
    def backward(ctx, douts, dstate):
        n = len(ctx.weights)
        _, _, _, *grads = SpectralNormListFunction.backward(ctx, *douts, dstate)
        return (grads[:n], [None] * n, [None] * n, grads[n:], *(None,) * 6)


differentiable(spectral_norm_fwd_list, _ListOp)


def apply_list(
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
    """(outs, state) for many weights of one dtype and device in one call; gains is empty or one a member."""
    if inlined():
        gained: Sequence[Tensor | None] = gains or [None] * len(weights)
        members = zip(weights, us, vs, gained, dims, n_iters, strict=True)
        pairs = [_inline(w, u, v, g, d, n, eps, v_first, bound, out_dtype) for w, u, v, g, d, n in members]
        results, states = zip(*pairs, strict=True)
        return list(results), torch.cat(states)
    options = (tuple(dims), tuple(n_iters), eps, v_first, bound, out_dtype)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # Dynamo miscounts *tensors there
        outs, state = spectral_norm_fwd_list(
            list(weights), list(us), list(vs), list(gains), list(dims), list(n_iters), eps, v_first, bound, out_dtype
        )
        return outs, state
    function = variant(SpectralNormListFunction, SpectralNormListFunction, SpectralNormListJoined)
    *outs, state = function.apply(options, list(us), list(vs), *weights, *gains)
    return outs, state
