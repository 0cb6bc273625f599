"""Pictures of a result: speedup against size, and achieved bandwidth against size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from .summary import MIB, main_row

COLOURS = {"ours": "#0b6e4f", "eager": "#c44536", "compiled": "#3d5a80", "copy": "#888888"}


def _axes(title: str, ylabel: str) -> tuple[Any, Any]:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.set(xscale="log", xlabel="weight, MiB", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _fastest(case: dict[str, Any], role: str) -> dict[str, Any] | None:
    rows = [v for v in case["variants"] if v["role"] == role and v["main"] and v["status"] == "ok"]
    return min(rows, key=lambda v: v["fwd_bwd"]["median_us"], default=None)


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``ratio.png`` and ``roofline.png`` into ``folder``; single weights as dots, lists as crosses."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = sorted((c for c in result["cases"] if c["group"] in ("single", "list")), key=lambda c: c["bytes"])
    groups = ([c for c in cases if c["group"] == "single"], "o"), ([c for c in cases if c["group"] == "list"], "x")
    where = f"{result['machine']['device']}, {result['machine']['threads']} threads, forward + backward"

    figure, axes = _axes(where, "times faster")
    for figure_name, label, colour in (
        ("vs_eager", "than torch", COLOURS["eager"]),
        ("vs_compiled", "than the best torch.compile", COLOURS["compiled"]),
    ):
        for members, marker in groups:
            points = [(c["bytes"] / MIB, v) for c in members if (v := main_row(c)["fwd_bwd"][figure_name]) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker, color=colour, label=label + (", lists" if marker == "x" else "")
                )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ratio = folder / "ratio.png"
    figure.savefig(ratio, dpi=150)

    figure, axes = _axes(f"{where}: least possible traffic over time", "GB/s")
    for role in ("ours", "eager", "compiled"):
        for members, marker in groups:
            points = [
                (c["bytes"] / MIB, c["floor_bytes"]["fwd_bwd"] / row["fwd_bwd"]["median_us"] / 1e3)
                for c in members
                if (row := _fastest(c, role)) is not None
            ]
            if points:
                label = {"ours": "ours", "eager": "torch", "compiled": "torch.compile"}[role]
                label += ", lists" if marker == "x" else ""
                axes.plot(*zip(*points, strict=True), marker, color=COLOURS[role], label=label)
    copies = [(c["bytes"] / MIB, c["copy_gb_s"]) for c in cases]
    axes.plot(*zip(*copies, strict=True), "_", color=COLOURS["copy"], label="a copy (the roof)")
    axes.set_yscale("log")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    roofline = folder / "roofline.png"
    figure.savefig(roofline, dpi=150)
    return [ratio, roofline]
