"""Pillar 3, filters that follow a condition: a frozen CNN that reads turned digits, beside plain torch.

- The table of the question: frozen, the image turned back, the filters turned, and four networks that learn to turn
  them, on digits at twelve angles.
- The same trainings by ``functional_call``: the same losses and accuracies, the time and the memory of a step.
- No angle is given: a network with ``AdaptiveRotatedConv2d`` estimates it.
"""

from __future__ import annotations

from .. import filters_angle as angle
from .. import filters_pictures as pictures
from .. import filters_steps as steps
from .. import filters_table as table
from ..filters_rows import ANALYTIC, ROWS
from ..filters_task import FLAT, POOLED, Digits, split
from ..pillar import Outcome, Pillar, Settings
from ..progress import Progress

ALL = tuple(row.name for row in ROWS)
LEARNED = "residual"


def plans(settings: Settings) -> dict[str, table.Plan]:
    """By head. ``settings.steps``: those of the upright training; the others have their part of them."""
    upright = settings.steps or (250 if settings.quick else 1200)
    seeds = [settings.seed + k for k in range(1 if settings.quick else 3)]
    part, test, below = (0.15, 200, 15.0) if settings.quick else (1.0, 1000, 4.0)
    if settings.steps is not None:
        part = settings.steps / 1200
    return {
        FLAT.name: table.Plan(seeds, upright, part, test, ALL, below),
        POOLED.name: table.Plan(seeds, upright, part, test, (LEARNED,) if settings.quick else ALL, below),
    }


def why(plan: table.Plan) -> str:
    return (
        "The reference is one seed of another program: its CNNs have other widths, its test digits are another draw, "
        f"and its learned rows one rate. Ours: {plan.upright} steps of 64 upright digits, {plan.test} test digits "
        f"({100 * (0.25 / plan.test) ** 0.5:.1f} points of standard error near 50 %, less near 100 %), learned rows of "
        f"{plan.steps(ROWS[0])} steps ({plan.steps(ROWS[-1])} for the last). The analytic row with global pooling "
        "depends on the seed (82.8 to 93.5 in the reference). The per-filter MLP sees filters divided by the root mean "
        "square of their layer; learned A(c) begins at A = 1 with one harmonic of the angle: it says neither. The "
        "question's own network, A w + angle b, cannot turn a filter; with three layers and global pooling it did not "
        "leave chance at the rates that we tried (0.01 and 0.001), and we know no reason why the reference did."
    )


def run(settings: Settings, progress: Progress) -> Outcome:
    planned = plans(settings)
    found = [table.measure(head, planned[head.name], progress) for head in (FLAT, POOLED)]
    data = split(settings.seed)
    frozen = found[0].models[table.FROZEN]
    alike, losses = steps.losses_check(frozen, data[0], settings.seed)
    same = steps.logits_check(frozen, data[1])
    lost, arrives = steps.trap(data[0], settings.seed)
    peaks = steps.peaks_of_fresh_process()
    plan = planned[FLAT.name]
    estimated = angle.measure(frozen, data, max(2, plan.upright // 2), plan.test, settings.seed, progress)

    paths = {name: settings.output / f"filters_{name}.png" for name in ("accuracy", "digit", "bank")}
    pictures.curves(paths["accuracy"], found)
    test = Digits(data[1].images[: plan.test], data[1].labels[: plan.test])
    pictures.digit(paths["digit"], found[0], test, LEARNED)
    pictures.filters(paths["bank"], found[0], (ANALYTIC.name, LEARNED))
    return Outcome(
        text=[
            "A CNN has learned upright digits and is frozen. Its filters are turned by the angle of the digits: by "
            "bilinear interpolation, with nothing to learn, or by networks that are trained on turned digits. A batch "
            "has one angle, which is given, except in the last table.",
            why(plan),
        ],
        tables=[*(table.table(r) for r in found), lost, steps.memory(peaks), angle.table(estimated)],
        checks=[*table.checks(found), alike, same, arrives, angle.check(estimated)],
        pictures=[
            (paths["accuracy"], "Accuracy against the angle of the digits"),
            (paths["digit"], "A digit turns. Above: what the frozen CNN says; below: the same CNN with turned filters"),
            (paths["bank"], "Filters of the first layer: turned by interpolation, and with the learned residual"),
        ],
        figures={
            "heads": {r.head.name: table.figures(r) for r in found}, "losses": losses, "peak_bytes": peaks,
            "angle": angle.figures(estimated),
        },
    )  # fmt: skip


PILLAR = Pillar("filters", "Conditioned filters: a frozen CNN that reads turned digits", run)
