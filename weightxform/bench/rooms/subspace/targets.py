"""The figures of the room against its targets. A copy: theta0 into memory of theta's size, in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...summary import Verdict, main_row
from ...timing import ratio
from .plain import FASTFOOD, GATHER, PRODUCT

Result = dict[str, Any]
Figure = Callable[[Result], float | None]


def over_copy(phase: str, case: Result) -> float:
    """Of the bytes of theta0, also for forward and backward together."""
    return ratio(main_row(case)[phase]["rounds_us"], case["copy"]["fwd"]["rounds_us"])


def over_floor(phase: str, case: Result) -> float:
    return main_row(case)[phase]["x_floor"]


def faster_than(baseline: str, phase: str, case: Result) -> float | None:
    theirs = next((v for v in case["variants"] if v["name"] == baseline and v["status"] == "ok"), None)
    return None if theirs is None else ratio(theirs[phase]["rounds_us"], main_row(case)[phase]["rounds_us"])


def worst(
    what: str, cases: Sequence[Result], names: Sequence[str], figure: Figure, target: float, at_most: bool
) -> Verdict:
    """Of the cases of these names; not measured if one is missing."""
    found = {c["name"]: value for c in cases if c["name"] in names and (value := figure(c)) is not None}
    text = f"{'<=' if at_most else '>='} {target}"
    if len(found) < len(names):
        return Verdict(what, text, None, None)
    name = (max if at_most else min)(found, key=found.__getitem__)
    value = found[name]
    return Verdict(what, text, value, value <= target if at_most else value >= target, f"at {name}")


HOT, HADAMARD = "one_hot-2^24-d1000", "block_hadamard-2^24-d1000"
TILES = HADAMARD, HADAMARD + "-tile1024"
SIGNS, DENSE = "rademacher-2^20-d256", "dense-2^20-d256"


def verdicts(cases: Sequence[Result], device: str) -> list[Verdict]:
    """Two CPU threads, float32; and an H200. What was measured on the other device is not measured."""
    cpu = cases if device == "cpu" else ()
    gpu = cases if device == "cuda" else ()

    def both(what: str, names: Sequence[str], figure: Callable[[str], Figure], targets: Sequence[float], at_most: bool):
        phases = ("fwd", "forward"), ("fwd_bwd", "forward + backward")
        return [
            worst(what.format(phase), cpu, names, figure(key), target, at_most)
            for (key, phase), target in zip(phases, targets, strict=True)
        ]

    def faster(baseline: str) -> Callable[[str], Figure]:
        return lambda phase: partial(faster_than, baseline, phase)

    def copies(phase: str) -> Figure:
        return partial(over_copy, phase)

    def floors(phase: str) -> Figure:
        return partial(over_floor, phase)

    return [
        *both("one_hot, D = 2^24, {}, over a copy of theta0", [HOT], copies, (1.5, 4), True),
        *both("block_hadamard, D = 2^24, {}, over a copy of theta0", TILES, copies, (3.5, 8), True),
        *both("one_hot, D = 2^24, {}, against theta0 + z[idx] * scale", [HOT], faster(GATHER), (3, 3), False),
        *both(
            "block_hadamard, D = 2^24, {}, against a plain fastfood", [HADAMARD], faster(FASTFOOD), (100, 100), False
        ),
        *both("rademacher, D = 2^20, d = 256, {}, against a stored P", [SIGNS], faster(PRODUCT), (3, 3), False),
        *both("dense, D = 2^20, d = 256, {}, over a copy that moves P once", [DENSE], floors, (1.1, 1.1), True),
        *(
            worst(f"H200: {name}, forward, over a copy (75 % of its bandwidth)", gpu, [name], floors("fwd"), 1.33, True)
            for name in (HOT, HADAMARD)
        ),
        *(
            worst(f"H200: {name}, forward + backward, over the floor", gpu, [name], floors("fwd_bwd"), 1.5, True)
            for name in ("one_hot-1e8-d10000", "block_hadamard-1e8-d10000")
        ),
    ]
