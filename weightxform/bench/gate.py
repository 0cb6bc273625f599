"""Correctness, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from ..registry import OPS
from ..verify import Result, check_case
from .case import Problem, Room, Variant

# Wide enough for sums in another order, far below what a wrong u, v or sigma does.
FACTOR, SLACK = 10.0, 10.0
STEPS = 2  # a weight that is served from a cache, or a state that stands still, is wrong at the second


@dataclass(frozen=True)
class Answer:
    """Errors of a variant's weights and gradients against float64, each over its own bound (1 is the limit)."""

    value: float
    gradient: float

    @property
    def passed(self) -> bool:
        return self.value <= 1 and self.gradient <= 1

    @property
    def reason(self) -> str:
        wrong = [w for w, e in (("values", self.value), ("gradients", self.gradient)) if not e <= 1]
        return f"wrong {' and '.join(wrong)}" if wrong else ""


def check_ops(room: Room, device: torch.device) -> list[tuple[str, Result]]:
    """(backend, result) of every float32 case of the room's ops, on the reference and on the kernel of the device."""
    results = []
    for name in room.ops:
        op = OPS[name]
        calls = {"reference": op.reference_overload}
        backend, _ = backends.serving(name, device.type)
        calls.setdefault(backend, op)
        for backend, call in calls.items():
            results += [(backend, check_case(op, case, torch.float32, device, call)) for case in op.cases]
    return results


class Oracle:
    """Weights and gradients after ``STEPS`` training steps in float64, and how far a plain float32 run is from them."""

    def __init__(self, room: Room, problem: Problem) -> None:
        self.exact = room.oracle(problem, STEPS, torch.float64)
        plain = room.oracle(problem, STEPS, torch.float32)
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
