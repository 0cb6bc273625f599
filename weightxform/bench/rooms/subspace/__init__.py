"""Subspaces: theta = theta0 + P z of a model's weights, for each projection, D and d, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import weightxform as wx

from .... import backends
from ....registry import OPS
from ...case import Room, layers
from . import plain
from .plain import Built, leaf
from .problem import SEED, STORED, Projecting, SubspaceCase, SubspaceProblem, case, tensor_names
from .targets import verdicts
from .truth import Windowed

IDX = "idx", "idx compiled"
CASES = (
    case("one_hot", "1e5", 1000, "idx"),
    case("one_hot", "1e6", 1000, *IDX, quick=True),
    case("one_hot", "2^24", 1000, *IDX),
    case("one_hot", "2^24", 100000, "idx"),
    case("one_hot", "1e8", 10000, "idx"),
    case("block_hadamard", "1e5", 1000, "idx", "fastfood"),
    case("block_hadamard", "1e6", 1000, "idx", "fastfood", quick=True),
    case("block_hadamard", "2^24", 1000, "idx", "fastfood"),
    case("block_hadamard", "2^24", 1000, "idx", tile=1024),
    case("block_hadamard", "2^24", 100000, "idx"),
    case("block_hadamard", "1e8", 10000),
    case("sparse", "1e6", 4000, "idx"),
    case("rademacher", "1e5", 64, "stored", quick=True),
    case("rademacher", "2^20", 256, "stored", "stored compiled"),
    case("gaussian", "1e6", 64, "stored"),
    case("fastfood_global_binomial", "1e6", 1000, "fastfood"),
    case("fastfood_stacked_sign", "1e6", 1000, "fastfood"),
    case("kronecker", "1e6", 1000, "kronecker"),
    case("dense", "1e5", 256, "stored", "mv", quick=True),
    case("dense", "2^20", 256, "stored", "stored compiled", "mv"),
    case("dense_bfloat16", "2^20", 256, "stored", "stored compiled"),
)


def _named(problem: SubspaceProblem) -> nn.ModuleDict:
    """The layers, under the names of the plan."""
    names = tensor_names(len(problem.weights))
    return nn.ModuleDict({n.removesuffix(".weight"): m for n, m in zip(names, problem.copy_layers(), strict=True)})


def ours(problem: SubspaceProblem) -> Built:
    modules = _named(problem)
    sub = wx.Subspace(modules, problem.case.dim, problem.projection, SEED, include=["*.weight"])
    with torch.no_grad():
        sub.coordinates.copy_(problem.z)
    return partial(_read, layers(modules)), [sub.coordinates]


def _read(modules: Sequence[Any]) -> list[Tensor]:
    return [layer.weight for layer in modules]


def one_call(problem: SubspaceProblem) -> Built:
    """All weights at once, through autograd."""
    z, members = leaf(problem), range(len(problem.weights))
    return lambda: problem.map.project(z, problem.weights, members), [z]


class OpsAlone(Projecting):
    """The ops, without autograd and modules."""

    def start(self) -> None:
        problem = self.build.args[0]  # type: ignore[attr-defined]
        self.raws = [leaf(problem)]
        self.theta0s, (self.call, self.tables) = problem.weights, problem.call()

    def _forward(self) -> Sequence[Tensor]:
        return self.call.forward(self.raws[0].detach(), self.tables, self.theta0s)

    def backward(self, outs: Sequence[Tensor], douts: Sequence[Tensor]) -> None:
        self.raws[0].grad = self.call.backward(list(douts), self.tables, 0)


def variants(problem: SubspaceProblem) -> Iterator[Projecting]:
    dense = problem.case.kind in STORED
    served, _ = backends.serving("subspace_dense_fwd" if dense else "subspace_fwd", problem.device.type)
    if problem.case.kind == "kronecker":
        served = "torch"
    yield Projecting("ours", "ours", partial(ours, problem), served, map=problem.map)
    yield Projecting("ours, one call", "ours", partial(one_call, problem), served, False, map=problem.map)
    yield OpsAlone("ours, ops alone", "ours", partial(one_call, problem), served, False, map=problem.map)
    yield from plain.variants(problem)


def floor(problem: SubspaceProblem) -> tuple[int, int]:
    """theta0 and theta; g. A stored P once for each direction."""
    stored = 0
    if problem.case.kind in STORED:
        stored = problem.case.total * problem.case.dim * STORED[problem.case.kind].itemsize
    elif problem.case.kind == "kronecker":
        stored = sum(t.nbytes for t in problem.call()[1])
    return 2 * problem.nbytes + stored, problem.nbytes + stored


def concerns(chosen: SubspaceCase, op_case: str) -> bool:
    kind, is_op_of_kinds = chosen.kind, op_case.split("-")[0] in KINDS
    return op_case.startswith(kind + "-") if kind not in STORED else not is_op_of_kinds


KINDS = {name.split("-")[0] for name in OPS["subspace_fwd"].cases}
ROOM = Room(
    name="subspace",
    ops=("subspace_fwd", "subspace_bwd", "subspace_dense_fwd", "subspace_dense_bwd"),
    cases=CASES,
    variants=variants,
    judge=Windowed,
    floor=floor,
    verdicts=verdicts,
    problem=SubspaceProblem,
    concerns=concerns,
    times_reference=False,
    optimizer=lambda raws: torch.optim.Adam(raws, lr=1e-9),
    memory=lambda chosen: chosen.memory,
    tuned=False,
    seconds=(3.0, 1.0),
)
