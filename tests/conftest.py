"""Shared by all tests: reproducible numbers, poisoned memory, one thread unless a test asks for more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("WEIGHTXFORM_POISON", "1")  # before the kernels load: fresh outputs are NaN

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:  # it allows few compilations of one function, and the tests share nn.Module's
        torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # its keywords hold the names of its folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
