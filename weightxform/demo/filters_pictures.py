"""Pictures of the filters pillar: accuracy against angle, a digit turning, filters turning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .filters_table import FROZEN, ORACLE, TITLES, Result
from .filters_task import ANGLES, Digits, turn

COLOURS = {
    FROZEN: "#888888", ORACLE: "#222222", "analytic": "#3d5a80", "headless": "#b8a9c9", "literal": "#c44536",
    "mlp": "#e09f3e", "learned": "#7b9e87", "residual": "#0b6e4f",
}  # fmt: skip


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def curves(path: Path, found: Sequence[Result]) -> None:
    """Mean over the seeds, of each head."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), layout="constrained", sharey=True)
    degrees = [math.degrees(a) for a in ANGLES]
    for result, ax in zip(found, [axes] if len(found) == 1 else axes, strict=True):
        for name, title in TITLES.items():
            if name in result.scores:
                mean = torch.tensor(result.scores[name]).mean(0).tolist()
                style = "--" if name == ORACLE else "-"
                ax.plot([*degrees, 360], [*mean, mean[0]], style, color=COLOURS[name], label=title)
        ax.set(title=f"{result.head.name} head", xlabel="angle of the digits, degrees", xticks=range(0, 361, 60))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    first = figure.axes[0]
    first.set(ylabel="accuracy, %", ylim=(0, 101))
    figure.legend(*first.get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def digit(path: Path, found: Result, digits: Digits, name: str, index: int = 0) -> None:
    """One digit at every angle; above it what the frozen network says, below it the network of the row ``name``."""
    plt = _pyplot()
    image, label = digits.images[index : index + 1], int(digits.labels[index])
    figure, axes = plt.subplots(1, len(ANGLES), figsize=(12, 1.9), layout="constrained")
    for ax, angle in zip(axes, ANGLES, strict=True):
        turned = turn(image, angle)
        said = int(found.models[FROZEN](turned).argmax()), int(found.models[name](turned, angle).argmax())
        ax.imshow(turned[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        for text, number in zip((ax.set_title, ax.set_xlabel), said, strict=True):
            text(str(number), color=COLOURS["residual"] if number == label else COLOURS["literal"], fontsize=14)
    axes[0].set_ylabel("above: frozen\nbelow: turned filters", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def filters(path: Path, found: Result, rows: Sequence[str], count: int = 3) -> None:
    """Filters of the first layer, each a line with a column for every angle; a sheet for each of ``rows``."""
    plt = _pyplot()
    figure, axes = plt.subplots(len(rows), 1, figsize=(10, 0.95 * count * len(rows)), layout="constrained")
    order: list[int] = []
    for ax, name in zip(axes, rows, strict=True):
        banks = [_first(found.models[name], angle) for angle in ANGLES]
        order = order or _strongest(banks[0], count)
        lines = [
            torch.cat([F.pad(bank[i] / banks[0][i].abs().max(), (0, 1, 0, 1)) for bank in banks], 1) for i in order
        ]
        sheet = torch.cat(lines)
        ax.imshow(sheet.numpy(), cmap="PiYG", vmin=-1, vmax=1)
        cell = sheet.shape[1] / len(ANGLES)
        labels = [f"{math.degrees(angle):.0f}°" for angle in ANGLES]
        ax.set_xticks([(k + 0.5) * cell - 1 for k in range(len(ANGLES))], labels, fontsize=8)
        ax.set_yticks([])
        ax.set_title(TITLES[name], loc="left", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _first(net: nn.Module, angle: float) -> Tensor:
    """The filters [O, k, k] of the first layer at ``angle``."""
    with net.at(angle):  # type: ignore[operator]
        return net.model[0].weight[:, 0].clone()  # type: ignore[index, union-attr]


def _strongest(bank: Tensor, count: int) -> list[int]:
    return bank.flatten(1).norm(dim=1).argsort(descending=True)[:count].tolist()
