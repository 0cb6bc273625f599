"""What a pillar of the demo is. One module of ``demo/pillars`` each, which defines ``PILLAR``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import pillars
from .progress import Progress


@dataclass(frozen=True)
class Settings:
    """``steps``: ``None`` leaves the number of training steps to the pillar (and to ``quick``)."""

    output: Path
    seed: int = 0
    quick: bool = False
    steps: int | None = None


@dataclass(frozen=True)
class Check:
    """A statement that must hold, with the figures that decide it. One that fails makes the demo exit with 1."""

    name: str
    passed: bool
    fact: str


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Outcome:
    """``pictures``: files in the output folder, with a caption. ``figures``: the numbers, for ``report.json``."""

    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pillar:
    name: str
    title: str
    run: Callable[[Settings, Progress], Outcome]


def find_pillars() -> dict[str, Pillar]:
    """Every pillar by name: a module of ``demo/pillars`` is found because it is there."""
    found = {}
    for info in pkgutil.iter_modules(pillars.__path__):
        pillar: Pillar = importlib.import_module(f"{pillars.__name__}.{info.name}").PILLAR
        found[pillar.name] = pillar
    return found
