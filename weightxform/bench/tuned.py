"""The same figures in a process whose allocator keeps freed blocks: much of a large new tensor is page faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEEP = str(1 << 32)
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP, "THP_MEM_ALLOC_ENABLE": "1"}
FROM, TO = 4 << 20, 128 << 20  # bytes of a case: below, nothing is mapped afresh; above, a run takes long


def rerun(names: Sequence[str], threads: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The main variants of the cases ``names`` again, in another process; each case's result by name.

    Raises ``RuntimeError`` with what the process printed if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        command = [
            sys.executable, "-m", "weightxform", "bench", *names, "--exact", "--main-only", "--json", str(path),
            "--threads", str(threads), "--seconds", str(seconds),
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the run with a tuned allocator failed:\n{done.stdout}{done.stderr}")
        result = json.loads(path.read_text())
    return {case["name"]: case for case in result["cases"]}
