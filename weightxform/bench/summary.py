"""What the figures come to, against the targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """``value`` is ``None`` where no case of the run decides it."""

    what: str
    target: str
    value: float | None
    met: bool | None
    worst: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.what}: not measured (target {self.target})"
        where = f", {self.worst}" if self.worst else ""
        return f"{self.what}: {self.value:.2f}x (target {self.target}{where}) {'met' if self.met else 'MISSED'}"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def main_row(case: dict[str, Any], role: str = "ours") -> dict[str, Any]:
    return next(v for v in case["variants"] if v["role"] == role and v["main"])


def verdict(
    what: str, cases: Sequence[dict], phase: str, figure: str, target: float, at_most: bool = False, worst: bool = False
) -> Verdict:
    found = {c["name"]: value for c in cases if (value := main_row(c)[phase].get(figure)) is not None}
    text = f"{'<=' if at_most else '>='} {target}"
    if not found:
        return Verdict(what, text, None, None)
    extreme = max(found, key=found.__getitem__) if at_most else min(found, key=found.__getitem__)
    value = found[extreme] if worst else geometric_mean(found.values())
    met = value <= target if at_most else value >= target
    return Verdict(
        what, text, value, met, f"{'at' if worst else 'worst'} {extreme}" + ("" if worst else f" {found[extreme]:.2f}x")
    )


def of_case(what: str, cases: Sequence[dict], name: str, target: float, figure: Any, at_most: bool = False) -> Verdict:
    """``figure`` of the one case of this name."""
    text = f"{'<=' if at_most else '>='} {target}"
    value = next((figure(c) for c in cases if c["name"] == name), None)
    met = None if value is None else value <= target if at_most else value >= target
    return Verdict(what, text, value, met)


def noisy(cases: list[dict[str, Any]]) -> list[str]:
    """Cases in which the same code timed against itself differs by more than a quarter: their ratios say nothing."""
    return [c["name"] for c in cases if c["aa"] is not None and not 0.8 <= c["aa"] <= 1.25]


def as_json(found: list[Verdict]) -> list[dict[str, Any]]:
    return [asdict(v) for v in found]
