"""Interleaved timing: every variant in every round, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """``prepare`` runs before each timed ``body`` and is not timed."""

    name: str
    body: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Times:
    """``rounds``: the median of each round, in seconds."""

    rounds: list[float]
    fastest: float

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: Times) -> float:
        """How many times longer this took than ``other``: the median over rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))

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
    few timed runs, of which the median is kept. The order rotates from round to round. ``least`` and ``most``: rounds.
    """
    estimate = {}
    for call in calls:
        clock(call, device)
        estimate[call.name] = clock(call, device)
    repeats = {name: max(1, min(20, int(4e-3 / t))) for name, t in estimate.items()}
    one_round = sum(estimate[c.name] * (repeats[c.name] + (estimate[c.name] < 20e-3)) for c in calls)
    n_rounds = max(least, min(most, int(seconds / one_round)))

    rounds: dict[str, list[float]] = {c.name: [] for c in calls}
    fastest = dict.fromkeys(rounds, float("inf"))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for n in range(n_rounds):
            turn = n % len(calls)
            for call in (*calls[turn:], *calls[:turn]):
                if estimate[call.name] < 20e-3:
                    clock(call, device)
                times = [clock(call, device) for _ in range(repeats[call.name])]
                rounds[call.name].append(statistics.median(times))
                fastest[call.name] = min(fastest[call.name], *times)
    finally:
        if collecting:
            gc.enable()
    return {name: Times(values, fastest[name]) for name, values in rounds.items()}
