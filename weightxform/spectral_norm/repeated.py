"""A group that is computed again at every step: its tensors are handed to the CPU kernel once, and kept there.

Taking 64 weights with u and v out of lists, and as many results, costs an op more time than computing them. Only for
eager code: the ops below name their tensors by a handle, so nothing that traces may see them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import through_ops
from ..registry import LIBRARY
from ..versions import Unchanged
from .function import list_gradients

LIBRARY.define(
    "spectral_norm_prepare(Tensor[] weights, Tensor[] us, Tensor[] vs, Tensor[] gains, int[] dims, int[] n_iters, "
    "float eps, bool v_first, float? bound, ScalarType? out_dtype) -> Tensor"
)
LIBRARY.define("spectral_norm_prepared_fwd(Tensor prepared) -> (Tensor[], Tensor)")
LIBRARY.define(
    "spectral_norm_prepared_bwd(Tensor prepared, Tensor[] douts, int[] which, Tensor state, Tensor(a!)[] into) "
    "-> (Tensor[], Tensor)"
)
_ops = torch.ops.weightxform


class Prepared:
    """The arguments of ``spectral_norm_fwd_list``, kept by the kernel.

    Attributes:
        handle: of the kernel's copy; holds the tensors.
        vectors: every u and v, which a computation advances in place.
        accumulates: gradients are added to ``raw.grad`` by the kernel where there is one.
    """

    def __init__(self, handle: Tensor, arguments: tuple, accumulates: bool) -> None:
        weights, us, vs, gains, dims, n_iters, *_ = arguments
        self.handle: Tensor | None = handle
        self.weights, self.gains, self.dims, self.bound = weights, gains, dims, arguments[8]
        self.vectors = [x for pair in zip(us, vs, strict=True) for x in pair] if any(n_iters) else []
        self.everyone = list(range(len(weights)))
        self.accumulates = accumulates

    @staticmethod
    def of(arguments: tuple, accumulates: bool = False) -> Prepared | None:
        """``None`` where there is no kernel for it, or a weight would have to be copied."""
        weights = arguments[0]
        name = "weightxform::spectral_norm_prepare"
        if backends.forced not in (None, "cpu") or not all(w.is_cpu for w in weights):
            return None
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            return None
        with torch._C._AutoDispatchBelowAutograd():
            handle = _ops.spectral_norm_prepare.default(*arguments)
        return Prepared(handle, arguments, accumulates) if handle.numel() else None

    def usable(self) -> bool:
        return self.handle is not None and backends.forced in (None, "cpu")

    def release(self) -> None:
        """Let go of the tensors, which somebody may want to swap; live graphs do without the kernel's copy."""
        self.handle = None

    def forward(self) -> tuple[list[Tensor], Tensor]:
        """(outs, state); u and v are written. No outs, and nothing written, where a tensor has another layout now."""
        with torch._C._AutoDispatchBelowAutograd():
            outs, state = _ops.spectral_norm_prepared_fwd.default(self.handle)
        if outs and self.vectors:
            torch.autograd.graph.increment_version(self.vectors)
        return outs, state

    def backward(
        self, douts: list[Tensor], which: list[int], state: Tensor, into: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """(dweights, dgains) of the members in ``which``; ``into``: add to these and return no dweights."""
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.spectral_norm_prepared_bwd.default(self.handle, douts, which, state, into)

    def apply(self, stamps: tuple[list[int], list[int]]) -> list[Tensor] | None:
        """The weights, differentiable in the raw tensors and the gains. ``stamps``: of the raw tensors, as they are.

        ``None``, with nothing done, where another backend was forced since, or a tensor has another layout.
        """
        if not self.usable():
            return None
        results = self.forward()
        return list(_Repeated.apply(self, stamps, results, *self.weights, *self.gains)) if results[0] else None

    def gradients(self, douts: list[Tensor], ctx: Any) -> tuple[list[Tensor | None], Tensor]:
        """(dweights, dgains), with ``None`` for a weight to whose ``grad`` the kernel has added it."""
        state, adding = ctx.state, []
        if self.accumulates and any([w.grad is not None for w in self.weights]):
            nodes = ctx.next_functions
            adding = [i for i in self.everyone if _adds(self.weights[i], nodes[i][0])]
            if _overlap([self.weights[i].grad for i in adding], douts):
                adding = []
        if not adding:
            return self.backward(douts, self.everyone, state, [])  # type: ignore[return-value]
        into: list[Any] = [self.weights[i].grad for i in adding]
        _, dgains = self.backward([douts[i] for i in adding], adding, state, into)
        torch.autograd.graph.increment_version(into)
        dweights: list[Tensor | None] = [None] * len(douts)
        if len(adding) < len(douts):
            added = set(adding)
            others = [i for i in self.everyone if i not in added]
            results, more = self.backward([douts[i] for i in others], others, state, [])
            for i, dweight in zip(others, results, strict=True):
                dweights[i] = dweight
            dgains = torch.cat([dgains, more])[torch.tensor([*adding, *others]).argsort()]
        return dweights, dgains


def _overlap(grads: list[Any], douts: list[Tensor]) -> bool:
    """Whether adding to one of ``grads`` changes another of them, or one of ``douts`` that may be read after it."""
    spans = sorted([(g.data_ptr(), g.nbytes) for g in grads])
    if any([start + size > after for (start, size), (after, _) in pairwise(spans)]):
        return True
    storages = {g.untyped_storage()._cdata for g in grads}
    return any([d.untyped_storage()._cdata in storages for d in douts])


def _adds(raw: Tensor, node: Any) -> bool:
    """Whether the gradient of ``raw`` would be added to ``raw.grad`` next, and nobody would see it on its way.

    Hooks of the tensor would; those of DDP come after it was added.
    """
    grad = raw.grad
    if grad is None or grad.requires_grad or grad.dtype != raw.dtype or grad.layout != torch.strided:
        return False
    if type(grad) is not Tensor or grad.stride() != raw.stride() or not grad.is_cpu or grad.is_inference():
        return False
    if node is None:  # frozen
        return False
    if raw._backward_hooks or raw._post_accumulate_grad_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # inside torch.autograd.grad, which returns gradients and adds none
        return False


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prepared: Prepared, stamps: tuple, results: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, ctx.state = results
        n = len(outs)
        ctx.prepared = prepared
        ctx.weights, ctx.gains = tensors[:n], tensors[n:]
        ctx.dims, ctx.bound = prepared.dims, prepared.bound
        ctx.set_materialize_grads(False)
        ctx.unchanged = Unchanged("spectral_norm", tensors, None if ctx.gains else stamps)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *douts: Any) -> tuple[Tensor | None, ...]:
        prepared = ctx.prepared
        usable = through_ops() and prepared.usable()
        if not usable or not all([d is not None and d.layout is torch.strided for d in douts]):
            return None, None, None, *list_gradients(ctx, douts)  # a second derivative, members that nobody used, ...
        ctx.unchanged.check()
        dweights, dgains = prepared.gradients(list(douts), ctx)
        if not ctx.gains:
            return None, None, None, *dweights
        return None, None, None, *dweights, *(d.to(g.dtype) for d, g in zip(dgains.unbind(), ctx.gains, strict=True))
