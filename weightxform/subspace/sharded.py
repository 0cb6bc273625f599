"""FSDP2: each rank computes theta for the rows that it owns, and theta is gathered in the place of theta0.

``fully_shard`` asks tensors that have ``fsdp_pre_all_gather`` what to gather (the extension point that quantized
weights use). :class:`Theta0` is such a tensor. What FSDP then puts in the layer is theta already, and
:class:`GatheredFunction` gives it its gradient: the rank's own z_bar, so that only d numbers are reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._torch import in_backward, is_dtensor
from ..autograd import dense, joined
from .function import Call, adjoint

if TYPE_CHECKING:
    from .module import Subspace

# By which fully_shard and state dicts make shards of a tensor: these stay a Theta0.
_KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("detach", "new_zeros", "empty_like", "view", "as_strided", "clone", "_to_copy", "_pin_memory")
) | {torch.ops.aten.split.Tensor, torch.ops.aten.slice.Tensor, torch.ops.aten.copy_.default}


class Theta0(Tensor):
    """theta0 of one weight of a Subspace, or the rows of it that a rank owns."""

    data_: Tensor
    owner: Subspace
    member: int

    @staticmethod
    def __new__(cls, data: Tensor, owner: Subspace, member: int) -> Theta0:
        return torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            layout=data.layout, device=data.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, data: Tensor, owner: Subspace, member: int) -> None:
        self.data_, self.owner, self.member = data, owner, member

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Theta0({self.data_})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = args[0] if args else None
        plain_args = tree_map_only(Theta0, _data, args)
        out = func(*plain_args, **tree_map_only(Theta0, _data, kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            return first
        if func in _KEPT and isinstance(first, Theta0):
            return tree_map_only(Tensor, lambda t: Theta0(t, first.owner, first.member), out)
        return out

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """(what this rank contributes, whether it is theta)."""
        local, owner, rows = self.data_, self.owner, -(-outer_size[0] // mesh.size())
        sharded_by_rows = tuple(local.shape[1:]) == tuple(outer_size[1:])
        if in_backward():  # the same once more; z itself may be sharded again by now
            ready = owner._gathered.get(self.member, False)
        else:  # of weights in one unit with z, z is not there yet: they are computed when they are read
            ready = sharded_by_rows and not is_dtensor(owner.coordinates)
            if ready and owner._seen is None:
                scales = owner.scales
                owner._seen = owner.coordinates.detach().clone(), None if scales is None else scales.detach().clone()
        if ready and local.numel():
            first = mesh.get_local_rank() * rows * (outer_size.numel() // outer_size[0])
            z, own = owner._z_of(self.member, owner._seen)
            with torch.no_grad():
                local = own.project(z, [local], [owner._rows[self.member]], [first], owner.step)[0]
        local = local.to(mp_policy.param_dtype or local.dtype)
        if sharded_by_rows and local.shape[0] < rows:
            local = torch.cat([local, local.new_zeros((rows - local.shape[0], *local.shape[1:]))])
        return (local,), ready

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        self.owner._gathered[self.member] = metadata
        (gathered,) = outputs
        return None if out is not None else (gathered, (gathered,))


def _data(tensor: Theta0) -> Tensor:
    return tensor.data_


class GatheredFunction(torch.autograd.Function):
    """``(call, number of tables, z, theta, *tables) -> theta``: theta0 + P z, computed elsewhere."""

    @staticmethod
    def forward(call, n, z, theta, *tables):
        return theta.view_as(theta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.n, z, _, *ctx.tables = inputs
        ctx.dtype = z.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout):
        z_bar = None if dout is None else adjoint(ctx.call, ctx.tables, [dense(dout)]).to(ctx.dtype)
        return (None, None, z_bar, None, *(None,) * ctx.n)


GatheredJoined = joined(GatheredFunction)


def attached(call: Call, tables: tuple[Any, ...], z: Tensor, theta: Tensor) -> Tensor:
    """``theta``, with the gradient of theta0 + P z in z."""
    return GatheredJoined.apply(call, len(tables), z, theta, *tables)


def shard_rows(sub: Subspace) -> None:
    """Make the parameters of ``sub`` ones whose rows ``fully_shard`` lets each rank compute; see above."""
    for member, places in enumerate(sub._places):
        raw = places[0][0]._parameters[places[0][1]]
        assert raw is not None
        theta0 = nn.Parameter(Theta0(raw.detach(), sub, member), requires_grad=False)
        for module, name in places:
            setattr(module, name, theta0)
