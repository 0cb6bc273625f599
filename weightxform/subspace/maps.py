"""Map: a projection of the tensors of one model. What the ops need, on the device where it is needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import opmath
from .function import Call, adjoint, project
from .plan import Plan, make_plan


class Map(ABC):
    """P for named tensors, [D, dim].

    Attributes:
        names: of the tensors; members are counted in this order.
        dim: d.
        redraws: whether the entries of P depend on the step.
    """

    names: tuple[str, ...]
    dim: int
    redraws = False

    @abstractmethod
    def call(self, members: Sequence[int], firsts: Sequence[int] | None) -> Call:
        """The rows of P of these members; ``firsts``: of shards, the index of their first element."""

    @abstractmethod
    def tables_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """The tensors of P for a computation in ``dtype``."""

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Any, ...]] = {}

    def __deepcopy__(self, memo: object) -> Map:
        return self  # nothing in it changes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def tables(self, like: Tensor, step: Tensor | None) -> tuple[Any, ...]:
        key = opmath(like.dtype), like.device
        found = self._tables.get(key)
        if found is None:
            found = self.tables_in(*key)
            if not torch.compiler.is_compiling():
                self._tables[key] = found
        return (*found, step) if self.redraws else found

    def project(
        self,
        z: Tensor,
        theta0: Sequence[Tensor],
        members: Sequence[int],
        firsts: Sequence[int] | None = None,
        step: Tensor | None = None,
    ) -> list[Tensor]:
        """theta0 + P z for these members, which have one dtype and one device; differentiable."""
        return project(self.call(members, firsts), self.tables(theta0[0], step), z, theta0)

    def adjoint(
        self,
        grads: Sequence[Tensor],
        members: Sequence[int],
        firsts: Sequence[int] | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        """P' g, [dim]."""
        return adjoint(self.call(members, firsts), self.tables(grads[0], step), grads)


class ImplicitMap(Map):
    """P from a generator; see ``reference.py``."""

    redraws = True

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.names, self.dim = plan, plan.names, plan.dim

    def call(self, members: Sequence[int], firsts: Sequence[int] | None) -> Call:
        plan = self.plan
        firsts = (0,) * len(members) if firsts is None else tuple(firsts)
        return Call(plan.kind, self.dim, tuple(members), firsts, (plan.tile, plan.strata, plan.packed))

    def tables_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return self.plan.columns_in(dtype, device), self.plan.layout, self.plan.factors


class StoredMap(Map):
    """P is a matrix that is there."""

    def __init__(self, basis: Tensor, sizes: Mapping[str, int]) -> None:
        """``basis``: [D, d], the tensors of ``sizes`` one under the other."""
        super().__init__()
        self.names, self.dim, self.basis = tuple(sizes), basis.shape[1], basis
        numbers = list(sizes.values())
        self.starts = tuple(sum(numbers[:i]) for i in range(len(numbers)))

    def call(self, members: Sequence[int], firsts: Sequence[int] | None) -> Call:
        firsts = (0,) * len(members) if firsts is None else tuple(firsts)
        return Call("dense", self.dim, tuple(members), firsts, self.starts)

    def tables_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return (self.basis.to(device).contiguous(),)


class KroneckerMap(Map):
    """P = P1 (x) P2 of two block_hadamard matrices, the last D1 D2 - D rows left out.

    Exactly orthonormal if D = D1 D2, with D2 = ceil(sqrt D), D1 = ceil(D / D2), and so for d. The factors take
    2 sqrt(D d) numbers; two matrix products compute all of P z.
    """

    def __init__(self, sizes: Mapping[str, int], dim: int, seed: int) -> None:
        super().__init__()
        self.names, self.dim = tuple(sizes), dim
        numbers = list(sizes.values())
        self.total = sum(numbers)
        self.starts = tuple(sum(numbers[:i]) for i in range(len(numbers)))
        big2 = math.isqrt(self.total - 1) + 1
        big1 = -(-self.total // big2)
        d2 = math.isqrt(dim - 1) + 1
        d1 = -(-dim // d2)
        self.plans = _square_root("#1", big1, d1, seed), _square_root("#2", big2, d2, seed)

    def call(self, members: Sequence[int], firsts: Sequence[int] | None) -> Call:
        firsts = (0,) * len(members) if firsts is None else tuple(firsts)
        return Call("kronecker", self.dim, tuple(members), firsts, self.starts)

    def tables_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return tuple(_explicit(plan, dtype, device) for plan in self.plans)


def _square_root(name: str, rows: int, columns: int, seed: int) -> Plan:
    return make_plan("block_hadamard", {name: rows}, columns, seed, key_kind="kronecker")


def _explicit(plan: Plan, dtype: torch.dtype, device: torch.device) -> Tensor:
    """P itself, [D, d]."""
    implicit = ImplicitMap(plan)
    zeros = torch.zeros((), dtype=dtype, device=device).expand(plan.total)
    with torch.no_grad():
        columns = implicit.project(torch.eye(plan.dim, dtype=dtype, device=device), [zeros], [0])
    return columns[0].T.contiguous()
