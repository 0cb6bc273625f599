"""Triton: when it is registered and imported, what is said where it cannot run, and its kernels in its interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weightxform as wx
from weightxform import _load, backends
from weightxform.registry import OPS
from weightxform.verify import make_args

ROOMS = {
    file.parent.name: importlib.import_module(f"weightxform.{file.parent.name}.triton_launch")
    for file in sorted(Path(wx.__file__).parent.glob("*/triton_launch.py"))
}
KERNELS = 17  # of all rooms

# A file of tests, and what selects about half of its work: there are two processes.
INTERPRETED = {
    "interpreted.py": "against_float64 and (float64 or bfloat16)",
    "interpreted_subspace.py": "block_hadamard or gaussian or dense or fastfood",
    "interpreted_filters.py": "filter_mlp or filter_warp",
}


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_in_the_interpreter(file):
    """The file has the tests: Triton reads TRITON_INTERPRET once, when it is imported."""
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", str(Path(__file__).with_name(file))]
    half = INTERPRETED[file]
    processes = [python(*options, "-k", chosen, TRITON_INTERPRET="1") for chosen in (half, f"not ({half})")]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert " passed" in output and "skipped" not in output, output


def test_importing_weightxform_does_not_import_triton():
    for interpret in ("0", "1"):
        process = python("-c", "import weightxform, sys; print('triton' in sys.modules)", TRITON_INTERPRET=interpret)
        assert process.communicate()[0] == "False\n"


@pytest.mark.parametrize(
    ("room", "op", "case"),
    [
        ("spectral_norm", "spectral_norm_fwd", "linear"),
        ("subspace", "subspace_fwd", "one_hot-toy"),
        ("filter_warp", "filter_warp_fwd", "conv3"),
        ("warp_matrix", "warp_matrix_fwd", "rotate"),
        ("modulation", "modulate_fwd", "conv3"),
        ("filter_mlp", "filter_mlp_fwd", "conv3"),
    ],
)
def test_cpu_tensors_without_the_interpreter(room, op, case):
    with pytest.raises(RuntimeError, match=r"no kernels for CPU tensors; TRITON_INTERPRET=1, set before Python starts"):
        ROOMS[room].forward(*make_args(OPS[op], case, torch.float32, "cpu"))


@pytest.fixture
def fresh(monkeypatch):
    """As before the kernels are loaded; what gets registered is collected."""
    found = []
    monkeypatch.setattr(_load, "status", {})
    for room in ROOMS.values():
        monkeypatch.setattr(room, "register_triton", lambda op, launcher: found.append(op.name))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [
        (None, None, "not registered: this torch has no CUDA; TRITON_INTERPRET=1, set before"),
        ("13.0", None, "not registered: no NVIDIA driver; TRITON_INTERPRET=1, set before"),
        ("13.0", 12040, "registered, imported by its first call"),
    ],
)
def test_registered_where_it_can_run(fresh, monkeypatch, cuda, driver, status):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_load, "driver_version", lambda: driver)
    assert _load._load_triton().startswith(status)
    assert len(fresh) == (KERNELS if driver else 0)


def test_registered_for_the_interpreter(fresh, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _load._load_triton() == "registered, in its interpreter"
    assert len(fresh) == KERNELS


def test_not_installed(fresh, monkeypatch):
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    assert _load._load_triton() == "not installed"
    assert not fresh


def test_forcing_it_where_it_is_not_registered_says_why(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op, "triton", None)
    monkeypatch.setitem(_load.status, "triton", "not registered: no NVIDIA driver")
    with pytest.raises(
        RuntimeError, match=r"'triton' is not available here \(not registered: no NVIDIA driver\); avail"
    ):
        wx.backend("triton")
    assert backends.forced is None
