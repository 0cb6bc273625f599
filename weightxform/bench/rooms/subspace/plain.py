"""The baselines: what one writes in plain torch, with the P of the case where it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....subspace import Fastfood, OneHot, philox
from ....subspace.maps import ImplicitMap, StoredMap
from ....subspace.reference import stratum
from .problem import Projecting, SubspaceProblem

GATHER, FASTFOOD, PRODUCT = "torch, z[idx]", "torch, fastfood", "torch, P @ z"
Built = tuple[Callable[[], Sequence[Tensor]], list[Tensor]]


def leaf(problem: SubspaceProblem) -> Tensor:
    return problem.z.clone().requires_grad_()


def _like(problem: SubspaceProblem, flat: Tensor) -> list[Tensor]:
    """The layers' weights as views of one vector, which ``functional_call`` may be given."""
    parts = flat.split([w.numel() for w in problem.weights])
    return [part.view(w.shape) for part, w in zip(parts, problem.weights, strict=True)]


def _flat(problem: SubspaceProblem) -> Tensor:
    return torch.cat([w.flatten() for w in problem.weights])


# theta0 + z[idx] * scale with a stored idx, as in Uni-LoRA


def tables(problem: SubspaceProblem, found: ImplicitMap) -> list[list[tuple[Tensor, Tensor]]]:
    """(idx, scale) of each weight, once for each nonzero of a row: read off P z for z = 1, 2, 3, ..."""
    plan, (call, (_, *rest)) = found.plan, problem.call(found)
    zeros = [w.new_zeros((), dtype=torch.float64).expand(w.shape) for w in problem.weights]
    c = plan.columns_in(torch.float32, problem.device)
    assert c is not None
    result: list[list[tuple[Tensor, Tensor]]] = [[] for _ in problem.weights]
    for r in range(plan.strata):
        low, high = stratum(plan.dim, plan.strata, r)
        z = torch.zeros(plan.dim, dtype=torch.float64, device=problem.device)
        z[low:high] = torch.arange(low, high, dtype=torch.float64) + 1
        for of_weight, y in zip(result, call.forward(z, (None, *rest), zeros), strict=True):
            idx = y.abs().long() - 1
            of_weight.append((idx, y.sign().float() * c[idx]))
    return result


def gathered(z: Tensor, theta0: list[Tensor], tables: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    outs = []
    for t0, of_weight in zip(theta0, tables, strict=True):
        theta = t0
        for idx, scale in of_weight:
            theta = theta + z[idx] * scale
        outs.append(theta)
    return outs


def build_gathered(problem: SubspaceProblem, found: ImplicitMap, compiled: bool = False) -> Built:
    z, found_tables = leaf(problem), tables(problem, found)
    function = torch.compile(gathered, dynamic=False, fullgraph=True) if compiled else gathered
    return lambda: function(z, problem.weights, found_tables), [z]


# fastfood: two transforms of the padded length


def hadamard(x: Tensor) -> Tensor:
    """H x over the last axis."""
    shape, h = x.shape, 1
    while h < shape[-1]:
        pairs = x.view(-1, 2, h)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack((a + b, a - b), 1)
        h *= 2
    return x.view(shape)


def fastfood(z: Tensor, b: Tensor, pi: Tensor, g: Tensor) -> Tensor:
    """H G Pi H B pad(z), as published: in blocks of the next power of two of d (Le et al. 2013), or with one block for
    all weights, most of whose input is zeros (Li et al. 2018)."""
    padded = torch.nn.functional.pad(z, (0, b.shape[1] - len(z)))
    return hadamard(g * hadamard(b * padded).gather(1, pi)).flatten()


def build_fastfood(problem: SubspaceProblem, found: ImplicitMap) -> Built:
    """With the signs, the permutation and the diagonal of our fastfood."""
    plan, device = found.plan, problem.device
    key = tuple(plan.layout[0, 2:].tolist())
    length = 1 << ((plan.total if "global" in plan.kind else plan.dim) - 1).bit_length()
    i = torch.arange(-(-plan.total // length) * length, device=device)
    minus = philox.bits(key, philox.FF_B, i)
    pi = philox.permutation(key, philox.FF_PERM, i[::length].contiguous(), length)
    if plan.kind.endswith("sign"):
        g = 1 - 2 * philox.bits(key, philox.FF_G, i).float()
    else:
        g = torch.cat([philox.coins(key, philox.FF_G, part, 1).float() for part in i.split(1 << 20)])
    scale = float(plan.factors[0])
    b, g = (1 - 2 * minus.float()).view(pi.shape), g.view(pi.shape)
    z, theta0 = leaf(problem), _flat(problem)
    return lambda: _like(problem, theta0 + fastfood(z, b, pi, g)[: plan.total] * scale), [z]


# a stored P


def matrix(problem: SubspaceProblem, dtype: torch.dtype) -> Tensor:
    """The P of the case, [D, d]."""
    if isinstance(problem.map, StoredMap):
        return problem.map.basis
    call, tables = problem.call()
    eye, start = torch.eye(problem.case.dim, device=problem.device), 0
    stored = torch.empty(problem.case.total, problem.case.dim, dtype=dtype, device=problem.device)
    for k, w in enumerate(problem.weights):
        (columns,) = call.of([k]).forward(eye, tables, [w.new_zeros(()).expand(w.shape)])
        stored[start : start + w.numel()] = columns.flatten(1).T
        start += w.numel()
    return stored


def product(z: Tensor, basis: Tensor, theta0: Tensor | None, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """``E @ z + theta0``, cut into the layers: what ``functional_call`` is given."""
    flat = (basis @ z.to(basis.dtype)).float()
    if theta0 is not None:
        flat = flat + theta0
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def build_product(
    problem: SubspaceProblem, dtype: torch.dtype, compiled: bool = False, with_theta0: bool = True
) -> Built:
    z, basis = leaf(problem), matrix(problem, dtype)
    theta0, shapes = _flat(problem) if with_theta0 else None, [tuple(w.shape) for w in problem.weights]
    function = torch.compile(product, dynamic=False, fullgraph=True) if compiled else product
    return lambda: function(z, basis, theta0, shapes), [z]


# P1 (x) P2


def build_kronecker(problem: SubspaceProblem) -> Built:
    _, (p1, p2) = problem.call()
    z, theta0, d1, d2 = leaf(problem), _flat(problem), p1.shape[1], p2.shape[1]

    def forward() -> list[Tensor]:
        square = torch.nn.functional.pad(z, (0, d1 * d2 - len(z))).view(d1, d2)
        return _like(problem, theta0 + (p1 @ square @ p2.T).view(-1)[: len(theta0)])

    return forward, [z]


def variants(problem: SubspaceProblem) -> Iterator[Projecting]:
    """Those that the case names; the first is the one that it is compared with."""
    for name in problem.case.plain:
        yield NAMED[name](problem)


def _gather(problem: SubspaceProblem, compiled: bool) -> Projecting:
    tiled = isinstance(problem.map, ImplicitMap) and problem.map.plan.kind in ("one_hot", "sparse")
    found = problem.map if tiled else problem.other(OneHot())
    assert isinstance(found, ImplicitMap)
    name = "torch.compile, z[idx]" if compiled else GATHER
    role, backend = ("compiled", "inductor") if compiled else ("eager", "torch")
    return Projecting(name, role, partial(build_gathered, problem, found, compiled), backend, map=found)


def _fastfood(problem: SubspaceProblem) -> Projecting:
    own = isinstance(problem.map, ImplicitMap) and problem.map.plan.kind.startswith("fastfood")
    found = problem.map if own else problem.other(Fastfood("global", "binomial"))
    assert isinstance(found, ImplicitMap)
    build = partial(build_fastfood, problem, found)
    return Projecting(FASTFOOD, "eager", build, "torch", own, map=found, steps=own)


def _product(
    problem: SubspaceProblem, name: str, role: str = "eager", dtype: torch.dtype = torch.float32, **options: Any
) -> Projecting:
    rounded = problem.map.basis.dtype if isinstance(problem.map, StoredMap) else dtype
    build = partial(build_product, problem, dtype, role == "compiled", options.get("theta0", True))
    backend = "inductor" if role == "compiled" else "torch"
    return Projecting(name, role, build, backend, map=problem.map, precision=rounded, **options)


NAMED: dict[str, Callable[[SubspaceProblem], Projecting]] = {
    "idx": lambda p: _gather(p, False),
    "idx compiled": lambda p: _gather(p, True),
    "fastfood": lambda p: _fastfood(p),
    "stored": lambda p: _product(p, PRODUCT),
    "stored bfloat16": lambda p: _product(p, "torch, P @ z bfloat16", dtype=torch.bfloat16, main=False),
    "mv": lambda p: _product(p, "torch, P @ z alone", main=False, steps=False, theta0=False),
    "stored compiled": lambda p: _product(p, "torch.compile, P @ z", "compiled"),
    "kronecker": lambda p: Projecting("torch, P1 @ Z @ P2'", "eager", partial(build_kronecker, p), "torch", map=p.map),
}
