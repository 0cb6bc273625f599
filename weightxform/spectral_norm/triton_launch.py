"""The ops of spectral normalization on Triton: arguments, memory, launches. The kernels are in ``triton_kernels.py``.

A list takes three launches forward (two more for every further power iteration) and two backward, whatever its shapes.
Weights are read where they lie: contiguous, transposed and channels_last; others cost a copy. Nothing waits for the
device, but for a list of new shapes, whose table is uploaded.

Triton itself is imported by the first call of a kernel: it takes long, and most processes never need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import FLOAT_DTYPES, opmath
from ..registry import register_triton
from ..triton_common.tables import address_table, module, on, plan_for, type_of
from . import op

WARPS = 8


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(f"spectral_norm: {what}")


def _modules(device: torch.device) -> tuple[Any, Any, Any]:
    """triton_kernels, triton_backward and triton_plan, where they can run on ``device``."""
    names = (f"{__package__}.triton_{name}" for name in ("kernels", "backward", "plan"))
    kernels, backward, plan = (module("spectral_norm", name, device) for name in names)
    return kernels, backward, plan


def _check_weights(weights: Sequence[Tensor], dims: Sequence[int]) -> None:
    _check(bool(weights) and len(weights) == len(dims), "weights and dims must be equally many, at least one")
    dtype, device = weights[0].dtype, weights[0].device
    _check(dtype in FLOAT_DTYPES, "weights must be float64, float32, bfloat16 or float16")
    for weight, dim in zip(weights, dims, strict=True):
        _check(weight.dtype == dtype and weight.device == device, "weights must have one dtype and one device")
        _check(0 <= dim < weight.dim(), "dim is out of range")
        _check(weight.numel() < 2**31, "a weight of 2^31 elements is more than the Triton kernels address")


def _readable(weight: Tensor, dim: int, plan: Any) -> tuple[Tensor, Any]:
    """``weight``, or a copy of it in an order that the kernels can read, and its layout."""
    for copy in (lambda w: w, lambda w: torch.empty_like(w).copy_(w), lambda w: w.contiguous()):
        w = copy(weight)
        layout = plan.layout_of(tuple(w.shape), w.stride(), dim)
        if layout is not None:
            return w, layout
    raise AssertionError("a contiguous tensor has a layout")


def _like(results: Sequence[Tensor], read: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """``results``, which lie as ``read`` does, in the order in memory that ``empty_like`` of the weight has."""
    found = list(results)
    for i, (w, weight) in enumerate(zip(read, weights, strict=True)):
        if w is not weight:
            like = torch.empty_like(weight, dtype=found[i].dtype)
            found[i] = found[i] if like.stride() == found[i].stride() else like.copy_(found[i])
    return found


def _gains(gains: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    _check(len(gains) in (0, len(weights)), "gains must be as many as weights")
    for gain in gains:
        _check(gain.numel() == 1 and gain.device == weights[0].device, "gain must hold one number, where the weight is")
    return [gain.to(opmath(weights[0].dtype)) for gain in gains]


def _aligned(*tensors: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _forward(
    weights, us, vs, gains, dims, n_iters, eps, v_first, bound, out_dtype, write
) -> tuple[list[Tensor], Tensor]:
    _check_weights(weights, dims)
    _check(len(us) == len(vs) == len(n_iters) == len(weights), "us, vs and n_iters must be as many as weights")
    dtype, device = weights[0].dtype, weights[0].device
    compute, result = opmath(dtype), out_dtype or dtype
    _check(result in FLOAT_DTYPES, "out_dtype must be float64, float32, bfloat16 or float16")
    for weight, u, v, dim, n_iter in zip(weights, us, vs, dims, n_iters, strict=True):
        same = u.dtype == v.dtype == compute and u.device == v.device == device
        _check(same, "u and v must lie where the weight does, float64 for float64 weights, else float32")
        fits = u.numel() == weight.shape[dim] and u.numel() + v.numel() + 1 == op.state_size(weight, dim)
        _check(fits, "u must have as many elements as the weight along dim, and v as many as along the other axes")
        _check(n_iter >= 0, "n_iter must not be negative")
    gains = _gains(gains, weights)
    kernels, _, planning = _modules(device)
    with on(device):
        read, layouts = zip(*(_readable(w, d, planning) for w, d in zip(weights, dims, strict=True)), strict=True)
        vectors = [(u.contiguous(), v.contiguous()) for u, v in zip(us, vs, strict=True)]
        outs = [torch.empty_like(w, dtype=result) for w in read] if write else []
        members = tuple(
            planning.ForwardMember(layout, n_iter, _aligned(w))
            for layout, n_iter, w in zip(layouts, n_iters, read, strict=True)
        )
        key = "forward", members, dtype, eps, v_first, bound, write
        plan = plan_for(
            "spectral_norm", key, device, lambda: planning.forward_plan(members, dtype, eps, v_first, bound, write)
        )
        rows = []
        for i, (w, (u, v), member) in enumerate(zip(read, vectors, members, strict=True)):
            swapped = member.layout.swapped
            y, x = (v, u) if swapped else (u, v)
            outer, inner = (y, x) if member.n_iter == 0 or v_first == swapped else (x, y)
            gain, out = gains[i].data_ptr() if gains else 0, outs[i].data_ptr() if write else 0
            rows.append((w.data_ptr(), gain, outer.data_ptr(), inner.data_ptr(), out))
        pointers = address_table(rows, device)
        state = weights[0].new_empty(sum(layout.m + layout.n + 1 for layout in layouts), dtype=compute)
        numbers = weights[0].new_empty(max(1, plan.numbers), dtype=compute)
        sums = weights[0].new_empty(max(1, plan.sums), dtype=torch.float64)

        T, C, TO = (type_of(t) for t in (dtype, compute, result))
        tile = planning.TILE.get(dtype, planning.DEFAULT_TILE)
        *iterations, last = plan.launches
        for i, (at, programs, kinds) in enumerate(iterations):
            if programs and i % 2 == 0:
                kernels.products[(programs,)](
                    plan.table,
                    pointers,
                    numbers,
                    sums,
                    at,
                    T=T,
                    C=C,
                    FIRST=i == 0,
                    KINDS=kinds,
                    TILE=tile,
                    num_warps=WARPS,
                )
            elif programs:
                kernels.gather[(programs,)](plan.table, numbers, sums, at, C=C, num_warps=4)
        fast = _aligned(*read, *outs)
        kernels.finish[(last.programs,)](
            plan.table, pointers, numbers, sums, state, last.at, T=T, C=C, TO=TO, WRITE=write, ALIGNED=fast,
            TILE=planning.elementwise_tile(dtype), num_warps=WARPS,
        )  # fmt: skip
        return _like(outs, read, weights) if write else [], state


def forward_list(weights, us, vs, gains, dims, n_iters, eps, v_first, bound, out_dtype) -> tuple[list[Tensor], Tensor]:
    """``spectral_norm_fwd_list``."""
    return _forward(weights, us, vs, gains, dims, n_iters, eps, v_first, bound, out_dtype, True)


def state_list(weights, us, vs, dims, n_iters, eps, v_first) -> Tensor:
    """``spectral_norm_state_list``."""
    return _forward(weights, us, vs, [], dims, n_iters, eps, v_first, None, None, False)[1]


def backward_list(douts, weights, state, offsets, gains, dims, bound) -> tuple[list[Tensor], Tensor]:
    """``spectral_norm_bwd_list``."""
    _check_weights(weights, dims)
    _check(len(douts) == len(offsets) == len(weights), "douts and offsets must be as many as weights")
    dtype, device = weights[0].dtype, weights[0].device
    compute = opmath(dtype)
    _check(state.dtype == compute and state.device == device, "state must be what the forward returned")
    for dout, weight, at, dim in zip(douts, weights, offsets, dims, strict=True):
        same = dout.shape == weight.shape and dout.device == device
        _check(same, "douts must have the shapes and the device of the weights")
        _check(at >= 0 and at + op.state_size(weight, dim) <= state.numel(), "offset is out of range")
    gains = _gains(gains, weights)
    _, backward_kernels, planning = _modules(device)
    with on(device):
        state = state.contiguous()
        read, layouts = zip(*(_readable(w, d, planning) for w, d in zip(weights, dims, strict=True)), strict=True)
        incoming = douts[0].dtype if all(d.dtype == douts[0].dtype for d in douts) else compute
        gs = [
            g if g.dtype == incoming and g.stride() == w.stride() else torch.empty_like(w, dtype=incoming).copy_(g)
            for g, w in zip(douts, read, strict=True)
        ]
        dweights = [torch.empty_like(w) for w in read]
        members = tuple(
            planning.BackwardMember(layout, at, _aligned(g, dw))
            for layout, at, g, dw in zip(layouts, offsets, gs, dweights, strict=True)
        )
        plan = plan_for(
            "spectral_norm",
            ("backward", members, dtype, bound),
            device,
            lambda: planning.backward_plan(members, dtype, bound),
        )
        rows = [
            (w.data_ptr(), gains[i].data_ptr() if gains else 0, g.data_ptr(), dw.data_ptr(), 0)
            for i, (w, g, dw) in enumerate(zip(read, gs, dweights, strict=True))
        ]
        pointers = address_table(rows, device)
        sums = state.new_empty(max(1, plan.sums), dtype=torch.float64)
        dgains = state.new_empty(len(weights))

        T, G, C = (type_of(t) for t in (dtype, incoming, compute))
        tile = planning.elementwise_tile(dtype)
        inner, update = plan.launches
        if inner.programs:
            backward_kernels.inner[(inner.programs,)](
                plan.table,
                pointers,
                sums,
                inner.at,
                T=T,
                G=G,
                C=C,
                ALIGNED=_aligned(*read, *gs),
                TILE=tile,
                num_warps=WARPS,
            )
        backward_kernels.update[(update.programs,)](
            plan.table, pointers, sums, state, dgains, update.at, T=T, G=G, C=C, KINDS=update.kinds, TILE=tile,
            num_warps=WARPS,
        )  # fmt: skip
        return _like(dweights, read, weights), dgains


def _as_list(gain: Tensor | None) -> list[Tensor]:
    return [] if gain is None else [gain]


def forward(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype) -> tuple[Tensor, Tensor]:
    """``spectral_norm_fwd``."""
    gains = _as_list(gain)
    (out,), state = forward_list([weight], [u], [v], gains, [dim], [n_iter], eps, v_first, bound, out_dtype)
    return out, state


def backward(dout, weight, state, gain, dim, bound) -> tuple[Tensor, Tensor]:
    """``spectral_norm_bwd``."""
    (dweight,), dgains = backward_list([dout], [weight], state, [0], _as_list(gain), [dim], bound)
    return dweight, dgains.reshape(())


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.spectral_norm_fwd, forward)
    register_triton(op.spectral_norm_bwd, backward)
    register_triton(op.spectral_norm_fwd_list, forward_list)
    register_triton(op.spectral_norm_bwd_list, backward_list)
    register_triton(op.spectral_norm_state_list, state_list)
