"""What one training step of a variant allocates and launches.

Our CPU kernels keep the memory of large outputs in a pool of their own, which torch's profiler does not see: there the
memory of our variants is measured in a process without the pool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .case import Case, Problem, Room, Variant, find_rooms
from .measure import count_kernels, count_ops, peak_bytes


def footprint(variant: Variant, problem: Problem) -> dict[str, Any]:
    """``peak_bytes`` and ``ops`` of one forward and backward; ``ops`` is ``None`` where they cannot be counted."""

    def body() -> None:
        variant.forward_backward(problem.douts)

    variant.fresh()
    before = variant.forward()  # kept alive: the profiler warns of memory that it did not see allocated
    variant.fresh()
    ops: int | None = None

    def counted() -> None:  # in the same run: some baselines take long
        nonlocal ops
        ops = count_ops(body)

    on_cpu = problem.device.type == "cpu"
    peak = peak_bytes(counted if on_cpu and variant.role != "compiled" else body, problem.device)
    variant.fresh()
    del before
    if not on_cpu:
        ops = count_kernels(body)
    variant.fresh()
    return {"peak_bytes": peak, "ops": ops}


def ours_without_pool(chosen: Sequence[tuple[Room, Case]], threads: int) -> dict[str, dict[str, int]]:
    """``peak_bytes`` of our variants on the CPU: by case, by variant. Raises ``RuntimeError`` if the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "footprint.json"
        command = [sys.executable, "-m", __name__, str(path), str(threads), *(case.name for _, case in chosen)]
        environment = os.environ | {"WEIGHTXFORM_POOL": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the measurement of memory failed:\n{done.stdout}{done.stderr}")
        return json.loads(path.read_text())


def main(path: str, threads: str, *names: str) -> None:
    torch.set_num_threads(int(threads))
    found: dict[str, dict[str, Any]] = {}
    for room in find_rooms().values():
        for case in room.cases:
            if case.name in names:
                problem = room.problem(case, torch.device("cpu"))
                for variant in room.variants(problem):
                    if variant.role == "ours":
                        variant.start()
                        found.setdefault(case.name, {})[variant.name] = footprint(variant, problem)["peak_bytes"]
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
