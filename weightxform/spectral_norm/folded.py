"""Layers that never write their normalized weight: s(sigma) goes to the activations.

With W the raw weight, s, s' and c as in ``reference.py``, g the gain, x the input, dy the gradient of the output, and
``x * W`` the product (or the convolution) of the layer:

    y  = g s (x * W) + b
    dx = g s (dy * W')                    the layer's own gradient by its input, with W for the normalized weight
    dW = g (s G - r / sigma  u v')        G: its gradient by its weight; the rank-one term where s is c / sigma
    r  = s <G, W> = dgain

The inner product needs no pass over the weight, because the layer is bilinear: <G, W> = <dy, x * W> = <dx_raw, x>, with
dx_raw = dy * W', which is computed anyway. (Not from y, which plain layers do not save and which an activation may
overwrite.) Where x takes no gradient, x * W is kept if it is small; else, or where x has more elements than W, G goes
through the op of the unfolded form.
The rank-one term rides on the product that makes G, as one more row of its operands, if those are smaller than W; else
it is added to G, in one pass. g is never divided by: it may be 0.

In numbers, for matrix products in float32 and float64 on the CPU, s goes into the product (``alpha``), and no pass is
added anywhere. Elsewhere s is a tensor (reading it would wait for the GPU) and scales y and dy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import dense, guard, joined, through_ops, variant
from . import reference
from .function import _differentiable_backward
from .op import spectral_norm_bwd


class Plan(NamedTuple):
    """What a layer does with its weight."""

    dim: int  # the axis of u
    bound: float | None
    gain: float  # fixed; 1 where it is learned
    conv: tuple | None  # stride, padding, dilation, groups; None for a matrix product


@dataclass
class Numbers:
    """The factors, where they may be read."""

    s: float
    pull: float  # 1 / sigma where s is c / sigma, else 0
    gain: float
    keeps: bool = False  # x * W itself, for the backward
    product: Tensor | None = None


def numbers(state: Tensor, gain: Tensor | None, plan: Plan) -> Numbers | None:
    """``None`` where a product by them would not be what the unfolded weight gives: NaN and Inf, 0 times them."""
    sigma = state[-1].item()
    c = 1.0 if plan.bound is None else plan.bound
    active = sigma != 0 if plan.bound is None else sigma > c
    s, g = c / sigma if active else 1.0, plan.gain if gain is None else gain.item()
    largest = torch.finfo(state.dtype).max
    if not (math.isfinite(sigma) and torch.finfo(state.dtype).tiny <= abs(g * s) <= largest and abs(s) <= largest):
        return None
    return Numbers(s, 1 / sigma if active else 0.0, g)


def _factors(state: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """s and pull as tensors [1] (not 0-dim, which would be rounded to the half type that they multiply).

    A state is one value of the weight, so its factors are kept on it.
    """
    kept = None if torch.compiler.is_compiling() else getattr(state, "_wx_factors", None)
    if kept is not None:
        return kept
    sigma = state[-1:]
    s, ds = reference.scale(sigma, bound)
    factors = s, torch.where(ds != 0, sigma.reciprocal(), 0.0)
    if not torch.compiler.is_compiling():
        state._wx_factors = factors  # type: ignore[attr-defined]
    return factors


def _times(x: Tensor, k: Tensor) -> Tensor:
    """k x in the dtype of x; rounded once, as :meth:`Tensor.mul_` by a factor of a wider dtype does."""
    return x * k if x.dtype == k.dtype else x.clone().mul_(k)


def _inner(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """<a, b> as a tensor [1]."""
    if a.dtype != dtype and torch.compiler.is_compiling():
        a, b = a.to(dtype), b.to(dtype)
    return (a * b).sum(dtype=dtype).reshape(1)


def _inner_rows(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of matrices, 0-dim: rows in one pass each, then in double precision."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).sum(dtype=torch.float64).to(a.dtype)


def _raw_product(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    if plan.conv is None:
        return x @ w.t()
    stride, padding, dilation, groups = plan.conv
    return torch.ops.aten.convolution(x, w, None, stride, padding, dilation, False, (0,) * len(stride), groups)


def _raw_gradients(
    dy: Tensor, x: Tensor | None, shape: torch.Size, w: Tensor, plan: Plan, needs: tuple[bool, bool]
) -> tuple[Any, Any]:
    """(dy * W', G), those of them that are needed; ``shape``: of x, which is ``None`` where it was not kept."""
    if plan.conv is None:
        return dy @ w if needs[0] else None, dy.t() @ x if needs[1] else None  # type: ignore[operator]
    stride, padding, dilation, groups = plan.conv
    x = dy.new_empty(1).expand(shape) if x is None else x
    options = stride, padding, dilation, False, (0,) * len(stride), groups
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *options, (*needs, False))
    return dx, dw


def _along(vector: Tensor, axis: int | None, like: Tensor, dim: int) -> Tensor:
    """u (``axis`` = dim) or v (``None``) as a tensor that broadcasts to the weight."""
    if axis is not None:
        return vector.view([-1 if i == dim else 1 for i in range(like.ndim)])
    return vector.view([1 if i == dim else n for i, n in enumerate(like.shape)])


def _rides(x: Tensor, w: Tensor) -> bool:
    """Whether another row of x [b, n] and dy [b, m] costs less than a pass over the weight [m, n]."""
    return x.shape[0] * (w.shape[0] + w.shape[1]) < w.shape[0] * w.shape[1]


def _by_activations(x: Any, w: Tensor, needs: tuple[bool, bool, bool]) -> bool:
    """Whether <G, W> is needed, and <dx, x> gives it at less cost."""
    needs_x, needs_w, needs_gain = needs
    return needs_x and (needs_w or needs_gain) and (not needs_w or x.numel() <= w.numel())


def _by_weight(dout: Tensor, weight: Tensor, gain: Tensor | None, state: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(dW, dgain) from G, as in the unfolded form."""
    if gain is None and plan.gain != 1:
        gain = state.new_full((), plan.gain)
    return spectral_norm_bwd(dout, weight, state, gain, plan.dim, plan.bound)


def _with_row(x: Tensor, row: Tensor) -> Tensor:
    return torch.cat([x, row.unsqueeze(0)])


# numbers: matrix products in float32 and float64 on the CPU


def _product_by_numbers(x: Tensor, w: Tensor, bias: Tensor | None, n: Numbers) -> Tensor:
    k = n.gain * n.s
    if n.keeps:
        n.product = x @ w.t()
        return n.product * k if bias is None else torch.add(bias, n.product, alpha=k)
    if bias is None:
        return torch.addmm(x.new_empty(()), x, w.t(), beta=0, alpha=k)
    return torch.addmm(bias, x, w.t(), alpha=k)


def _backward_by_numbers(
    dy: Tensor, x: Any, w: Tensor, gain: Tensor | None, state: Tensor, plan: Plan, n: Numbers,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    needs_x, needs_w, needs_gain = needs
    nothing = dy.new_empty(())
    dx = None
    if n.product is not None and not needs_x:
        r = _inner_rows(dy, n.product) * n.s
    elif not _by_activations(x, w, needs):
        dx = torch.addmm(nothing, dy, w, beta=0, alpha=n.gain * n.s) if needs_x else None
        return dx, *(_by_weight(dy.t() @ x, w, gain, state, plan) if needs_w or needs_gain else (None, None))
    else:
        dx = torch.addmm(nothing, dy, w, beta=0, alpha=n.s)
        r = _inner_rows(dx, x)
        if n.gain != 1:
            dx.mul_(n.gain)
    if not needs_w:
        return dx, None, r
    u, v, _ = state.split([*reference.matrix_shape(w, plan.dim), 1])
    left, right = (u, v) if plan.dim == 0 else (v, u)
    if _rides(x, w):
        row = right * (r * (-n.pull / n.s))
        dw = torch.addmm(nothing, _with_row(dy, left).t(), _with_row(x, row), beta=0, alpha=n.gain * n.s)
    else:
        dw = torch.addmm(nothing, dy.t(), x, beta=0, alpha=n.gain * n.s)
        dw.addr_(left, right * (r * (-n.gain * n.pull)))
    return dx, dw, r


# tensors: everything else


def _product(x: Tensor, w: Tensor, bias: Tensor | None, gain: Tensor | None, state: Tensor, plan: Plan) -> Tensor:
    k = _factors(state, plan.bound)[0]
    if gain is not None:
        k = k * gain.to(k.dtype)
    elif plan.gain != 1:
        k = k * plan.gain
    y = _raw_product(x, w, plan)
    if bias is None:
        return y.mul_(k)
    if plan.conv is not None:
        bias = bias.view(-1, *(1,) * len(plan.conv[0]))
    if torch.compiler.is_compiling():
        return torch.addcmul(bias, y, k).to(y.dtype)
    return torch.addcmul(bias, y, k, out=y)


def _backward(
    dy: Tensor, x: Any, shape: torch.Size, weight: Tensor, w: Tensor, gain: Tensor | None, state: Tensor, plan: Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``w``: the weight in the dtype of the layer, ``weight``: in its own."""
    needs_x, needs_w, needs_gain = needs
    s, pull = _factors(state, plan.bound)
    learned = None if gain is None else gain.to(s.dtype).reshape(1)
    if not _by_activations(x, w, needs):
        learns = needs_w or needs_gain
        dx, dout = _raw_gradients(dy, x, shape, w, plan, (needs_x, learns))
        if dx is not None:
            dx.mul_(s * (plan.gain if learned is None else learned))
        return dx, *(_by_weight(dout, weight, gain, state, plan) if learns else (None, None))
    dy = _times(dy, s if plan.gain == 1 else s * plan.gain)
    rides = gain is None and plan.conv is None and dy.dtype == s.dtype and _rides(x, w)
    dx, dw = _raw_gradients(dy, x, shape, w, plan, (True, needs_w and not rides))
    r = _inner(dx, x, s.dtype)
    if learned is not None:
        dx.mul_(learned)
    if needs_w:
        u, v, _ = state.split([*reference.matrix_shape(weight, plan.dim), 1])
        u = u * (-pull * r)
        if rides:
            left, right = (u, v) if plan.dim == 0 else (v, u)
            dw = _with_row(dy, left).t() @ _with_row(x, right)
        else:
            u, v = _along(u, plan.dim, weight, plan.dim), _along(v, None, weight, plan.dim)
            same = dw.dtype == weight.dtype and (learned is None or dw.dtype == s.dtype)
            dw = dw.addcmul_(u, v) if same else torch.addcmul(dw, u, v)
            dw = (dw if learned is None else dw.mul_(learned)).to(weight.dtype)
    return dx, dw, r.reshape(())


def _differentiable(
    dy: Tensor, x: Tensor | None, shape: torch.Size, weight: Tensor, gain: Tensor | None, state: Tensor, plan: Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The unfolded form, in torch ops that autograd and vmap see through; sigma is a function of weight again."""
    u, v, _ = state.split([*reference.matrix_shape(weight, plan.dim), 1])
    if gain is None and plan.gain != 1:
        gain = state.new_full((), plan.gain)
    w = reference.apply(weight.to(state.dtype), u, v, gain, plan.dim, plan.bound).to(dy.dtype)
    learns = needs[1] or needs[2]
    dx, dout = _raw_gradients(dy, x, shape, w, plan, (needs[0], learns))
    if dout is None:
        return dx, None, None
    return dx, *_differentiable_backward(dout, weight, state, gain, plan.dim, plan.bound)


class FoldedFunction(torch.autograd.Function):
    """``(x, weight, w, bias, gain, state, plan, numbers) -> y``; w: the weight in the dtype of x if it has another."""

    @staticmethod
    def forward(x, weight, w, bias, gain, state, plan, n):
        if n is not None:
            return _product_by_numbers(x, weight, bias, n)
        return _product(x, weight if w is None else w, bias, gain, state, plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.weight, ctx.w, _, ctx.gain, ctx.state, ctx.plan, ctx.numbers = inputs
        ctx.shape = x.shape
        if ctx.weight.requires_grad or (ctx.gain is not None and ctx.gain.requires_grad):
            ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("a folded spectral_norm", (ctx.weight, ctx.gain))

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 8
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return FoldedFunction.gradients(ctx, dense(dy))
        return FoldedFunction.gradients(ctx, dense(dy))

    @staticmethod
    def gradients(ctx, dy):
        weight, gain, state, plan = ctx.weight, ctx.gain, ctx.state, ctx.plan
        x = next(iter(ctx.saved_tensors), None)  # asked for once, as non-reentrant checkpoints want it
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        if not through_ops():
            dx, dw, dgain = _differentiable(dy, x, ctx.shape, weight, gain, state, plan, needs)
        elif ctx.numbers is not None:
            dx, dw, dgain = _backward_by_numbers(dy, x, weight, gain, state, plan, ctx.numbers, needs)
        else:
            w = weight if ctx.w is None else ctx.w
            dx, dw, dgain = _backward(dy, x, ctx.shape, weight, w, gain, state, plan, needs)
        dbias = dy.sum([i for i in range(dy.ndim) if i != 1]) if ctx.needs_input_grad[3] else None
        return (
            dx if needs[0] else None, dw if needs[1] else None, None, dbias,
            None if gain is None or dgain is None or not needs[2] else dgain.to(gain.dtype), None, None, None,
        )  # fmt: skip


FoldedJoined = joined(FoldedFunction)


def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, state: Tensor, plan: Plan, n: Numbers | None
) -> Tensor:
    """y of x [b, in], or of a batch for a convolution; differentiable in x, weight, bias and gain.

    x and bias have one dtype, that of the weight, or the one that autocast gives it. Not for torch.func.
    """
    w = None if x.dtype == weight.dtype else _cast(weight, state, x.dtype)
    tensors: tuple[Any, ...] = (x, weight, bias, gain)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return FoldedFunction.forward(x, weight, w, bias, gain, state, plan, n)
    if n is not None and not x.requires_grad:
        n.keeps = 8 * x.shape[0] * weight.shape[0] <= weight.numel()
    function = variant(FoldedFunction, FoldedFunction, FoldedJoined)
    return function.apply(x, weight, w, bias, gain, state, plan, n)


def _cast(weight: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of the weight: once for each value of it."""
    if torch.compiler.is_compiling():
        return weight.detach().to(dtype)
    kept = getattr(state, "_wx_cast", None)
    if kept is None or kept.dtype != dtype:
        kept = state._wx_cast = weight.detach().to(dtype)  # type: ignore[attr-defined]
    return kept
