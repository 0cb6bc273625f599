"""What the figures come to, against the targets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20
MANY_SMALL = "mlp-64x64x64"


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


def _verdict(
    what: str, cases: list[dict], phase: str, figure: str, target: float, at_most: bool = False, worst: bool = False
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


def _of_case(what: str, cases: list[dict], name: str, target: float, figure: Any, at_most: bool = False) -> Verdict:
    """``figure`` of the one case of this name."""
    text = f"{'<=' if at_most else '>='} {target}"
    value = next((figure(c) for c in cases if c["name"] == name), None)
    met = None if value is None else value <= target if at_most else value >= target
    return Verdict(what, text, value, met)


def _ops_alone(case: dict[str, Any]) -> float | None:
    row = next((v for v in case["variants"] if v["name"] == "ours, ops alone"), None)
    return None if row is None or row["status"] != "ok" else row["fwd_bwd"].get("vs_eager")


def _cost_ratio(case: dict[str, Any]) -> float | None:
    """How many times more torch's constraint adds to a training step than ours."""
    cost = case.get("step", {}).get("cost")
    return None if cost is None else cost["eager"] / max(cost["ours"], 1e-9)


def _folded_step(case: dict[str, Any]) -> float | None:
    """A step of the folded layers over that of plain ones."""
    return 1 + case["step"]["cost"]["folded"] if "folded" in case.get("step", {}).get("cost", {}) else None


def verdicts(cases: list[dict[str, Any]]) -> list[Verdict]:
    """Forward and backward through the public API, against the targets of a CPU with two threads, float32, training."""
    single = [c for c in cases if c["group"] == "single"]
    lists = [c for c in cases if c["group"] == "list"]
    resnets = [c for c in lists if c["name"].startswith("resnet")]
    large = [c for c in single if c["bytes"] >= 4 * MIB]
    both = "fwd_bwd"
    return [
        _verdict("single weights against torch, geometric mean", single, both, "vs_eager", 4),
        _verdict("single weights against the best torch.compile, geometric mean", single, both, "vs_compiled", 1.5),
        _verdict("slowest case against torch", cases, both, "vs_eager", 1, worst=True),
        _verdict("slowest case against the best torch.compile", cases, both, "vs_compiled", 1, worst=True),
        _verdict("over a copy's floor, single weights from 4 MiB, worst", large, both, "x_floor", 1.4, True, True),
        _verdict("over a copy's floor, single weights from 4 MiB, geometric mean", large, both, "x_floor", 1.4, True),
        _verdict("ResNet lists, grouped, against torch, worst", resnets, both, "vs_eager", 5, worst=True),
        _verdict("lists, grouped, against torch, geometric mean", lists, both, "vs_eager", 1),
        _of_case("64 layers of 64x64, ops alone, against torch", cases, MANY_SMALL, 25, _ops_alone),
        _of_case("64 layers of 64x64, through autograd, against torch", cases, MANY_SMALL, 5,
                 lambda c: main_row(c)[both]["vs_eager"]),
        _of_case("64 layers of 64x64, through autograd, against the best torch.compile", cases, MANY_SMALL, 1.8,
                 lambda c: main_row(c)[both]["vs_compiled"]),
        _of_case("64 layers of 64x64: what torch adds to a training step over what ours adds", cases, MANY_SMALL, 8,
                 _cost_ratio),
        _of_case("step of a folded Linear(1024, 1024) at batch 64 over a plain one's", cases, "layer-1024x1024", 1.3,
                 _folded_step, at_most=True),
    ]  # fmt: skip


def noisy(cases: list[dict[str, Any]]) -> list[str]:
    """Cases in which the same code timed against itself differs by more than a quarter: their ratios say nothing."""
    return [c["name"] for c in cases if c["aa"] is not None and not 0.8 <= c["aa"] <= 1.25]


def as_json(found: list[Verdict]) -> list[dict[str, Any]]:
    return [asdict(v) for v in found]
