"""Load the compiled kernels: ``_C`` wherever it was built, ``_cuda`` beside a torch that can use it.

A GPU or a driver that cannot run ``_cuda`` is found before the first CUDA tensor: the driver when this package is
imported, the GPUs when torch starts CUDA (asking earlier would start it, and a process that forks must not have).
One that cannot decides for the process: with GPUs of several ages all of them use Triton, or where one is too old for
Triton the reference. ``CUDA_VISIBLE_DEVICES`` leaves an old GPU out.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import backends
from ._torch import when_cuda_starts
from .registry import OPS

CUDA_LIBRARY = Path(__file__).with_name("_cuda.abi3.so")
TRITON_CAPABILITY = (8, 0)  # of the oldest GPU that Triton supports
DRIVERS = {12: 525, 13: 580}  # the first driver for each major release of CUDA

status: dict[str, str] = {}  # what happened to each library, for wx.info()
kernels: Kernels | None = None  # of _cuda, once it is loaded


class Gpu(NamedTuple):
    number: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"GPU {self.number} ({self.name}, {sm(self.capability)})"


class Kernels(NamedTuple):
    """What ``_cuda`` says of itself (csrc/common/cuda_build.cu).

    Attributes:
        runtime: the CUDA release that it is linked with, 13000 for 13.0.
        capabilities: those that it was compiled for.
        probe: 0 for a device that can run it, else a CUDA error; makes a context on the device.
    """

    runtime: int
    capabilities: tuple[tuple[int, int], ...]
    probe: Callable[[int], int]

    def __str__(self) -> str:
        return f"CUDA {release(self.runtime)} for {', '.join(map(sm, self.capabilities))}"


def load_kernels() -> None:
    """Load what there is. A library that is there and does not load is an error, not a fallback."""
    if importlib.util.find_spec("weightxform._C") is None:
        status["_C"] = "not built"
    else:
        status["_C"] = f"loaded, built with {importlib.import_module('weightxform._C').build}"
    status["_cuda"] = _load_cuda()
    status["triton"] = _load_triton()


def _load_cuda() -> str:
    global kernels
    always = os.environ.get("WEIGHTXFORM_LOAD_CUDA") == "1"
    driver = None if always or torch.version.cuda is None else driver_version()
    if driver is not None:
        when_cuda_starts(check_gpus)
    if not CUDA_LIBRARY.exists():
        return "not built"
    if not always:
        if torch.version.cuda is None:
            return "not loaded: this torch has no CUDA (WEIGHTXFORM_LOAD_CUDA=1 loads it all the same)"
        if driver is None:
            return "not loaded: no NVIDIA driver"
    kernels = open_library()
    reason = None if driver is None else driver_too_old(driver, kernels.runtime)
    if reason is None:
        return f"loaded, {kernels}"
    status["_cuda"] = f"loaded, not used: {reason}"
    status["triton"] = _load_triton()  # the next backend
    _retire(reason, triton=True, stacklevel=5)
    return status["_cuda"]


def open_library() -> Kernels:
    """Load ``_cuda``, which registers its kernels."""
    torch.ops.load_library(CUDA_LIBRARY)
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.weightxform_cuda_archs.restype = ctypes.c_char_p
    archs = library.weightxform_cuda_archs().decode().split(",")
    capabilities = tuple(divmod(int(arch) // 10, 10) for arch in archs)
    return Kernels(library.weightxform_cuda_runtime(), capabilities, library.weightxform_cuda_probe)


def _load_triton() -> str:
    """Register the Triton kernels, after those of ``_cuda``, where they can run: beside a GPU, or in the interpreter.

    Triton itself takes long to import; the first call of a kernel does that.
    """
    if "triton" in status:
        return status["triton"]
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        found = "registered, in its interpreter"
    elif torch.version.hip is None and (torch.version.cuda is None or driver_version() is None):
        why = "this torch has no CUDA" if torch.version.cuda is None else "no NVIDIA driver"
        return f"not registered: {why}; TRITON_INTERPRET=1, set before weightxform is imported, runs it on CPU tensors"
    else:
        found = "registered, imported by its first call"
    for file in sorted(Path(__file__).parent.glob("*/triton_launch.py")):
        importlib.import_module(f"{__package__}.{file.parent.name}.triton_launch").register()
    return found


def driver_version() -> int | None:
    """The CUDA release that the NVIDIA driver supports (13.0 is 13000), ``None`` where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def driver_too_old(driver: int, runtime: int) -> str | None:
    """Why a driver cannot run kernels that are linked with ``runtime``. Within a major version every driver can."""
    major = runtime // 1000
    if driver // 1000 >= major:
        return None
    newer = f" (driver {DRIVERS[major]} or newer)" if major in DRIVERS else ""
    return f"the driver knows CUDA {release(driver)}, the compiled kernels need {major}.0{newer}"


def visible_gpus() -> list[Gpu]:
    count, name, capability = torch.cuda.device_count(), torch.cuda.get_device_name, torch.cuda.get_device_capability
    return [Gpu(i, name(i), capability(i)) for i in range(count)]


def check_gpus() -> None:
    """Leave kernels that a visible GPU cannot run to the next backend. Runs when torch starts CUDA."""
    if not backends.kernels_for_cuda():
        return
    gpus = visible_gpus()
    too_old = [gpu for gpu in gpus if gpu.capability < TRITON_CAPABILITY]
    if kernels is not None and backends.retired is None:
        reason = next(filter(None, (cannot_run(gpu, kernels) for gpu in gpus)), None)
        if reason is not None:
            status["_cuda"] = f"loaded, not used: {reason}"
            _retire(reason, triton=not too_old)
    elif too_old:
        _retire(f"Triton needs {sm(TRITON_CAPABILITY)} or newer, there is {too_old[0]}", triton=False)


def cannot_run(gpu: Gpu, kernels: Kernels) -> str | None:
    """Why ``gpu`` cannot run ``kernels``.

    Machine code runs on GPUs of its major version, from its minor version on. For others the driver may compile the
    PTX, if there is any that is old enough: only a probe knows.
    """
    major, minor = gpu.capability
    if any(major == a and minor >= b for a, b in kernels.capabilities):
        return None
    error = kernels.probe(gpu.number)
    return f"{gpu} cannot run the compiled kernels, {kernels} (CUDA error {error})" if error else None


def _retire(reason: str, triton: bool, stacklevel: int = 2) -> None:
    """Take CUDA tensors away from the kernels that serve them, with one warning."""
    backends.retire_cuda(reason, triton)
    names = sorted({"triton" if op.triton_serves_cuda else "reference" for op in OPS.values()})
    warnings.warn(
        f"weightxform: {reason}. CUDA tensors use a slower backend: {', '.join(names)}.", stacklevel=stacklevel
    )


def release(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def sm(capability: Sequence[int]) -> str:
    """(9, 0) as "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"
