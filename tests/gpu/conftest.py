"""Every test in this folder runs where CUDA is, or says that it needs it; most also run on a CPU, as a rehearsal:

WEIGHTXFORM_TEST_DEVICE=cpu pytest tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("WEIGHTXFORM_TEST_DEVICE") == "cuda" and not torch.cuda.is_available():
        pytest.exit("WEIGHTXFORM_TEST_DEVICE=cuda: torch sees no GPU", returncode=1)  # and not: all skipped, passed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Torch, inductor and the profiler warn of their own affairs on a GPU, each version of others.
        item.add_marker(pytest.mark.filterwarnings("default", "error:weightxform", "error:::weightxform"))
