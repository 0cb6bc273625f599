"""Interleaved timing: every variant in every round, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FEW = 2  # rounds of a slow call


@dataclass(frozen=True)
class Call:
    """``prepare`` runs before each timed ``body`` and is not timed."""

    name: str
    body: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def ratio(rounds: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round. A slow call is in the first rounds only."""
    return statistics.median(a / b for a, b in zip(rounds, others, strict=False))


@dataclass(frozen=True)
class Times:
    """``rounds``: the median of each round, in seconds."""

    rounds: list[float]
    fastest: float

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: Times) -> float:
        """How many times longer this took than ``other``: the median of the ratios within the rounds that both had."""
        return ratio(self.rounds, other.rounds)

    def as_json(self) -> dict:
        return {
            "median_us": self.median * 1e6,
            "min_us": self.fastest * 1e6,
            "rounds_us": [t * 1e6 for t in self.rounds],
        }


def clock(call: Call, device: torch.device) -> float:
    """Seconds of one call: of the host on a CPU, between events of the stream on CUDA."""
    call.prepare()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call.body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
    began = time.perf_counter()
    call.body()
    return time.perf_counter() - began


def interleave(
    calls: Sequence[Call], device: torch.device, seconds: float, least: int = 5, most: int = 31
) -> dict[str, Times]:
    """Time ``calls`` in rounds for about ``seconds`` in all.

    In a round each call has one block: a run that warms the caches up where they can matter (calls below 20 ms), then a
    few timed runs, of which the median is kept. The order rotates from round to round. ``least`` and ``most``: rounds;
    a call of more than a second that would fill ``seconds`` by itself is in ``FEW`` of them.
    """
    estimate = {}
    for call in calls:
        first = clock(call, device)
        estimate[call.name] = first if first > 1 else clock(call, device)
    slow = {name for name, t in estimate.items() if t > 1 and t * least > seconds}
    repeats = {name: max(1, min(20, int(4e-3 / t))) for name, t in estimate.items()}
    blocks = {name: t * (repeats[name] + (t < 20e-3)) for name, t in estimate.items()}
    one_round = sum(t for name, t in blocks.items() if name not in slow)
    n_rounds = max(least, min(most, int(seconds / one_round))) if one_round else FEW

    rounds: dict[str, list[float]] = {c.name: [] for c in calls}
    fastest = dict.fromkeys(rounds, float("inf"))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for n in range(n_rounds):
            turn = n % len(calls)
            for call in (*calls[turn:], *calls[:turn]):
                if call.name in slow and n >= FEW:
                    continue
                if estimate[call.name] < 20e-3:
                    clock(call, device)
                times = [clock(call, device) for _ in range(repeats[call.name])]
                rounds[call.name].append(statistics.median(times))
                fastest[call.name] = min(fastest[call.name], *times)
    finally:
        if collecting:
            gc.enable()
    return {name: Times(values, fastest[name]) for name, values in rounds.items()}
