"""The cases: weights of a model in theta0 + P z, for a projection, D and d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from weightxform import subspace

from ....subspace.function import Call
from ....subspace.maps import Map
from ....subspace.projections import Projection
from ... import models
from ...case import Case, Problem, Variant

SEED = 5
SIZES = {"1e5": 10**5, "1e6": 10**6, "2^20": 2**20, "2^24": 2**24, "1e8": 10**8}
PROJECTIONS: dict[str, Callable[..., Projection]] = {
    "one_hot": subspace.OneHot,
    "block_hadamard": subspace.BlockHadamard,
    "sparse": subspace.Sparse,
    "rademacher": subspace.Rademacher,
    "gaussian": subspace.Gaussian,
    "fastfood_global_binomial": partial(subspace.Fastfood, "global", "binomial"),
    "fastfood_stacked_sign": partial(subspace.Fastfood, "stacked", "sign"),
    "kronecker": subspace.Kronecker,
}
STORED = {"dense": torch.float32, "dense_bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SubspaceCase(Case):
    """``kind``: a key of ``PROJECTIONS`` or ``STORED``; ``dim``: d; ``tile``: of ``block_hadamard``."""

    kind: str = "one_hot"
    total: int = 0
    dim: int = 1
    tile: int | None = None
    plain: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes, roughly: theta0, weights and gradients of several variants; a stored P and the copy beside it."""
        stored = 0
        if self.kind in STORED:
            stored = 5 * self.total * self.dim * STORED[self.kind].itemsize
        elif "stored" in self.plain:
            stored = 2 * self.total * self.dim * 4
        return 4 * self.total * (32 if "fastfood" in self.plain else 20) + stored


def case(kind: str, size: str, dim: int, *plain: str, tile: int | None = None, quick: bool = False) -> SubspaceCase:
    """``plain``: the baselines, by their names in ``plain.py``."""
    total = SIZES[size]
    name = f"{kind}-{size}-d{dim}" + (f"-tile{tile}" if tile else "")
    model = partial(models.widths, total)
    return SubspaceCase(name, "subspace", model, None, quick, kind=kind, total=total, dim=dim, tile=tile, plain=plain)


def tensor_names(count: int) -> list[str]:
    """Of the weights; the order of a projection, by name, is that of the model."""
    return [f"{i:03}.weight" for i in range(count)]


@dataclass
class SubspaceProblem(Problem):
    """``z``: the coordinates, such that P z is about as large as theta0: an error of either shows."""

    case: SubspaceCase
    z: Tensor = field(init=False)
    projection: Projection = field(init=False)
    map: Map = field(init=False)
    _others: dict[Projection, Map] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.case
        size = float(torch.stack([torch.linalg.vector_norm(w) for w in self.weights]).norm())
        self.z = self.randn(c.dim) * (size / c.dim**0.5)
        if c.kind in STORED:
            basis = torch.empty(c.total, c.dim, dtype=STORED[c.kind], device=self.device)
            block = self.randn(min(c.total, 1 << 12), c.dim) / c.total**0.5  # columns of norm 1
            for part in basis.split(len(block)):  # rows of their own scales: random numbers take long
                torch.mul(block[: len(part)], self.randn(len(part), 1), out=part)
            self.projection = subspace.Dense(basis)
        else:
            self.projection = PROJECTIONS[c.kind](**({} if c.tile is None else {"tile": c.tile}))
        self.map = self.map_of(self.projection)

    @property
    def sizes(self) -> dict[str, int]:
        return {n: w.numel() for n, w in zip(tensor_names(len(self.weights)), self.weights, strict=True)}

    def map_of(self, projection: Projection) -> Map:
        return projection.map_of(self.sizes, self.case.dim, SEED, "global", {})

    def other(self, projection: Projection) -> Map:
        """The map of another projection, for baselines that cannot have that of the case."""
        if projection not in self._others:
            self._others[projection] = self.map_of(projection)
        return self._others[projection]

    def call(self, found: Map | None = None) -> tuple[Call, tuple]:
        """The call of all weights, and the tables that it takes."""
        found = self.map if found is None else found
        return found.call(range(len(self.weights)), None), found.tables(self.weights[0], None)


@dataclass
class Projecting(Variant):
    """A variant with one raw tensor, z.

    Attributes:
        map: its P.
        theta0: ``False``: it computes P z alone.
        precision: bfloat16 where products are rounded to it.
    """

    map: Map = field(kw_only=True)
    theta0: bool = True
    precision: torch.dtype = torch.float32
