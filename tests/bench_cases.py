"""Tiny cases, and the command on them, for the tests of the benchmark."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from weightxform.__main__ import main
from weightxform.bench import case as cases
from weightxform.bench import models
from weightxform.bench.rooms import spectral_norm

CPU = torch.device("cpu")
TINY = cases.Case("tiny-4x3", "single", partial(models.linear, 4, 3), quick=True)
LIST = cases.Case("tiny-list", "list", partial(models.mlp, 3, 8), (2, 8), quick=True)


def room_with(monkeypatch: pytest.MonkeyPatch, *chosen: cases.Case, **changes: Any) -> cases.Room:
    room = replace(spectral_norm.ROOM, cases=chosen, **changes)
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    return room


def without_compile(problem: cases.Problem) -> list[cases.Variant]:
    return [v for v in spectral_norm.variants(problem) if v.role != "compiled"]


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments), "--no-tuned", "--seconds", "0.01", "--threads", "1"])
