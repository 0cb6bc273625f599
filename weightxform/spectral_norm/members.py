"""What a call for one or several members reads from their transforms, and writes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import fake_or_proxy_mode, functorch_active
from . import reference


def members(transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]) -> tuple:
    """us, vs, dims and numbers of iterations for one call."""
    us, vs = (list(x) for x in zip(*(t._vectors(r) for t, r in zip(transforms, raws, strict=True)), strict=True))
    n_iters = [t.n_power_iterations if a else 0 for t, a in zip(transforms, advance, strict=True)]
    for i, n_iter in enumerate(n_iters):
        if not n_iter:
            us[i], vs[i] = (reference.unit(x, transforms[0].eps) for x in (us[i], vs[i]))
    return us, vs, [t._axis(r) for t, r in zip(transforms, raws, strict=True)], n_iters


def commit_moved(us: list[Tensor], vs: list[Tensor], n_iters: list[int], state: Tensor) -> None:
    """:func:`commit` for those of several members that iterated."""
    if any(n_iters) and may_write():
        parts = state.split_with_sizes([n for u, v in zip(us, vs, strict=True) for n in (u.shape[0], v.shape[0], 1)])
        moved = [i for i, n_iter in enumerate(n_iters) if n_iter]
        vectors = [x for i in moved for x in (us[i], vs[i])]
        torch._foreach_copy_(vectors, [x for i in moved for x in parts[3 * i : 3 * i + 2]])


def commit(vectors: list[Tensor], state: Tensor) -> None:
    """Copy [u, v] out of a state tensor, in place: DDP and CUDA graphs hold the buffers."""
    parts = state.split_with_sizes([*(x.shape[0] for x in vectors), 1])
    torch._foreach_copy_(vectors, parts[:2])


def may_write() -> bool:
    """Not inside torch.func transforms or under fake tensors: there the state is read and never written."""
    return not functorch_active() and (torch.compiler.is_compiling() or not fake_or_proxy_mode())
