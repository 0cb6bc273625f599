"""The ops of spectral normalization: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference
from .reference import matrix_shape


def state_size(weight: Tensor, dim: int) -> int:
    h, w = matrix_shape(weight, dim)
    return h + w + 1


def _fake_fwd(weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype):
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype)
    return out, weight.new_empty(state_size(weight, dim), dtype=opmath(weight.dtype))


def _fake_bwd(dout, weight, state, gain, dim, bound):
    return torch.empty_like(weight), state.new_empty(())


def _fake_fwd_list(weights, us, vs, gains, dims, n_iters, eps, v_first, bound, out_dtype):
    outs = [torch.empty_like(w, dtype=out_dtype or w.dtype) for w in weights]
    size = sum(state_size(w, d) for w, d in zip(weights, dims, strict=True))
    return outs, weights[0].new_empty(size, dtype=opmath(weights[0].dtype))


def _fake_state_list(weights, us, vs, dims, n_iters, eps, v_first):
    size = sum(state_size(w, d) for w, d in zip(weights, dims, strict=True))
    return weights[0].new_empty(size, dtype=opmath(weights[0].dtype))


def _fake_bwd_list(douts, weights, state, offsets, gains, dims, bound):
    return [torch.empty_like(w) for w in weights], state.new_empty(len(weights))


def make_inputs(
    shape: Sequence[int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight of the given layout, and unit u and v that have not converged."""
    state = opmath(dtype)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "slice":  # every other element of a larger allocation: not dense
        larger = torch.full((*weight.shape[:-1], 2 * weight.shape[-1]), float("nan"), dtype=dtype, device=device)
        larger[..., ::2] = weight
        weight = larger[..., ::2]
    elif layout != "contiguous":
        raise ValueError(f"unknown layout {layout!r}")
    h, w = matrix_shape(weight, dim)
    u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (h, w))
    u, v = (reference.unit(x, 1e-12).to(state).to(device) for x in (u, v))
    return weight, u, v


# name: (shape, dim, layout, options); options override n_iter=1, eps=1e-12, v_first=False, bound=None, gain=None
_SHAPES: dict[str, tuple[tuple[int, ...], int, str, dict]] = {
    "linear": ((33, 65), 0, "contiguous", {}),
    "one_row": ((1, 37), 0, "contiguous", {}),
    "one_column": ((37, 1), 0, "contiguous", {}),
    "one_element": ((1, 1), 0, "contiguous", {}),
    "vector": ((19,), 0, "contiguous", {}),
    "prime_tall": ((257, 13), 0, "contiguous", {}),
    "prime_wide": ((7, 1031), 0, "contiguous", {}),
    "large": ((300, 1100), 0, "contiguous", {}),
    "eval": ((24, 40), 0, "contiguous", {"n_iter": 0}),
    "three_iterations": ((24, 40), 0, "contiguous", {"n_iter": 3}),
    "v_first": ((24, 40), 0, "contiguous", {"v_first": True}),
    "v_first_large": ((300, 1100), 0, "contiguous", {"v_first": True, "n_iter": 2}),
    "conv": ((16, 5, 3, 3), 0, "contiguous", {}),
    "conv_channels_last": ((16, 5, 3, 3), 0, "channels_last", {}),
    "conv_transpose": ((6, 10, 3, 3), 1, "contiguous", {}),
    "conv_transpose_v_first": ((6, 10, 3, 3), 1, "contiguous", {"v_first": True}),
    "conv_transpose_channels_last": ((6, 10, 3, 3), 1, "channels_last", {}),
    "last_dim": ((31, 47), 1, "contiguous", {}),
    "transposed": ((31, 47), 0, "transposed", {}),
    "slice": ((31, 47), 0, "slice", {}),
    "empty_rows": ((0, 5), 0, "contiguous", {}),
    "empty_columns": ((5, 0), 0, "contiguous", {}),
    "bound_active": ((24, 40), 0, "contiguous", {"bound": 0.5}),
    "bound_inactive": ((24, 40), 0, "contiguous", {"bound": 1e3}),
    "gain": ((24, 40), 0, "contiguous", {"gain": 1.7}),
    "gain_and_bound": ((24, 40), 0, "contiguous", {"gain": -0.3, "bound": 0.5}),
}


def _gain(value: float | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=opmath(dtype), device=device)


def _case_fwd(shape: tuple, dim: int, layout: str, options: dict, out_dtype: torch.dtype | None = None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, u, v = make_inputs(shape, dim, dtype, device, generator, layout)
        gain = _gain(options.get("gain"), dtype, device)
        n_iter, v_first, bound = options.get("n_iter", 1), options.get("v_first", False), options.get("bound")
        return weight, u, v, gain, dim, n_iter, 1e-12, v_first, bound, out_dtype

    return make


def _case_bwd(shape: tuple, dim: int, layout: str, options: dict, dout_dtype: torch.dtype | None = None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weight, u, v, gain, *rest = _case_fwd(shape, dim, layout, options)(dtype, device, generator)
        _, state = reference.forward(weight, u, v, gain, *rest)
        return _upstream(weight, dout_dtype or dtype, generator), weight, state, gain, dim, options.get("bound")

    return make


_LISTS: dict[str, tuple[tuple[str, ...], dict]] = {
    "one": (("linear",), {}),
    "mixed": (("linear", "conv", "conv_transpose", "one_row", "empty_rows", "conv_channels_last", "large"), {}),
    "v_first": (("linear", "last_dim", "conv"), {"v_first": True}),
    "gain_and_bound": (("linear", "prime_tall"), {"gain": 1.3, "bound": 0.7}),
    "some_advance": (("linear", "eval", "three_iterations"), {}),
}


def _members(names: tuple[str, ...], options: dict, dtype, device, generator) -> list[tuple]:
    members = []
    for name in names:
        shape, dim, layout, own = _SHAPES[name]
        members.append(_case_fwd(shape, dim, layout, {**own, **options})(dtype, device, generator))
    return members


def _upstream(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random gradient with a part along the weight: <dout, W> does not cancel, and its error can be bounded."""
    noise = torch.randn(*weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
    return (noise + weight.double()).to(dtype)


def _case_fwd_list(names: tuple[str, ...], options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weights, us, vs, gains, dims, n_iters, *_ = zip(
            *_members(names, options, dtype, device, generator), strict=True
        )
        gains = tuple(g for g in gains if g is not None)
        flags = options.get("v_first", False), options.get("bound"), None
        return list(weights), list(us), list(vs), list(gains), list(dims), list(n_iters), 1e-12, *flags

    return make


def _case_state_list(names: tuple[str, ...], options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        weights, us, vs, _, dims, n_iters, eps, v_first, *_ = _case_fwd_list(names, options)(dtype, device, generator)
        return weights, us, vs, dims, n_iters, eps, v_first

    return make


def _case_bwd_list(names: tuple[str, ...], options: dict, skip: int = 0) -> Case:
    """``skip``: leave out that many members in front, whose states still lie in the state tensor."""

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        args = _case_fwd_list(names, options)(dtype, device, generator)
        weights, gains, dims, bound = args[0], args[3], args[4], args[8]
        _, state = reference.forward_list(*args)
        douts = [_upstream(w, dtype, generator) for w in weights]
        offsets, at = [], 0
        for weight, dim in zip(weights, dims, strict=True):
            offsets.append(at)
            at += state_size(weight, dim)
        return douts[skip:], weights[skip:], state, offsets[skip:], gains[skip:], dims[skip:], bound

    return make


def _bytes_fwd(weight: Tensor, *rest: object) -> int:
    out_dtype = rest[-1]
    return weight.nbytes + weight.numel() * (out_dtype or weight.dtype).itemsize  # type: ignore[attr-defined]


def _bytes_bwd(dout: Tensor, weight: Tensor, *rest: object) -> int:
    return dout.nbytes + 2 * weight.nbytes


def _cases(make: Callable[..., Case]) -> dict[str, Case]:
    return {name: make(*row) for name, row in _SHAPES.items()}


spectral_norm_fwd = register(
    Op(
        name="spectral_norm_fwd",
        schema="(Tensor weight, Tensor u, Tensor v, Tensor? gain, int dim, int n_iter, float eps, bool v_first, "
        "float? bound, ScalarType? out_dtype) -> (Tensor, Tensor)",
        reference=reference.forward,
        fake=_fake_fwd,
        cases=_cases(_case_fwd) | {"autocast": _case_fwd((24, 40), 0, "contiguous", {}, torch.bfloat16)},
        bytes_moved=_bytes_fwd,
    )
)

spectral_norm_bwd = register(
    Op(
        name="spectral_norm_bwd",
        schema="(Tensor dout, Tensor weight, Tensor state, Tensor? gain, int dim, float? bound) -> (Tensor, Tensor)",
        reference=reference.backward,
        fake=_fake_bwd,
        cases={
            name: case for name, case in _cases(_case_bwd).items() if name != "one_element"
        }  # its dW is exactly zero
        | {"autocast": _case_bwd((24, 40), 0, "contiguous", {}, torch.bfloat16)},
        bytes_moved=_bytes_bwd,
    )
)

spectral_norm_fwd_list = register(
    Op(
        name="spectral_norm_fwd_list",
        schema="(Tensor[] weights, Tensor[] us, Tensor[] vs, Tensor[] gains, int[] dims, int[] n_iters, float eps, "
        "bool v_first, float? bound, ScalarType? out_dtype) -> (Tensor[], Tensor)",
        reference=reference.forward_list,
        fake=_fake_fwd_list,
        cases={name: _case_fwd_list(*row) for name, row in _LISTS.items()},
        bytes_moved=lambda weights, *rest: sum(_bytes_fwd(w, *rest) for w in weights),
    )
)

spectral_norm_bwd_list = register(
    Op(
        name="spectral_norm_bwd_list",
        schema="(Tensor[] douts, Tensor[] weights, Tensor state, int[] offsets, Tensor[] gains, int[] dims, "
        "float? bound) -> (Tensor[], Tensor)",
        reference=reference.backward_list,
        fake=_fake_bwd_list,
        cases={name: _case_bwd_list(*row) for name, row in _LISTS.items()}
        | {"two_of_three": _case_bwd_list(("linear", "conv", "one_row"), {}, skip=1)},
        bytes_moved=lambda douts, weights, *_: sum(map(_bytes_bwd, douts, weights)),
    )
)

spectral_norm_state_list = register(
    Op(
        name="spectral_norm_state_list",
        schema="(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int[] n_iters, float eps, bool v_first) "
        "-> Tensor",
        reference=reference.state_list,
        fake=_fake_state_list,
        cases={name: _case_state_list(*row) for name, row in _LISTS.items() if name != "gain_and_bound"},
        bytes_moved=lambda weights, *_: sum(w.nbytes for w in weights),
    )
)
