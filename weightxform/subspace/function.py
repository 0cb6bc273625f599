"""theta = theta0 + P z as a ``torch.autograd.Function`` with an explicit backward; see ``autograd.py``.

Linear in z and in theta0, so its derivatives are itself: the backward is P' g, the backward of that is P again (with no
theta0), and forward-mode AD is P of the tangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import outside_autocast
from ..autograd import dense, differentiable, guard, joined, through_ops, variant
from ..numerics import opmath
from . import op

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def _is_batched(t: Tensor) -> bool:
    """Of the older vmap, which is behind ``autograd.grad(..., is_grads_batched=True)``?"""
    return torch._C._dispatch_keys(t).has(_BATCHED)


class Call(NamedTuple):
    """Which P, besides its tensors, and which of its rows. ``forward(z, tables, theta0)``, ``backward(grads, ...)``."""

    kind: str
    dim: int
    members: tuple[int, ...]
    firsts: tuple[int, ...]
    options: tuple

    def of(self, which: Sequence[int]) -> Call:
        """The same for some of the tensors."""
        return self._replace(members=tuple(self.members[i] for i in which), firsts=tuple(self.firsts[i] for i in which))

    def forward(self, z: Tensor, tables: Sequence[Any], theta0: Sequence[Tensor]) -> list[Tensor]:
        if self.kind == "dense":
            (basis,) = tables
            return op.subspace_dense_fwd(z, basis, list(theta0), self._rows())
        if self.kind == "kronecker":
            return _kronecker_forward(self, z, tables, theta0)
        c, layout, factors, step = tables
        members, firsts = list(self.members), list(self.firsts)
        return op.subspace_fwd(z, c, list(theta0), members, firsts, layout, factors, step, self.kind, *self.options)

    def backward(self, grads: Sequence[Tensor], tables: Sequence[Any], batch: int) -> Tensor:
        if not torch.compiler.is_compiling() and any(map(_is_batched, grads)):
            return self._backward_batched(grads, tables, batch)
        if self.kind == "dense":
            (basis,) = tables
            return op.subspace_dense_bwd(list(grads), basis, self._rows(), batch)
        if self.kind == "kronecker":
            return _kronecker_backward(self, grads, tables, batch)
        c, layout, factors, step = tables
        members, firsts, kind, options = list(self.members), list(self.firsts), self.kind, self.options
        return op.subspace_bwd(list(grads), c, members, firsts, layout, factors, step, kind, self.dim, batch, *options)

    def _backward_batched(self, grads: Sequence[Tensor], tables: Sequence[Any], batch: int) -> Tensor:
        """The older vmap gives no batch to an op of lists of tensors."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        size = next(len(torch._remove_batch_dim(g, level, 0, 0)) for g in grads if _is_batched(g))
        full = [torch._remove_batch_dim(g, level, size, 0) for g in grads]
        if batch:
            z_bar = torch.stack([self.backward([g[i] for g in full], tables, batch) for i in range(size)])
        else:
            z_bar = self.backward(full, tables, size)
        return torch._add_batch_dim(z_bar, 0, level)

    def _rows(self) -> list[int]:
        """Where each tensor begins among the rows of a stored P; ``options`` are the starts of all of them."""
        return [self.options[m] + first for m, first in zip(self.members, self.firsts, strict=True)]


@outside_autocast
def _kronecker_forward(call: Call, z: Tensor, tables: Sequence[Tensor], theta0: Sequence[Tensor]) -> list[Tensor]:
    p1, p2 = tables
    d1, d2 = p1.shape[1], p2.shape[1]
    square = torch.nn.functional.pad(z, (0, d1 * d2 - call.dim)).unflatten(-1, (d1, d2))
    y = (p1 @ square @ p2.T).flatten(-2)
    outs = []
    for t0, row in zip(theta0, call._rows(), strict=True):
        theta = (t0.reshape(-1).to(z.dtype) + y[..., row : row + t0.numel()]).to(t0.dtype)
        theta = theta.reshape((*z.shape[:-1], *t0.shape))
        outs.append(theta if z.ndim > 1 else torch.empty_like(t0).copy_(theta))
    return outs


@outside_autocast
def _kronecker_backward(call: Call, grads: Sequence[Tensor], tables: Sequence[Tensor], batch: int) -> Tensor:
    p1, p2 = tables
    lead = (batch,) if batch else ()
    full = p1.new_zeros((*lead, p1.shape[0] * p2.shape[0]))
    for grad, row in zip(grads, call._rows(), strict=True):
        flat = grad.reshape(*lead, -1).to(p1.dtype)
        full[..., row : row + flat.shape[-1]] = flat
    square = p1.T @ full.unflatten(-1, (p1.shape[0], p2.shape[0])) @ p2
    return square.flatten(-2)[..., : call.dim].contiguous()


def _zeros(like: Sequence[Tensor]) -> list[Tensor]:
    """No theta0: zeros of these shapes that take no memory; kernels read one number."""
    return [t.new_zeros(()).expand(t.shape) for t in like]


class ProjectFunction(torch.autograd.Function):
    """``(call, number of tables, z, *tables, *theta0) -> thetas``."""

    @staticmethod
    def forward(call, n, z, *tensors):
        return tuple(call.forward(z, tensors[:n], tensors[n:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.n, z, *tensors = inputs
        ctx.tables = tensors[: ctx.n]
        ctx.batch = 0 if z.ndim == 1 else z.shape[0]
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("Subspace", ctx.tables)  # the step of a redrawn P, a basis

    @staticmethod
    def backward(ctx, *douts):
        used = [i for i, dout in enumerate(douts) if dout is not None]
        _, _, need_z, *need = ctx.needs_input_grad
        z_bar = None
        if need_z and used:
            if ctx.unchanged is not None:
                ctx.unchanged.check()
            z_bar = adjoint(ctx.call.of(used), ctx.tables, [dense(douts[i]) for i in used], ctx.batch)
        of_theta0: list[Any] = [None] * len(douts)
        for i in used:
            if need[ctx.n + i]:
                of_theta0[i] = douts[i].sum(0) if ctx.batch else douts[i]
        return (None, None, z_bar, *(None,) * ctx.n, *of_theta0)

    @staticmethod
    def vmap(info, in_dims, call, n, z, *tensors):
        _, _, z_dim, *dims = in_dims
        tables, theta0 = tensors[:n], tensors[n:]
        if z_dim is not None and z.ndim == 2 and all(d is None for d in dims[n:]):  # K share one generation of P
            return tuple(project(call, tables, z.movedim(z_dim, 0), theta0)), (0,) * len(theta0)
        members = []
        for i in range(info.batch_size):
            own = [t if d is None else t.select(d, i) for t, d in zip(theta0, dims[n:], strict=True)]
            members.append(project(call, tables, z if z_dim is None else z.select(z_dim, i), own))
        outs = tuple(torch.stack(column) for column in zip(*members, strict=True))
        return outs, (0,) * len(outs)


class ProjectEager(ProjectFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def jvp(ctx, _call, _n, z_t, *tangents):
        theta0_t = tangents[ctx.n :]
        outs = _zeros(ctx.theta0) if z_t is None else project(ctx.call, ctx.tables, z_t, _zeros(ctx.theta0))
        return tuple(o.clone() if t is None else o + t for o, t in zip(outs, theta0_t, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ProjectFunction.setup_context(ctx, inputs, output)
        ctx.theta0 = [t.detach() for t in inputs[3 + ctx.n :]]


class AdjointFunction(torch.autograd.Function):
    """``(call, number of tables, batch, *tables, *gradients) -> z_bar``."""

    @staticmethod
    def forward(call, n, batch, *tensors):
        return call.backward(tensors[n:], tensors[:n], batch)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.n, ctx.batch, *tensors = inputs
        ctx.tables = tensors[: ctx.n]
        ctx.like = [t.detach() for t in tensors[ctx.n :]]
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("Subspace", ctx.tables)

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * (3 + ctx.n + len(ctx.like))
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        like = [t[0] for t in ctx.like] if ctx.batch else ctx.like
        return (None,) * (3 + ctx.n) + tuple(project(ctx.call, ctx.tables, dout, _zeros(like)))

    @staticmethod
    def vmap(info, in_dims, call, n, batch, *tensors):
        _, _, _, *dims = in_dims
        tables, grads = tensors[:n], tensors[n:]
        size = info.batch_size
        full = [
            g.expand(size, *g.shape) if d is None else g.movedim(d, 0) for g, d in zip(grads, dims[n:], strict=True)
        ]
        if batch:
            return torch.stack([adjoint(call, tables, [g[i] for g in full], batch) for i in range(size)]), 0
        return adjoint(call, tables, full, size), 0


class AdjointEager(AdjointFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def jvp(ctx, _call, _n, _batch, *tangents):
        given = tangents[ctx.n :]
        used = [i for i, t in enumerate(given) if t is not None]
        return adjoint(ctx.call.of(used), ctx.tables, [given[i] for i in used], ctx.batch)


ProjectJoined = joined(ProjectEager)
AdjointJoined = joined(AdjointEager)


def adjoint(call: Call, tables: Sequence[Any], grads: Sequence[Tensor], batch: int = 0) -> Tensor:
    """P' g, [d] or [batch, d], differentiable in the gradients."""
    if through_ops():
        return call.backward(grads, tables, batch)
    function = variant(AdjointFunction, AdjointEager, AdjointJoined)
    return function.apply(call, len(tables), batch, *tables, *grads)


def project(call: Call, tables: Sequence[Any], z: Tensor, theta0: Sequence[Tensor]) -> list[Tensor]:
    """theta of each tensor in ``theta0`` (one dtype and device), differentiable in z and theta0.

    ``z``: [d], or [K, d] for outputs with K in front; converted to the dtype that the tensors are computed in.
    """
    z = z.to(opmath(theta0[0].dtype))
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # Dynamo miscounts *tensors there
        return call.forward(z, tables, theta0)
    function = variant(ProjectFunction, ProjectEager, ProjectJoined)
    return list(function.apply(call, len(tables), z, *tables, *theta0))


class ScaleFunction(torch.autograd.Function):
    """``(scales, z, member) -> scales[member] z``, whose graph stands many backward passes."""

    @staticmethod
    def forward(scales, z, member):
        return scales[member] * z

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scales, ctx.z, ctx.member = inputs
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("Subspace", (ctx.scales, ctx.z))

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return None, None, None
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        dscales = torch.zeros_like(ctx.scales)
        dscales = dscales.index_put((torch.tensor(ctx.member, device=dout.device),), (dout * ctx.z).sum())
        return dscales, ctx.scales[ctx.member] * dout, None

    @staticmethod
    def vmap(info, in_dims, scales, z, member):
        def of(t: Tensor, d: int | None) -> Tensor:
            return t if d is None else t.movedim(d, 0)

        scale = of(scales, in_dims[0])[..., member]
        return (scale if in_dims[0] is None else scale[:, None]) * of(z, in_dims[1]), 0


class ScaleEager(ScaleFunction):
    """The same with forward-mode AD."""

    @staticmethod
    def jvp(ctx, scales_t, z_t, _):
        tangent = torch.zeros_like(ctx.z)
        if scales_t is not None:
            tangent = scales_t[ctx.member] * ctx.z
        return tangent if z_t is None else tangent + ctx.scales[ctx.member] * z_t


ScaleJoined = joined(ScaleEager)


def scaled(scales: Tensor, z: Tensor, member: int) -> Tensor:
    """``scales[member] * z``, [dim]."""
    return variant(ScaleFunction, ScaleEager, ScaleJoined).apply(scales, z, member)


class _Op:
    """The same with the arguments and outputs of the ops, for exported programs."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, c, theta0, members, firsts, layout, factors, step, kind, *options = inputs
        call = Call(kind, z.shape[-1], tuple(members), tuple(firsts), tuple(options))
        ProjectFunction.setup_context(ctx, (call, 4, z, c, layout, factors, step, *theta0), output)

    @staticmethod
    def backward(ctx, douts):
        z_bar, of_theta0 = _op_gradients(ctx, douts)
        return (z_bar, None, of_theta0, *(None,) * 9)


class _DenseOp:
    @staticmethod
    def setup_context(ctx, inputs, output):
        z, basis, theta0, rows = inputs
        call = Call("dense", z.shape[-1], tuple(range(len(rows))), (0,) * len(rows), tuple(rows))
        ProjectFunction.setup_context(ctx, (call, 1, z, basis, *theta0), output)

    @staticmethod
    def backward(ctx, douts):
        z_bar, of_theta0 = _op_gradients(ctx, douts)
        return z_bar, None, of_theta0, None


def _op_gradients(ctx: Any, douts: Sequence[Any]) -> tuple[Tensor | None, list[Any]]:
    used = [i for i, dout in enumerate(douts) if dout is not None]
    grads = [dense(douts[i]) for i in used]
    of_theta0: list[Any] = [None] * len(douts)
    for i in used:
        of_theta0[i] = douts[i].sum(0) if ctx.batch else douts[i]
    return (ctx.call.of(used).backward(grads, ctx.tables, ctx.batch) if used else None), of_theta0


differentiable(op.subspace_fwd, _Op)
differentiable(op.subspace_dense_fwd, _DenseOp)
