"""The figures of the room against its targets. Two CPU threads, float32, forward and backward with a trainable base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...summary import Verdict, main_row, of_case
from ...timing import ratio
from .variants import ARC, GRID, MLP, STYLEGAN

Result = dict[str, Any]
Figure = Callable[[Result], float | None]

MAIN = "256x256x3x3-C32"
ROTATE, BORDER = f"rotate-{MAIN}", f"rotate_border-{MAIN}"
DEMODULATE, FILTER_MLP = f"demodulate-{MAIN}", f"filter_mlp-{MAIN}"


def row_of(case: Result, name: str) -> Result | None:
    return next((v for v in case["variants"] if v["name"] == name and v["status"] == "ok"), None)


def faster_than(baseline: str, case: Result) -> float | None:
    theirs = row_of(case, baseline)
    if theirs is None:
        return None
    return ratio(theirs["fwd_bwd"]["rounds_us"], main_row(case)["fwd_bwd"]["rounds_us"])


def smaller_than(baseline: str, case: Result) -> float | None:
    theirs, mine = row_of(case, baseline), main_row(case)
    known = theirs is not None and theirs.get("peak_bytes") and mine.get("peak_bytes")
    return theirs["peak_bytes"] / mine["peak_bytes"] if known else None  # type: ignore[index]


def over_floor(case: Result, phase: str = "fwd_bwd") -> float:
    return main_row(case)[phase]["x_floor"]


def verdicts(cases: Sequence[Result], device: str) -> list[Verdict]:
    """What was measured on another device than a target speaks of is not measured."""
    cpu = cases if device == "cpu" else ()
    gpu = cases if device == "cuda" else ()

    def at_least(what: str, name: str, figure: Figure, target: float) -> Verdict:
        return of_case(f"{what}, B = 32, 256x256x3x3", _known(cpu, figure), name, target, figure)

    def bandwidth(name: str, phase: str, what: str) -> Verdict:
        return of_case(f"H200: {name}, {what}, over the floor", gpu, name, 1.33, partial(over_floor, phase=phase), True)

    return [
        at_least("rotation against grid_sample", ROTATE, partial(faster_than, GRID), 3),
        at_least("rotation against ARC's form", BORDER, partial(faster_than, ARC), 4),
        of_case("rotation over the traffic floor, B = 32, 256x256x3x3", cpu, ROTATE, 1.6, over_floor, True),
        at_least("modulation and demodulation against StyleGAN2's form", DEMODULATE, partial(faster_than, STYLEGAN), 4),
        at_least("per-filter MLP against the plain form, time", FILTER_MLP, partial(faster_than, MLP), 5),
        at_least("per-filter MLP against the plain form, memory", FILTER_MLP, partial(smaller_than, MLP), 10),
        *(
            bandwidth(name, phase, what)
            for name in (ROTATE, DEMODULATE)
            for phase, what in (("fwd", "forward"), ("fwd_bwd", "forward + backward"))
        ),
    ]


def _known(cases: Sequence[Result], figure: Figure) -> list[Result]:
    """Without those in which the baseline was not timed: a target is then not measured."""
    return [c for c in cases if figure(c) is not None]
