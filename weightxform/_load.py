"""Load the compiled kernels: ``_C`` wherever it was built, ``_cuda`` beside a torch that can use it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import torch

CUDA_LIBRARY = Path(__file__).with_name("_cuda.abi3.so")
CUDA_RUNTIME = 13000  # the CUDA release that _cuda is linked with: the driver must know it

status: dict[str, str] = {}  # what happened to each library, for wx.info()


def load_kernels() -> None:
    """Load what there is. A library that is there and does not load is an error, not a fallback."""
    if importlib.util.find_spec("weightxform._C") is None:
        status["_C"] = "not built"
    else:
        status["_C"] = f"loaded, built with {importlib.import_module('weightxform._C').build}"
    status["_cuda"] = _load_cuda()


def _load_cuda() -> str:
    if not CUDA_LIBRARY.exists():
        return "not built"
    if os.environ.get("WEIGHTXFORM_LOAD_CUDA") != "1":
        if torch.version.cuda is None:
            return "not loaded: this torch has no CUDA (WEIGHTXFORM_LOAD_CUDA=1 loads it all the same)"
        driver = driver_version()
        if driver is None:
            return "not loaded: no NVIDIA driver"
        if driver < CUDA_RUNTIME:
            reason = f"the driver knows CUDA {release(driver)}, the compiled kernels need {release(CUDA_RUNTIME)}"
            warnings.warn(
                f"weightxform: {reason}; CUDA tensors use slower kernels. A driver from 580 on has them.", stacklevel=4
            )
            return f"not loaded: {reason}"
    torch.ops.load_library(CUDA_LIBRARY)
    return "loaded"


def driver_version() -> int | None:
    """The CUDA release that the NVIDIA driver supports (13.0 is 13000), ``None`` where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def release(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
