"""GPUs and drivers that cannot run the compiled kernels: one warning, the next backend, and no wrong number."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from weightxform import _load, backends
from weightxform._load import Gpu, Kernels
from weightxform.registry import OPS

T4, A100, L4, H100, B200, B300 = (
    Gpu(i, name, capability)
    for i, (name, capability) in enumerate(
        {"T4": (7, 5), "A100": (8, 0), "L4": (8, 9), "H100": (9, 0), "B200": (10, 0), "B300": (10, 3)}.items()
    )
)
NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice


def built_for(*capabilities: tuple[int, int], runs_ptx: bool = False, runtime: int = 13000) -> Kernels:
    return Kernels(runtime, capabilities, lambda device: 0 if runs_ptx else NO_IMAGE)


EVERY = (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize("gpu", [A100, L4, H100, B200, B300], ids=lambda g: g.name)
def test_machine_code_runs_on_its_major_version(gpu):
    def probe(device: int) -> int:
        raise AssertionError("asked, which makes a context on every GPU")

    assert _load.cannot_run(gpu, Kernels(13000, EVERY, probe)) is None


def test_a_gpu_without_machine_code_for_it():
    for gpu, kernels in ((T4, built_for(*EVERY)), (A100, built_for((9, 0))), (A100, built_for((8, 6)))):
        reason = _load.cannot_run(gpu, kernels)
        assert reason is not None and str(gpu) in reason and str(kernels) in reason and "CUDA error 209" in reason
    assert _load.cannot_run(H100, built_for((8, 0), runs_ptx=True)) is None, "the driver compiles the PTX"
    asked = []
    kernels = Kernels(13000, ((8, 0),), lambda device: asked.append(device) or NO_IMAGE)
    assert _load.cannot_run(H100, kernels) and asked == [H100.number]


def test_a_driver_knows_every_release_of_its_major_version():
    assert _load.driver_too_old(13000, 13000) is None
    assert _load.driver_too_old(13000, 13010) is None
    assert _load.driver_too_old(14000, 13010) is None
    assert _load.driver_too_old(12090, 12080) is None
    assert _load.driver_too_old(12080, 13010) == (
        "the driver knows CUDA 12.8, the compiled kernels need 13.0 (driver 580 or newer)"
    )
    assert _load.driver_too_old(13020, 14000) == "the driver knows CUDA 13.2, the compiled kernels need 14.0"


class Machine:
    """What loading found, and what it did."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.opened = 0
        self.hooks: list = []
        self.retired: list[tuple[str, bool]] = []

    def open_library(self) -> Kernels:
        self.opened += 1
        return self.kernels

    def retire(self, reason: str, triton: bool) -> None:
        backends.retired = reason
        self.retired.append((reason, triton))

    def load(self) -> str:
        _load.status["_cuda"] = _load._load_cuda()
        return _load.status["_cuda"]

    def start_cuda(self) -> None:
        (check,) = self.hooks
        check()


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    """A torch with CUDA, ``_cuda`` beside it, a driver that knows CUDA 13.0 and one H100."""
    machine = Machine(built_for(*EVERY))
    monkeypatch.setattr(_load, "CUDA_LIBRARY", tmp_path / "_cuda.abi3.so")
    _load.CUDA_LIBRARY.touch()
    monkeypatch.setattr(_load, "kernels", None)
    monkeypatch.setattr(_load, "status", {})
    monkeypatch.setattr(_load, "open_library", machine.open_library)
    monkeypatch.setattr(_load, "when_cuda_starts", machine.hooks.append)
    monkeypatch.setattr(_load, "driver_version", lambda: 13000)
    monkeypatch.setattr(_load, "visible_gpus", lambda: [H100])
    monkeypatch.setattr(backends, "retired", None)
    monkeypatch.setattr(backends, "retire_cuda", machine.retire)
    monkeypatch.setattr(backends, "kernels_for_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("WEIGHTXFORM_LOAD_CUDA", raising=False)
    return machine


def test_a_machine_that_can_run_them_loads_them_and_says_for_what(machine):
    assert machine.load() == "loaded, CUDA 13.0 for sm_80, sm_90, sm_100, sm_120"
    machine.start_cuda()
    assert machine.opened == 1 and not machine.retired and _load.status["_cuda"].startswith("loaded, CUDA")


def test_an_old_driver_is_one_warning_and_the_next_backend(machine, monkeypatch):
    monkeypatch.setattr(_load, "driver_version", lambda: 12040)
    with pytest.warns(UserWarning, match=r"the driver knows CUDA 12\.4, the compiled kernels need 13\.0") as caught:
        status = machine.load()
        machine.start_cuda()
    assert len(caught) == 1
    assert status.startswith("loaded, not used: the driver knows CUDA 12.4")
    assert machine.retired == [(status.removeprefix("loaded, not used: "), True)]


def test_kernels_of_an_older_toolkit_run_on_an_older_driver(machine, monkeypatch):
    machine.kernels = built_for(*EVERY, runtime=12080)
    monkeypatch.setattr(_load, "driver_version", lambda: 12040)
    assert machine.load().startswith("loaded, CUDA 12.8 for")
    assert not machine.retired


@pytest.mark.parametrize(
    ("gpus", "triton"), [([T4], False), ([A100], True), ([H100, A100], True), ([T4, H100], False)], ids=str
)
def test_one_gpu_that_cannot_run_them_decides_for_the_process(machine, monkeypatch, gpus, triton):
    machine.kernels = built_for((9, 0))
    monkeypatch.setattr(_load, "visible_gpus", lambda: gpus)
    machine.load()
    old = next(g for g in gpus if g is not H100)
    with pytest.warns(UserWarning, match=rf"GPU \d \({old.name}, sm_\d+\) cannot run the compiled") as caught:
        machine.start_cuda()
    assert len(caught) == 1
    ((reason, to_triton),) = machine.retired
    assert to_triton is triton and _load.status["_cuda"] == f"loaded, not used: {reason}"


def test_where_triton_serves_a_gpu_that_is_too_old_for_it_gets_the_reference(machine, monkeypatch):
    _load.CUDA_LIBRARY.unlink()
    assert machine.load() == "not built"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.start_cuda()
    monkeypatch.setattr(_load, "visible_gpus", lambda: [H100, T4])
    with pytest.warns(UserWarning, match=r"Triton needs sm_80 or newer, there is GPU 0 \(T4, sm_75\)"):
        machine.start_cuda()
    ((_, to_triton),) = machine.retired
    assert to_triton is False


def test_nothing_is_asked_where_only_the_reference_serves(machine, monkeypatch):
    monkeypatch.setattr(backends, "kernels_for_cuda", lambda: False)
    monkeypatch.setattr(_load, "visible_gpus", lambda: [T4])
    _load.CUDA_LIBRARY.unlink()
    machine.load()
    machine.start_cuda()
    assert not machine.retired


def test_no_driver_no_cuda_in_torch_or_not_built_is_no_warning(machine, monkeypatch):
    monkeypatch.setattr(_load, "driver_version", lambda: None)
    assert machine.load() == "not loaded: no NVIDIA driver"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.load().startswith("not loaded: this torch has no CUDA")
    assert machine.opened == 0 and machine.hooks == []
    monkeypatch.setenv("WEIGHTXFORM_LOAD_CUDA", "1")
    assert machine.load().startswith("loaded, CUDA 13.0")
    _load.CUDA_LIBRARY.unlink()
    assert machine.load() == "not built"


# In a process of its own: what is taken from the dispatcher stays taken.

RETIRED = """
import sys, warnings, torch, weightxform as wx
from weightxform import _load, backends
from weightxform.registry import LIBRARY, OPS
from weightxform.verify import flatten, make_args

def wrong(*args):
    raise AssertionError("a kernel that this GPU cannot run was called")

def open_library():
    for name in OPS:
        LIBRARY.impl(name, wrong, "CUDA")
    return _load.Kernels(13000, ((9, 0),), lambda device: 209)

class There:
    def exists(self):
        return True

hooks = []
_load.CUDA_LIBRARY, _load.open_library, _load.when_cuda_starts = There(), open_library, hooks.append
_load.driver_version, torch.version.cuda = lambda: 13000, "13.0"
_load.visible_gpus = lambda: [_load.Gpu(0, "Tesla V100", (7, 0))]
for op in OPS.values():
    op.triton_serves_cuda = False  # as where Triton is not installed
_load.load_kernels()
assert backends.serving("spectral_norm_fwd", "cuda")[0] == "cuda"
with wx.backend("cuda"), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    hooks[0]()
    try:
        OPS["spectral_norm_fwd"](*make_args(OPS["spectral_norm_fwd"], "linear", torch.float32, "cpu"))
    except RuntimeError as e:
        print(e)
print(*[w.message for w in caught], sep="\\n")
print(wx.info())
try:
    wx.backend("cuda")
except RuntimeError as e:
    print(e)
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name, op in OPS.items():
    args = make_args(op, next(iter(op.cases)), torch.float32, "cpu")
    with torch._C._AutoDispatchBelowAutograd():
        served = flatten(op.default.redispatch(keys, *args))
    assert all(map(torch.equal, served, flatten(op.reference(*args)))), name
    assert backends.serving(name, "cuda")[0] == "reference"
print(len(OPS), "served")
"""


def test_retired_kernels_are_not_called_again():
    done = subprocess.run([sys.executable, "-c", RETIRED], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fact = "GPU 0 (Tesla V100, sm_70) cannot run the compiled kernels, CUDA 13.0 for sm_90 (CUDA error 209)"
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"spectral_norm_fwd: backend 'cuda' has no kernel for it ({fact}); available: ")
    assert lines[1] == f"weightxform: {fact}. CUDA tensors use a slower backend: reference."
    assert any(line.split()[:2] == ["_cuda", "loaded,"] and "not used" in line and fact in line for line in lines)
    assert lines[-2].startswith(f"backend 'cuda' is not available here ({fact}); available: ")
    assert lines[-1] == f"{len(OPS)} served"
