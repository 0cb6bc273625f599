"""The ops of the projections: schemas, fakes, cases. The maths is in ``reference.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import opmath
from ..registry import Case, Op, register
from . import reference
from .plan import Plan, make_plan


def _fake_like(z: Tensor, theta0: Sequence[Tensor]) -> list[Tensor]:
    if z.ndim == 1:
        return [torch.empty_like(t) for t in theta0]
    return [t.new_empty((z.shape[0], *t.shape)) for t in theta0]


def _fake_fwd(z, c, theta0, *_):
    return _fake_like(z, theta0)


def _fake_bwd(grads, c, members, firsts, layout, factors, step, kind, dim, batch, *_):
    return grads[0].new_empty((batch, dim) if batch else (dim,), dtype=opmath(grads[0].dtype))


def _fake_dense_fwd(z, basis, theta0, rows):
    return _fake_like(z, theta0)


def _fake_dense_bwd(grads, basis, rows, batch):
    dim = basis.shape[1]
    return grads[0].new_empty((batch, dim) if batch else (dim,), dtype=opmath(grads[0].dtype))


TOY = {"a.weight": 45, "a.bias": 5, "b.weight": 1980, "b.bias": 11, "c.weight": 33, "c.bias": 3, "one": 1}
NET = {"conv.weight": 432, "conv.bias": 16, "fc.weight": 10080, "fc.bias": 84, "head.weight": 840, "head.bias": 10}

# name: (tensors, d, options of make_plan, options of the call)
_PLANS: dict[str, tuple[Mapping[str, int], int, dict[str, Any], dict[str, Any]]] = {
    "toy": (TOY, 29, {}, {}),
    "toy_tile_64": (TOY, 29, {"tile": 64}, {}),
    "one_coordinate": (TOY, 1, {"tile": 64}, {}),
    "packed": (TOY, 2077, {"tile": 64}, {}),
    "every_coordinate": (TOY, 2078, {"tile": 256}, {}),
    "per_tensor": (TOY, 90, {"tile": 64, "normalize": "per_tensor"}, {}),
    "init": (TOY, 7, {"normalize": "init"}, {}),
    "one_element": ({"one": 1}, 1, {}, {}),
    "step": (TOY, 29, {"tile": 128}, {"step": 7}),
    "net": (NET, 57, {"tile": 1024}, {}),
    "net_tile_4096": (NET, 750, {}, {}),
    "more_columns_than_tile": (NET, 3000, {"tile": 256}, {}),
    "batch": (TOY, 29, {"tile": 64}, {"batch": 3}),
    "some_members": (NET, 290, {"tile": 1024}, {"members": [0, 3, 4]}),
    "shards": (NET, 57, {"tile": 1024}, {"shards": True}),
    "strided": (TOY, 29, {"tile": 64}, {"layout": "strided"}),
    "unaligned": (NET, 290, {"tile": 1024}, {"layout": "unaligned"}),
    "expanded": (TOY, 29, {"tile": 128}, {"layout": "expanded"}),
    "empty_tensor": ({**TOY, "none": 0}, 29, {}, {}),
}
# Every plan for the two kinds that a tile program of its own serves; what can differ for the others.
_OF_KIND: dict[str, tuple[str, ...]] = {
    "one_hot": tuple(_PLANS),
    "block_hadamard": tuple(_PLANS),
    "one_hot_unsigned": ("toy", "batch"),
    "sparse": ("toy_tile_64", "one_coordinate", "packed", "per_tensor", "step", "net", "batch", "shards", "strided"),
    "rademacher": (
        "toy", "one_coordinate", "per_tensor", "one_element", "step", "net", "batch", "shards", "strided", "expanded",
    ),
    "gaussian": ("toy", "one_coordinate", "init", "step", "net", "batch", "shards"),
    "fastfood_global_sign": (
        "toy", "one_coordinate", "every_coordinate", "per_tensor", "one_element", "step", "net", "batch",
        "some_members", "strided", "expanded", "empty_tensor",
    ),
    "fastfood_global_binomial": ("toy", "step", "batch"),
    "fastfood_stacked_sign": ("toy", "one_coordinate", "every_coordinate", "init", "step", "net", "batch", "strided"),
    "fastfood_stacked_binomial": ("toy", "some_members", "batch"),
}  # fmt: skip


def _plan(kind: str, tensors: Mapping[str, int], d: int, options: dict[str, Any]) -> Plan:
    sigmas = {name: (1 + k) ** -0.5 for k, name in enumerate(tensors)}
    nonzeros = 3 if kind == "sparse" and d >= 7 else None
    return make_plan(kind, tensors, d, 5, sigmas=sigmas, nonzeros=nonzeros, **options)


def _shape(n: int) -> tuple[int, ...]:
    return (n // 3, 3) if n % 3 == 0 else (n,)


def _randn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def _laid_out(t: Tensor, layout: str | None) -> Tensor:
    """The same values where kernels may not expect them."""
    if layout == "strided" and t.ndim == 2:
        return t.T.contiguous().T
    if layout == "expanded" and t.numel() > 1:  # zeros for P z alone, and what sum() sends back: one number
        return t.new_full((), 0.25).expand(t.shape)
    if layout == "unaligned":
        larger = t.new_full((t.numel() + 1,), float("nan"))
        larger[1:] = t.flatten()
        return larger[1:].view(t.shape)
    return t


def _tensors(
    plan: Plan, options: dict[str, Any], batch: int, dtype, device, generator
) -> tuple[list[Tensor], list, list]:
    members = options.get("members", list(range(len(plan.names))))
    tensors, firsts = [], []
    for m in members:
        n = plan.sizes[m]
        first, count = (n // 3, n - n // 2) if options.get("shards") else (0, n)
        shape = (count,) if options.get("shards") else _shape(n)
        lead = (batch,) if batch else ()
        tensors.append(_laid_out(_randn((*lead, *shape), dtype, device, generator), options.get("layout")))
        firsts.append(first)
    return tensors, members, firsts


def _step(options: dict[str, Any], device: torch.device) -> Tensor | None:
    return torch.tensor(options["step"], device=device) if "step" in options else None


def _case_fwd(kind: str, tensors: Mapping[str, int], d: int, of_plan: dict, options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        plan = _plan(kind, tensors, d, of_plan)
        compute = opmath(dtype)
        batch = options.get("batch", 0)
        z = _randn((batch, d) if batch else (d,), compute, device, generator)
        theta0, members, firsts = _tensors(plan, options, 0, dtype, device, generator)
        tables = plan.layout, plan.factors, _step(options, device)
        c = plan.columns_in(compute, device)
        return z, c, theta0, members, firsts, *tables, kind, plan.tile, plan.strata, plan.packed

    return make


def _along_columns(grads: list[Tensor], plan: Plan, batch: int, of: tuple, generator: torch.Generator) -> list[Tensor]:
    """The gradients, and as much again along the columns of P: a sum over them does not cancel, nor hide an error."""
    z = _randn((batch, plan.dim) if batch else (plan.dim,), torch.float64, grads[0].device, generator)
    nothing = [g.new_zeros((), dtype=torch.float64).expand(g.shape[1:] if batch else g.shape) for g in grads]
    z = z * (plan.total / plan.dim) ** 0.5
    along = reference.forward(z, plan.columns_in(torch.float64, z.device), nothing, *of)
    return [(g + y).to(g.dtype) for g, y in zip(grads, along, strict=True)]


def _case_bwd(kind: str, tensors: Mapping[str, int], d: int, of_plan: dict, options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        plan = _plan(kind, tensors, d, of_plan)
        batch = options.get("batch", 0)
        grads, members, firsts = _tensors(plan, options, batch, dtype, device, generator)
        tables = plan.layout, plan.factors, _step(options, device)
        c = plan.columns_in(opmath(dtype), device)
        if options.get("layout") != "expanded":
            of = members, firsts, *tables, kind, plan.tile, plan.strata, plan.packed
            grads = [_laid_out(g, options.get("layout")) for g in _along_columns(grads, plan, batch, of, generator)]
        return grads, c, members, firsts, *tables, kind, d, batch, plan.tile, plan.strata, plan.packed

    return make


def _cases(make: Callable[..., Case]) -> dict[str, Case]:
    return {f"{kind}-{name}": make(kind, *_PLANS[name]) for kind, names in _OF_KIND.items() for name in names}


def _bytes_fwd(z: Tensor, c: Tensor | None, theta0: Sequence[Tensor], *rest: Any) -> int:
    batch = 1 if z.ndim == 1 else z.shape[0]
    tables = rest[2].nbytes + rest[3].nbytes if rest else 0
    return sum(t.nbytes for t in theta0) * (1 + batch) + z.nbytes + tables


def _bytes_bwd(grads: Sequence[Tensor], c: Tensor | None, *rest: Any) -> int:
    _, _, layout, factors, _, _, dim, batch, *_ = rest
    z_bar = dim * max(1, batch) * opmath(grads[0].dtype).itemsize
    return sum(g.nbytes for g in grads) + z_bar + layout.nbytes + factors.nbytes


def _bytes_dense_bwd(grads: Sequence[Tensor], basis: Tensor, rows: Sequence[int], batch: int) -> int:
    z_bar = basis.shape[1] * max(1, batch) * opmath(grads[0].dtype).itemsize
    return basis.nbytes + sum(g.nbytes for g in grads) + z_bar


subspace_fwd = register(
    Op(
        name="subspace_fwd",
        schema="(Tensor z, Tensor? c, Tensor[] theta0, int[] members, int[] firsts, Tensor layout, Tensor factors, "
        "Tensor? step, str kind, int tile, int strata, bool packed) -> Tensor[]",
        reference=reference.forward,
        fake=_fake_fwd,
        cases=_cases(_case_fwd),
        bytes_moved=_bytes_fwd,
    )
)

subspace_bwd = register(
    Op(
        name="subspace_bwd",
        schema="(Tensor[] grads, Tensor? c, int[] members, int[] firsts, Tensor layout, Tensor factors, Tensor? step, "
        "str kind, int dim, int batch, int tile, int strata, bool packed) -> Tensor",
        reference=reference.backward,
        fake=_fake_bwd,
        cases=_cases(_case_bwd),
        bytes_moved=_bytes_bwd,
    )
)

# name: (elements of each tensor, d, dtype of the basis or None for that of the tensors, batch, layout)
_DENSE: dict[str, tuple[tuple[int, ...], int, torch.dtype | None, int, str | None]] = {
    "toy": ((45, 5, 1980, 11, 33, 3, 1), 29, None, 0, None),
    "one_coordinate": ((45, 5), 1, None, 0, None),
    "wide": ((300, 7), 1031, None, 0, None),
    "bfloat16_basis": ((99, 300), 64, torch.bfloat16, 0, None),
    "float16_basis": ((99, 300), 33, torch.float16, 0, None),
    "float32_basis": ((99, 300), 40, torch.float32, 0, None),
    "batch": ((45, 99), 29, None, 3, None),
    "strided": ((45, 99), 29, None, 0, "strided"),
    "empty_tensor": ((45, 0, 3), 8, None, 0, None),
}


def _basis(
    sizes: Sequence[int], d: int, kind: torch.dtype | None, dtype, device, generator
) -> tuple[Tensor, list[int]]:
    rows = [sum(sizes[:i]) for i in range(len(sizes))]
    return _randn((sum(sizes), d), kind or dtype, device, generator) / d**0.5, rows


def _case_dense_fwd(sizes: tuple[int, ...], d: int, kind: torch.dtype | None, batch: int, layout: str | None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        basis, rows = _basis(sizes, d, kind, dtype, device, generator)
        z = _randn((batch, d) if batch else (d,), opmath(dtype), device, generator)
        theta0 = [_laid_out(_randn(_shape(n), dtype, device, generator), layout) for n in sizes]
        return z, basis, theta0, rows

    return make


def _case_dense_bwd(sizes: tuple[int, ...], d: int, kind: torch.dtype | None, batch: int, layout: str | None) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        basis, rows = _basis(sizes, d, kind, dtype, device, generator)
        lead = (batch,) if batch else ()
        grads = [_laid_out(_randn((*lead, *_shape(n)), dtype, device, generator), layout) for n in sizes]
        return grads, basis, rows, batch

    return make


subspace_dense_fwd = register(
    Op(
        name="subspace_dense_fwd",
        schema="(Tensor z, Tensor basis, Tensor[] theta0, int[] rows) -> Tensor[]",
        reference=reference.dense_forward,
        fake=_fake_dense_fwd,
        cases={name: _case_dense_fwd(*row) for name, row in _DENSE.items()},
        bytes_moved=lambda z, basis, theta0, rows: basis.nbytes + _bytes_fwd(z, None, theta0),
    )
)

subspace_dense_bwd = register(
    Op(
        name="subspace_dense_bwd",
        schema="(Tensor[] grads, Tensor basis, int[] rows, int batch) -> Tensor",
        reference=reference.dense_backward,
        fake=_fake_dense_bwd,
        cases={name: _case_dense_bwd(*row) for name, row in _DENSE.items()},
        bytes_moved=_bytes_dense_bwd,
    )
)
