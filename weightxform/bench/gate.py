"""Correctness, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..registry import OPS
from ..verify import Result, check_case
from .case import Answer, Case, Problem, Room, Variant

# Wide enough for sums in another order, far below what a wrong u, v or sigma does.
FACTOR, SLACK = 10.0, 10.0
STEPS = 2  # a weight that is served from a cache, or a state that stands still, is wrong at the second


def check_ops(room: Room, device: torch.device, cases: Sequence[Case]) -> list[tuple[str, Result]]:
    """(backend, result) of the ops' float32 cases that concern ``cases``, on the backends that are timed."""
    results = []
    for name in room.ops:
        op = OPS[name]
        backend, _ = backends.serving(name, device.type)
        calls = {"reference": op.reference_overload} if room.times_reference else {}
        calls.setdefault(backend, op)
        chosen = [c for c in op.cases if any(room.concerns(case, c) for case in cases)]
        for backend, call in calls.items():
            results += [(backend, check_case(op, case, torch.float32, device, call)) for case in chosen]
    return results


class Oracle:
    """Weights and gradients after ``STEPS`` training steps in float64, and how far a plain float32 run is from them.

    ``after``: (weights, gradients) of the n-th training step from the initial state of a problem, in the given dtype.
    """

    def __init__(
        self, after: Callable[[Problem, int, torch.dtype], tuple[list[Tensor], list[Tensor]]], problem: Problem
    ) -> None:
        self.exact = after(problem, STEPS, torch.float64)
        plain = after(problem, STEPS, torch.float32)
        eps = SLACK * torch.finfo(torch.float32).eps
        self.bounds = [
            [FACTOR * error(p, e) + eps for p, e in zip(*both, strict=True)]
            for both in zip(plain, self.exact, strict=True)
        ]

    def check(self, variant: Variant, douts: Sequence[Tensor]) -> Answer:
        """Run ``variant``, which is in the problem's initial state, for ``STEPS`` steps."""
        for _ in range(STEPS):
            variant.fresh()
            outs = variant.forward()
            variant.backward(outs, douts)
        found: tuple[list[Tensor | None], ...] = list(outs), [raw.grad for raw in variant.raws]
        worst = []
        for tensors, exact, bounds in zip(found, self.exact, self.bounds, strict=True):
            errors = (
                float("inf") if t is None else error(t.detach(), e) / b
                for t, e, b in zip(tensors, exact, bounds, strict=True)
            )
            worst.append(max(errors))
        variant.fresh()
        return Answer(*worst)


def error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|``; infinite if anything is not finite."""
    found = torch.linalg.vector_norm(
        actual.to(exact.dtype).sub_(exact) if actual.dtype != exact.dtype else actual - exact
    )
    ratio = float(found / torch.linalg.vector_norm(exact).clamp_min(1e-30))
    return ratio if ratio == ratio else float("inf")
