"""One case: admit the variants that are right, then time them beside a copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .case import Case, Problem, Room, Variant
from .footprint import footprint
from .graphs import captured
from .step import step_costs
from .timing import Call, Times, interleave

AA = "A/A"
COPY = "copy"


@dataclass(frozen=True)
class Options:
    """``seconds``: what the timing of one case may take. ``main_only``: leave out the variants beside the main ones."""

    device: torch.device
    seconds: float = 10.0
    main_only: bool = False
    steps: bool = True
    memory: bool = True


class GateError(Exception):
    """A variant of ours is wrong: nothing is timed."""


def admit(room: Room, problem: Problem, options: Options) -> list[tuple[Variant, dict[str, Any]]]:
    """Every variant, started, with its row; one whose status is not ``"ok"`` must not be timed.

    Raises :class:`GateError` if one of ours is wrong. A baseline that is wrong or cannot be built is kept out.
    """
    judge = room.judge(problem)
    admitted = []
    for variant in room.variants(problem):
        if options.main_only and not variant.main:
            continue
        row: dict[str, Any] = {
            "name": variant.name,
            "role": variant.role,
            "backend": variant.backend,
            "main": variant.main,
        }
        try:
            variant.start()
            answer = judge.check(variant, problem.douts)
        except Exception as e:
            if variant.role == "ours":
                raise
            row |= {"status": "failed", "reason": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
        else:
            row |= {"status": "ok" if answer.passed else "rejected", "reason": answer.reason}
            row |= {"value_error": _finite(answer.value), "gradient_error": _finite(answer.gradient)}
            if variant.role == "ours" and not answer.passed:
                raise GateError(
                    f"{problem.case.name}, {variant.name} ({variant.backend}): {answer.reason}; errors over their "
                    f"bounds: values {answer.value:.3g}, gradients {answer.gradient:.3g}"
                )
        admitted.append((variant, row))
    return admitted


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def measure(room: Room, case: Case, options: Options) -> dict[str, Any]:
    """The result of a case, as ``benchmarks/README.md`` documents it. Raises :class:`GateError`."""
    torch.compiler.reset()
    problem = room.problem(case, options.device)
    admitted = admit(room, problem, options)
    right = [(v, row) for v, row in admitted if row["status"] == "ok"]
    eager = next((v for v, row in right if v.role == "eager"), None)

    floors = dict(zip(("fwd", "bwd"), room.floor(problem), strict=True))
    floors["fwd_bwd"] = floors["fwd"] + floors.pop("bwd")
    calls = [_copy(phase, nbytes, options.device) for phase, nbytes in floors.items()]
    for v, row in right:
        calls.append(Call(f"{v.name}|fwd", v.forward, v.fresh))
        calls.append(Call(f"{v.name}|fwd_bwd", _both(v, problem), v.fresh))
        if room.optimizer is not None and v.steps:
            calls.append(Call(f"{v.name}|step", _step(v, problem, room.optimizer(v.raws)), v.fresh))
        if options.device.type == "cuda" and v.role != "compiled":
            graph, row["graph"] = captured(v, problem.douts)
            calls += [] if graph is None else [Call(f"{v.name}|graph", graph)]
    if eager is not None:
        calls.append(Call(AA, _both(eager, problem), eager.fresh))
    times = interleave(calls, options.device, options.seconds)

    copies = {phase: times[f"{COPY}|{phase}"] for phase in floors}
    result: dict[str, Any] = {
        "transform": room.name, "name": case.name, "group": case.group, "bytes": problem.nbytes,
        "weights": len(problem.weights), "rounds": len(copies["fwd_bwd"].rounds),
        "copy_gb_s": 1e-9 * floors["fwd_bwd"] / copies["fwd_bwd"].median,
        "floor_bytes": floors, "copy": {phase: t.as_json() for phase, t in copies.items()},
        "aa": times[AA].ratio(times[f"{eager.name}|fwd_bwd"]) if eager is not None else None,
        "variants": [row for _, row in admitted],
    }  # fmt: skip
    compiled = [v for v, _ in right if v.role == "compiled"]
    phases = ("fwd", "fwd_bwd") if room.optimizer is None else ("fwd", "fwd_bwd", "step")
    best = {phase: min(compiled, key=lambda v: times[f"{v.name}|{phase}"].median, default=None) for phase in phases}
    for v, row in right:
        for phase in (*phases, "graph"):
            mine = times.get(f"{v.name}|{phase}")
            if mine is not None:
                floor = copies["fwd" if phase == "fwd" else "fwd_bwd"]
                row[phase] = mine.as_json() | {"x_floor": mine.ratio(floor)}
        for phase, winner in best.items():
            mine = times.get(f"{v.name}|{phase}")
            if mine is not None:
                row[phase]["vs_eager"] = _speedup(times, eager, phase, mine)
                row[phase]["vs_compiled"] = _speedup(times, winner, phase, mine)
        if options.memory:
            row |= footprint(v, problem)
    if options.steps and case.inputs is not None:
        result["step"] = step_costs(room, problem, best["fwd_bwd"], options.seconds / 2)
    return result


def _both(variant: Variant, problem: Problem) -> Callable[[], object]:
    return lambda: variant.forward_backward(problem.douts)


def _step(variant: Variant, problem: Problem, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    def body() -> None:
        variant.forward_backward(problem.douts)
        optimizer.step()

    return body


def _speedup(times: dict[str, Times], baseline: Variant | None, phase: str, mine: Times) -> float | None:
    return None if baseline is None else times[f"{baseline.name}|{phase}"].ratio(mine)


def _copy(phase: str, nbytes: int, device: torch.device) -> Call:
    """A copy of as many bytes as the phase must move, half read and half written, into memory that is there already."""
    source = torch.randn(nbytes // 8, device=device)
    target = torch.empty_like(source).copy_(source)
    return Call(f"{COPY}|{phase}", lambda: target.copy_(source))
