"""A group that is computed again at every step: its tensors are handed to the CPU kernel once, and kept there.

Taking 64 weights with u and v out of lists, and as many results, costs an op more time than computing them. Only for
eager code: the ops below name their tensors by a handle, so nothing that traces may see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import guard, through_ops
from ..registry import LIBRARY
from .function import list_gradients

LIBRARY.define(
    "spectral_norm_prepare(Tensor[] weights, Tensor[] us, Tensor[] vs, Tensor[] gains, int[] dims, int[] n_iters, "
    "float eps, bool v_first, float? bound, ScalarType? out_dtype, Tensor[] outs) -> Tensor"
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
    """

    def __init__(self, handle: Tensor, arguments: tuple) -> None:
        weights, us, vs, gains, dims, n_iters, *_ = arguments
        self.handle = handle
        self.weights, self.gains, self.dims, self.bound = weights, gains, dims, arguments[8]
        self.vectors = [x for pair in zip(us, vs, strict=True) for x in pair] if any(n_iters) else []
        self.everyone = list(range(len(weights)))

    @staticmethod
    def of(arguments: tuple, outs: Sequence[Tensor] = ()) -> Prepared | None:
        """``None`` where there is no kernel for it, or a weight would have to be copied."""
        weights = arguments[0]
        name = "weightxform::spectral_norm_prepare"
        if backends.forced not in (None, "cpu") or not all(w.is_cpu for w in weights):
            return None
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            return None
        with torch._C._AutoDispatchBelowAutograd():
            handle = _ops.spectral_norm_prepare(*arguments, list(outs))
        return Prepared(handle, arguments) if handle.numel() else None

    def usable(self) -> bool:
        return backends.forced in (None, "cpu")

    def forward(self) -> tuple[list[Tensor], Tensor]:
        """(outs, state); u and v are written."""
        with torch._C._AutoDispatchBelowAutograd():
            outs, state = _ops.spectral_norm_prepared_fwd.default(self.handle)
        if self.vectors:
            torch.autograd.graph.increment_version(self.vectors)
        return outs, state

    def backward(
        self, douts: list[Tensor], which: list[int], state: Tensor, into: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """(dweights, dgains) of the members in ``which``; ``into``: add to these and return no dweights."""
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.spectral_norm_prepared_bwd.default(self.handle, douts, which, state, into)

    def apply(self) -> list[Tensor]:
        """The weights, differentiable in the raw tensors and the gains."""
        return list(_Repeated.apply(self, *self.weights, *self.gains))


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prepared: Prepared, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, state = prepared.forward()
        n = len(outs)
        ctx.prepared, ctx.state = prepared, state
        ctx.weights, ctx.gains = tensors[:n], tensors[n:]
        ctx.dims, ctx.bound = prepared.dims, prepared.bound
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("spectral_norm", tensors)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        prepared = ctx.prepared
        if any(d is None for d in douts) or not through_ops() or not prepared.usable():
            return None, *list_gradients(ctx, douts)
        ctx.unchanged.check()
        dweights, dgains = prepared.backward(list(douts), prepared.everyone, ctx.state, [])
        if not ctx.gains:
            return None, *dweights
        return None, *dweights, *(d.to(g.dtype) for d, g in zip(dgains.unbind(), ctx.gains, strict=True))
