"""What is right: the formula in float64, for two states of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...case import Answer, Variant
from ...gate import FACTOR, SLACK, error

AGAIN = 0.75  # times what every tensor was: what is kept from the first state is wrong in the second


class Answering(Protocol):
    def answer(self, factor: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """(results, gradients of the raw tensors) with every raw tensor times ``factor``."""
        ...


class Twice:
    """The judge of a problem: a variant is right if its results and its gradients are, in both states.

    The bound is that of ``gate.Oracle``: it follows from the error of the formula in float32.
    """

    def __init__(self, problem: Answering) -> None:
        self.exact, self.bounds = [], []
        for factor in (1.0, AGAIN):
            exact, rounded = (problem.answer(factor, dtype) for dtype in (torch.float64, torch.float32))
            self.exact.append(exact)
            slack = SLACK * torch.finfo(torch.float32).eps
            self.bounds.append(
                [
                    [FACTOR * error(r, e) + slack for r, e in zip(*both, strict=True)]
                    for both in zip(rounded, exact, strict=True)
                ]
            )

    def check(self, variant: Variant, douts: Sequence[Tensor]) -> Answer:
        first = [raw.detach().clone() for raw in variant.raws]
        worst = [0.0, 0.0]
        for factor, exact, bounds in zip((1.0, AGAIN), self.exact, self.bounds, strict=True):
            _write(variant, first, factor)
            outs = variant.forward()
            variant.backward(outs, douts)
            found: tuple[Sequence[Tensor | None], ...] = (list(outs), [raw.grad for raw in variant.raws])
            for n, (tensors, right, limits) in enumerate(zip(found, exact, bounds, strict=True)):
                for t, e, b in zip(tensors, right, limits, strict=True):
                    worst[n] = max(worst[n], float("inf") if t is None else error(t.detach(), e) / b)
        _write(variant, first, 1.0)
        return Answer(*worst)


def _write(variant: Variant, first: Sequence[Tensor], factor: float) -> None:
    with torch.no_grad():
        for raw, start in zip(variant.raws, first, strict=True):
            raw.copy_(start * factor)
    variant.fresh()
