"""The table of the filters pillar: what each way reaches on digits turned by twelve angles, seed by seed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

import weightxform as wx

from .filters_rows import ANALYTIC, OURS, PLAIN, ROWS, Row, median_ms, pair, train
from .filters_task import ANGLES, BATCH, Classifier, Digits, Head, accuracies, oracle, split
from .filters_task import train_upright as upright
from .pillar import Check, Table
from .progress import Progress
from .subspace_task import one_thread

FROZEN, ORACLE, HEADLESS = "frozen", "oracle", "headless"
LIMITS = {"turned": 30.0, "alike": 3.0, "head": 40.0}  # points of accuracy
TITLES = {
    FROZEN: "frozen, no transform",
    ORACLE: "image turned back (oracle)",
    ANALYTIC.name: ANALYTIC.title,
    HEADLESS: "the same, but its Linear not turned",
    **{row.name: row.title for row in ROWS},
}


@dataclass(frozen=True)
class Plan:
    """``upright``: steps of the CNN; ``part``: of the steps of a row; ``test``: how many digits; ``rows``: by name;
    ``below``: how many points a learned residual may be below the oracle."""

    seeds: Sequence[int]
    upright: int
    part: float
    test: int
    rows: Sequence[str]
    below: float = 4.0

    def steps(self, row: Row) -> int:
        return max(2, round(row.steps * self.part))


@dataclass
class Result:
    """Of a head.

    Attributes:
        scores: row -> for each seed the accuracies over the angles; ``plain``: of plain torch.
        ms: row -> for each seed (ours, plain torch), median milliseconds of a step.
        models: row -> the network of the first seed, for pictures.
    """

    head: Head
    plan: Plan
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    plain: dict[str, list[list[float]]] = field(default_factory=dict)
    ms: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)

    def means(self, row: str, plain: bool = False) -> list[float]:
        """For each seed, over the angles."""
        return [statistics.fmean(angles) for angles in (self.plain if plain else self.scores)[row]]


@one_thread()
def measure(head: Head, plan: Plan, progress: Progress) -> Result:
    found = Result(head, plan)
    rows = [row for row in ROWS if row.name in plan.rows]
    progress.start(f"{head.name} head", len(plan.seeds) * (2 + len(rows)))
    for seed in plan.seeds:
        data, test = split(seed)
        test = Digits(test.images[: plan.test], test.labels[: plan.test])
        model = upright(head.make(seed), data, plan.upright, seed)
        progress.advance("upright digits learned")
        _untrained(found, head, model, test)
        progress.advance("analytic")
        for row in rows:
            runs = pair(row, model, head, plan.steps(row), seed)
            train(runs, data, plan.steps(row), seed)
            for scores, name in ((found.scores, OURS), (found.plain, PLAIN)):
                scores.setdefault(row.name, []).append(accuracies(runs[name].net.eval(), test))
            found.ms.setdefault(row.name, []).append((median_ms(runs[OURS]), median_ms(runs[PLAIN])))
            found.models.setdefault(row.name, runs[OURS].net)
            progress.advance(f"{row.name} {found.means(row.name)[-1]:.1f} %")
    return found


def _untrained(found: Result, head: Head, model: nn.Module, test: Digits) -> None:
    ours = ANALYTIC.ours(copy.deepcopy(model), head).eval()
    ways: dict[str, Classifier] = {FROZEN: lambda images, angle: model(images), ORACLE: oracle(model)}
    ways[ANALYTIC.name] = ours
    if head.flattened:
        ways[HEADLESS] = wx.Conditioned(copy.deepcopy(model), wx.Rotate()).eval()
    for name, classify in ways.items():
        found.scores.setdefault(name, []).append(accuracies(classify, test))
    plain = ANALYTIC.plain(copy.deepcopy(model), head)
    found.plain.setdefault(ANALYTIC.name, []).append(accuracies(plain, test))
    found.models.setdefault(FROZEN, model)
    found.models.setdefault(ANALYTIC.name, ours)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def table(found: Result) -> Table:
    rows = []
    for name, title in TITLES.items():
        if name not in found.scores:
            continue
        plain = _spread(found.means(name, plain=True)) if name in found.plain else ""
        cells = ["", ""]
        if name in found.ms:
            ours, theirs = (statistics.median(pair) for pair in zip(*found.ms[name], strict=True))
            cells = [f"{ours:.1f}", f"{theirs / ours:.2f}"]
        reference = found.head.reference.get(name)
        shown = "29.0" if name == HEADLESS else "" if reference is None else f"{reference:.1f}"
        rows.append((title, _spread(found.means(name)), plain, shown, *cells))
    header = "filters", "weightxform, %", "plain torch, %", "reference, %", "ms a step", "plain / ours"
    test, seeds = found.plan.test, len(found.plan.seeds)
    title = f"{found.head.name} head: accuracy on {test} digits, mean over 12 angles, {seeds} seed{'s' * (seeds > 1)}"
    return Table(title, header, rows)


def figures(found: Result) -> dict:
    return {
        "seeds": list(found.plan.seeds), "accuracy": found.scores, "plain": found.plain, "ms": found.ms,
        "upright_steps": found.plan.upright, "test": found.plan.test, "batch": BATCH, "angles": ANGLES,
    }  # fmt: skip


def checks(found: Sequence[Result]) -> list[Check]:
    """With room for fewer steps and other seeds; the facts show by how much they hold."""
    limits = LIMITS | {"learned": max(r.plan.below for r in found)}
    facts: dict[str, list[str]] = {what: [] for what in limits}
    passed = dict.fromkeys(limits, True)

    def note(what: str, values: Sequence[float], text: str, at_most: bool) -> None:
        worst = max(values) if at_most else min(values)
        passed[what] &= worst <= limits[what] if at_most else worst >= limits[what]
        facts[what].append(f"{text} {worst:.1f}")

    def gaps(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    for r in found:
        name = r.head.name
        note("turned", gaps(r.means(ANALYTIC.name), r.means(FROZEN)), name, False)
        note("learned", gaps(r.means(ORACLE), r.means("residual")), name, True)
        for row in r.plain:
            apart = [abs(x) for x in gaps(r.means(row), r.means(row, plain=True))]
            note("alike", apart, f"{name} {row}", True)
        if HEADLESS in r.scores:
            note("head", gaps(r.means(ANALYTIC.name), r.means(HEADLESS)), name, False)
    names = {
        "turned": "turned filters read turned digits: points above the frozen network",
        "learned": "with a learned residual: points below the oracle",
        "alike": "accuracies of plain torch: points apart",
        "head": "a Linear that reads a map has to turn as well: points lost where it does not",
    }
    return [
        Check(names[what], passed[what], f"{', '.join(facts[what])} (limit {limits[what]:g})")
        for what in limits
        if facts[what]
    ]
