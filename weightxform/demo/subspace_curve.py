"""Accuracy against the number of coordinates, for several projections, beside the full model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from torch import nn

import weightxform as wx

from .pillar import Check, Table
from .progress import Progress
from .subspace_task import RATE, Digits, Network, accuracy, rate_for, train

SHARE = 0.9
DIP = 0.04  # of accuracy, that a larger d may lose: three standard errors of a difference at 0.9
MAIN = "block_hadamard"
COLOURS = ("#0b6e4f", "#c44536", "#3d5a99", "#b8860b", "#7a5195")


@dataclass(frozen=True)
class Plan:
    """``dims``: of the main projection; the others are tried at ``few`` of them."""

    steps: int
    seeds: Sequence[int]
    dims: Sequence[int]
    few: Sequence[int]
    kinds: Sequence[str]
    tolerance: float

    def runs(self) -> int:
        return len(self.seeds) * (1 + len(self.dims) + len(self.few) * (len(self.kinds) - 1))


@dataclass
class Curve:
    """Of one network; lists have an entry for each seed.

    Attributes:
        full: accuracy of the full model.
        scores: by projection, by d.
        d90: the smallest d that reaches 90 % of the full model's accuracy, by bisection; ``None`` if none did.
    """

    network: Network
    total: int
    full: list[float] = field(default_factory=list)
    scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    d90: list[int | None] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        return SHARE * statistics.mean(self.full)

    def mean(self, kind: str) -> dict[int, float]:
        return {d: statistics.mean(found) for d, found in sorted(self.scores[kind].items())}


def measure(network: Network, plan: Plan, data: tuple[Digits, Digits], progress: Progress) -> Curve:
    """Train the network in full and in every subspace of ``plan``, then search for d90 between those."""
    total = sum(p.numel() for p in network.make(0).parameters())
    curve = Curve(network, total, scores={kind: {} for kind in plan.kinds})
    rate = rate_for(plan.steps)
    progress.start(f"{network.name} in subspaces", plan.runs())
    for seed in plan.seeds:
        full = accuracy(train(network.make(seed), data[0], plan.steps, RATE, seed), data[1])
        curve.full.append(full)
        progress.advance(f"full model {full:.3f}")

        known: dict[int, float] = {}
        for kind in plan.kinds:
            for dim in plan.dims if kind == MAIN else plan.few:
                sub = wx.Subspace(network.make(seed), dim, kind, seed)
                score = accuracy(train(sub, data[0], plan.steps, rate, seed), data[1])
                curve.scores[kind].setdefault(dim, []).append(score)
                if kind == MAIN:
                    known[dim] = score
                progress.advance(f"{kind} d={dim} {score:.3f}")
        curve.d90.append(_search(network, plan, data, seed, full, known))
    return curve


def _search(
    network: Network, plan: Plan, data: tuple[Digits, Digits], seed: int, full: float, known: Mapping[int, float]
) -> int | None:
    """By bisection from the largest d that is known to fail."""

    def score(model: nn.Module) -> float:
        assert isinstance(model, wx.Subspace)
        if model.dim in known:
            return known[model.dim]
        return accuracy(train(model, data[0], plan.steps, rate_for(plan.steps), seed), data[1])

    reached = [d for d, found in known.items() if found >= SHARE * full]
    if not reached:
        return None
    failing = [d for d in known if d < min(reached)]
    found = wx.intrinsic_dimension(
        lambda: network.make(seed),
        score,
        share=SHARE,
        baseline=full,
        start=max(failing, default=min(reached)),
        tolerance=plan.tolerance,
        projection=MAIN,
        seed=seed,
    )
    return found.dim


def check(curve: Curve) -> Check:
    """It rises with d, for every projection, and its end reaches the share of the full model."""
    facts, passed = [], True
    for kind in curve.scores:
        means = list(curve.mean(kind).values())
        dip = max((a - b for a, b in pairwise(means)), default=0.0)
        passed = passed and dip <= DIP and means[-1] > means[0] and means[-1] >= curve.threshold
        facts.append(f"{kind} {means[0]:.3f} to {means[-1]:.3f}")
    fact = f"{'; '.join(facts)} (threshold {curve.threshold:.3f}, full model {statistics.mean(curve.full):.3f})"
    return Check(f"{curve.network.name}: accuracy rises with d to 90 % of the full model's", passed, fact)


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def accuracy_table(curve: Curve) -> Table:
    published = curve.network.published.accuracy
    dims = sorted({d for found in curve.scores.values() for d in found} | {d for d in published if d <= 1500})
    rows = [
        (str(d), *(_spread(s[d]) if d in s else "" for s in curve.scores.values()), _number(published.get(d)))
        for d in dims
    ]
    rows.append(
        (f"full, {curve.total:,}", _spread(curve.full), *("" for _ in list(curve.scores)[1:]),
         _number(curve.network.published.full))
    )  # fmt: skip
    return Table(f"{curve.network.name}: accuracy on 1,000 digits", ("d", *curve.scores, "Li et al."), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def dimension_table(curves: Sequence[Curve]) -> Table:
    header = "network", "D", "full model", "90 % of it", "d_int90", "of D", "Li et al.: full", "d_int90"
    rows = []
    for curve in curves:
        found = [d for d in curve.d90 if d is not None]
        shown = "not reached"
        if len(found) == len(curve.d90):
            shown = str(found[0]) if len(found) == 1 else f"{statistics.median(found):.0f} ({min(found)}-{max(found)})"
        part = f"{statistics.median(found) / curve.total:.2%}" if found else ""
        published = curve.network.published
        rows.append(
            (curve.network.name, f"{curve.total:,}", _spread(curve.full), f"{curve.threshold:.3f}", shown, part,
             f"{published.full:.3f}", str(published.d90))
        )  # fmt: skip
    return Table("The smallest d that reaches 90 % of the full model", header, rows)


def picture(path: Path, curves: Sequence[Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(11, 4.5), sharey=True, layout="constrained", squeeze=False)
    for ax, curve in zip(axes[0], curves, strict=True):
        for kind, colour in zip(curve.scores, COLOURS, strict=False):
            means, found = curve.mean(kind), curve.scores[kind]
            main = kind == MAIN
            style = {"linewidth": 2.0 if main else 1.0, "markersize": 5 if main else 4, "zorder": 3 if main else 2}
            ax.plot([*means], [*means.values()], "o-", label=kind, color=colour, **style)
            if len(curve.full) > 1:
                low, high = ([f(found[d]) for d in means] for f in (min, max))
                ax.fill_between([*means], low, high, color=colour, alpha=0.12, linewidth=0)
        published = {d: a for d, a in curve.network.published.accuracy.items() if d <= 2 * max(curve.mean(MAIN))}
        ax.plot([*published], [*published.values()], "s", color="0.45", fillstyle="none", label="Li et al. 2018")
        ax.axhline(statistics.mean(curve.full), color="0.2", linewidth=0.8)
        ax.axhline(curve.threshold, color="0.2", linewidth=0.8, linestyle="--")
        left = min(curve.mean(MAIN))
        ax.text(left, statistics.mean(curve.full), "full model", va="bottom", fontsize=8, color="0.2")
        ax.text(left, curve.threshold, "90 % of it", va="bottom", fontsize=8, color="0.2")
        reached = [d for d in curve.d90 if d is not None]
        if reached:
            middle = statistics.median(reached)
            ax.axvline(middle, color=COLOURS[0], linewidth=0.8, linestyle=":")
            ax.text(middle, 0.02, f" d_int90 = {middle:.0f}", color=COLOURS[0], fontsize=8)
        ax.set(xscale="log", xlabel="d", ylim=(0, 1.04), title=f"{curve.network.name}, D = {curve.total:,}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(visible=False)
    axes[0][0].set_ylabel("accuracy on 1,000 test digits")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figures(curve: Curve) -> dict[str, object]:
    return {"total": curve.total, "full": curve.full, "scores": curve.scores, "d_int90": curve.d90}
