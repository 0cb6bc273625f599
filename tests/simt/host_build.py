"""Compiles every ``csrc/*/cuda*.cu`` for the host, with simt.h in the place of the GPU, and loads it.

The ops of the result are ``weightxform_simt::<name>`` and take CPU tensors: the kernels and the C++ around them are the
same source as in ``weightxform._cuda``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from weightxform.registry import OPS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ORDERS = {"forward": 0, "reverse": 1, "random": 2}  # enum Order of simt.h

_library = torch.library.Library("weightxform_simt", "FRAGMENT")


def cuda_ops() -> list[str]:
    """The ops that the CUDA sources register."""
    found = []
    for source in sorted(ROOT.glob("csrc/*/cuda*.cu")):
        found += re.findall(r'm\.impl\("(\w+)"', source.read_text())
    return found


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def compile_for_host(folder: Path, *flags: str) -> Path:
    """The shared object; made once for each state of the sources, the flags and torch."""
    torch_root = Path(torch.__file__).parent
    sources = sorted(ROOT.glob("csrc/*/cuda*.cu"))
    headers = [*ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cuh"), HERE / "simt.h"]
    command = [
        *compiler(),
        *("-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
        *(
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-Werror",
            "-DWX_SIMT",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ),
        *("-include", str(HERE / "simt.h"), "-isystem", f"{torch_root}/include", f"-I{ROOT}/csrc"),
        *flags,
        *("-shared", "-x", "c++", *map(str, sources), "-x", "none"),
        *(f"-L{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in (*sources, *sorted(headers)):
        key.update(path.read_bytes())
    out = folder / f"simt-{key.hexdigest()[:16]}.so"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(out)
    return out


class HostGPU:
    """The loaded library: ``gpu[name]`` is an op, ``gpu.order(...)`` sets the order of threads and blocks."""

    def __init__(self, path: Path) -> None:
        for name in cuda_ops():
            _library.define(name + OPS[name].schema)
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(str(path))

    def __getitem__(self, name: str) -> Callable:
        return getattr(torch.ops.weightxform_simt, name).default

    def order(self, name: str) -> None:
        self.library.simt_order(ORDERS[name])
