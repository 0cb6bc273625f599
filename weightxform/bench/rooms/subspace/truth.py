"""What is right, for weights of any number: a float64 reference of sampled rows of P, and the adjoint of all of them.

The reference takes minutes for 10^8 weights. It is asked for windows: each tensor's first and last elements and some
between. A variant is right if

1. theta is theta0 + P z in the windows;
2. the gradient of z is P' g for upstream gradients that are zero outside the windows;
3. <theta - theta0, g> = <z, gradient of z> for another z and the full upstream gradients. Outside the windows this
   finds what is wrong in one direction only, and everywhere a theta that was kept from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....subspace import reference
from ....subspace.maps import ImplicitMap, KroneckerMap, Map, StoredMap
from ....subspace.plan import Plan
from ...case import Answer, Variant
from .problem import Projecting, SubspaceProblem

Forward = Callable[[Tensor], list[Tensor]]
Adjoint = Callable[[list[Tensor]], Tensor]
Both = tuple[Forward, Adjoint]

ENTRIES = 1 << 21  # of P that are looked at, or
ROWS = 1 << 17  # so many rows where an entry is cheap
WHOLE = 1 << 21  # weights up to which a fastfood, which has no rows of its own, is computed


class Window(NamedTuple):
    member: int
    first: int
    size: int


@dataclass(frozen=True)
class Bounds:
    """``values``: of the error over |P z|; ``gradient``: over |g|; ``adjoint``: over |P z| |g| / sqrt(D), the size of
    the two sides for random signs; a wrong tile of T weights is sqrt(T / D)."""

    values: float
    gradient: float
    adjoint: float


# theta is rounded a few times, z_bar is promised to 2^-20 |g|; bfloat16 products have 8 bits.
BOUNDS = {torch.float32: Bounds(64 * 2**-23, 2**-20, 1e-3), torch.bfloat16: Bounds(2**-6, 2**-7, 0.1)}


def windows(sizes: Sequence[int], rows: int, seed: int = 0) -> list[Window]:
    """All elements if there are no more than ``rows``, else four windows of each tensor, ``rows`` in all."""
    if sum(sizes) <= rows:
        return [Window(m, 0, n) for m, n in enumerate(sizes)]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for m, n in enumerate(sizes):
        count = min(n // 4, max(1, rows // (4 * len(sizes))))
        starts = [0, n - count]
        for low, high in ((count, n // 2 - count), (n // 2, n - 2 * count)):
            starts.append(int(torch.randint(low, max(low, high) + 1, (), generator=generator)))
        found += [Window(m, start, count) for start in starts]
    return found


def _implicit(found: ImplicitMap, windows: Sequence[Window]) -> Both:
    plan = found.plan
    c = plan.columns_in(torch.float64, "cpu")
    members, firsts = [w.member for w in windows], [w.first for w in windows]
    tables = plan.layout, plan.factors, None, plan.kind
    options = plan.tile, plan.strata, plan.packed

    def forward(z: Tensor) -> list[Tensor]:
        zeros = [z.new_zeros(w.size) for w in windows]
        return reference.forward(z, c, zeros, members, firsts, *tables, *options)

    def adjoint(grads: list[Tensor]) -> Tensor:
        return reference.backward(grads, c, members, firsts, *tables, plan.dim, 0, *options)

    return forward, adjoint


def _explicit(rows: Callable[[Window, int], Tensor], windows: Sequence[Window], starts: Sequence[int]) -> Both:
    """Of the rows of P as a matrix, in float64."""
    parts = [rows(w, starts[w.member] + w.first).double() for w in windows]

    def forward(z: Tensor) -> list[Tensor]:
        return [part @ z for part in parts]

    def adjoint(grads: list[Tensor]) -> Tensor:
        return torch.stack([part.T @ g for part, g in zip(parts, grads, strict=True)]).sum(0)

    return forward, adjoint


def _stored_rows(found: StoredMap) -> Callable[[Window, int], Tensor]:
    return lambda window, start: found.basis[start : start + window.size].cpu()


def _kronecker_rows(found: KroneckerMap) -> Callable[[Window, int], Tensor]:
    p1, p2 = (_matrix(plan) for plan in found.plans)

    def rows(window: Window, start: int) -> Tensor:
        i = torch.arange(start, start + window.size)
        a, b = p1[i // len(p2)], p2[i % len(p2)]
        return (a[:, :, None] * b[:, None, :]).flatten(1)[:, : found.dim]

    return rows


def _matrix(plan: Plan) -> Tensor:
    eye = torch.eye(plan.dim, dtype=torch.float64)
    c, zeros = plan.columns_in(torch.float64, "cpu"), [torch.zeros(plan.total, dtype=torch.float64)]
    tables = plan.layout, plan.factors, None, plan.kind, plan.tile, plan.strata, plan.packed
    return reference.forward(eye, c, zeros, [0], [0], *tables)[0].T


class Truth:
    """P in some windows, and what it makes of the problem's z and gradients there, in float64.

    There are no windows of a large fastfood: 3. is all that is checked.
    """

    def __init__(self, problem: SubspaceProblem, found: Map) -> None:
        sizes = [w.numel() for w in problem.weights]
        self.windows: Sequence[Window] = ()
        if isinstance(found, ImplicitMap):
            rows = ROWS // found.plan.strata if found.plan.kind in reference.TILED else ENTRIES // found.dim
            if found.plan.kind in reference.FASTFOOD:
                if sum(sizes) > WHOLE:
                    return
                rows = sum(sizes)
            self.windows = windows(sizes, rows)
            forward, adjoint = _implicit(found, self.windows)
        else:
            assert isinstance(found, (StoredMap, KroneckerMap))
            self.windows = windows(sizes, ENTRIES // found.dim)
            rows_of = _kronecker_rows(found) if isinstance(found, KroneckerMap) else _stored_rows(found)
            forward, adjoint = _explicit(rows_of, self.windows, found.starts)
        self.grads = [cut(problem.douts[w.member], w) for w in self.windows]
        self.y = forward(problem.z.double().cpu())
        self.z_bar = adjoint(self.grads)


class Windowed:
    """The judge of a problem; see above. A variant may have a P, and a precision, of its own."""

    def __init__(self, problem: SubspaceProblem) -> None:
        self.problem = problem
        self._truths: dict[Map, Truth] = {}

    def check(self, variant: Variant, douts: Sequence[Tensor]) -> Answer:
        assert isinstance(variant, Projecting)
        bounds = BOUNDS[variant.precision]
        if variant.map not in self._truths:
            self._truths[variant.map] = Truth(self.problem, variant.map)
        value, gradient = self._in_windows(variant, douts, self._truths[variant.map], bounds)
        (z,) = variant.raws
        with torch.no_grad():
            z.mul_(-0.5)
        gap = self._gap(variant, douts) / bounds.adjoint
        with torch.no_grad():
            z.mul_(-2)
        variant.fresh()
        return Answer(_number(value), max(_number(gradient), _number(gap)))

    def _theta0(self, variant: Projecting) -> list[Tensor]:
        weights = self.problem.weights
        return weights if variant.theta0 else [w.new_zeros(()).expand(w.shape) for w in weights]

    def _in_windows(
        self, variant: Projecting, douts: Sequence[Tensor], truth: Truth, bounds: Bounds
    ) -> tuple[float, float]:
        if not truth.windows:
            return 0.0, 0.0
        variant.fresh()
        outs = variant.forward()
        variant.backward(outs, _only(douts, truth.windows))
        theta0 = self._theta0(variant)
        y = [cut(outs[w.member], w) - cut(theta0[w.member], w) for w in truth.windows]
        value = distance(y, truth.y) / (bounds.values * norm(truth.y))
        return value, distance([_z_bar(variant)], [truth.z_bar]) / (bounds.gradient * norm(truth.grads))

    def _gap(self, variant: Projecting, douts: Sequence[Tensor]) -> float:
        """Between the sides of 3., for -z/2, over their size."""
        variant.fresh()
        outs = variant.forward()
        variant.backward(outs, douts)
        left = torch.zeros((), dtype=torch.float64)
        for out, t0, g in zip(outs, self._theta0(variant), douts, strict=True):
            y = out.detach().double() - t0
            left += torch.vdot(y.flatten(), g.double().flatten()).cpu()
        z = -0.5 * self.problem.z.double().cpu()
        size = norm([z]) * norm([g.double() for g in douts]) / self.problem.case.total**0.5
        return abs(float(left - (z * _z_bar(variant)).sum())) / size


def _z_bar(variant: Variant) -> Tensor:
    grad = variant.raws[0].grad
    return torch.full((), torch.inf) if grad is None else grad.double().cpu()


def cut(t: Tensor, window: Window) -> Tensor:
    return t.detach().reshape(-1)[window.first : window.first + window.size].double().cpu()


def _only(douts: Sequence[Tensor], windows: Sequence[Window]) -> list[Tensor]:
    """Zero outside of the windows."""
    found = [torch.zeros_like(g, memory_format=torch.contiguous_format) for g in douts]
    for w in windows:
        part = slice(w.first, w.first + w.size)
        found[w.member].view(-1)[part] = douts[w.member].reshape(-1)[part]
    return found


def norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(p)) ** 2 for p in parts))


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return norm([f - e for f, e in zip(found, exact, strict=True)])


def _number(x: float) -> float:
    return x if x == x else float("inf")
