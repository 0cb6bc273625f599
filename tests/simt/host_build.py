"""Compiles every ``csrc/*/cuda*.cu`` for the host, with simt.h in the place of the GPU, and loads it.

The ops of the result are ``weightxform_simt::<name>`` and take CPU tensors: the kernels and the C++ around them are the
same source as in ``weightxform._cuda``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from filelock import FileLock

from weightxform.registry import OPS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "simt"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}  # of simt_order()
# The deprecated function is libstdc++'s, in its own stable_sort: clang says so.
WARNINGS = ("-Wno-deprecated-declarations", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
# The race check of g++ 12 knows no address space with as much randomness as newer kernels give.
FIXED_ADDRESSES = ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"]).returncode == 0 else []
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RACES = "-fsanitize=thread"
# The race check keeps about 200 threads apart: small blocks, and so little shared memory that sums take every way.
SMALL_BLOCKS = (
    "-DWX_SN_THREADS=64", "-DWX_SN_TILE_BYTES=4096",
    "-DWX_SUB_THREADS=64", "-DWX_SUB_SUM_BYTES=24576", "-DWX_SUB_COLUMN_GROUPS=2",
    "-DWX_PARTS_WARPS=2", "-DWX_FW_THREADS=64", "-DWX_FW_GROUPS=1", "-DWX_WM_THREADS=64",
    "-DWX_MOD_THREADS=64", "-DWX_MOD_GROUPS=4", "-DWX_MLP_THREADS=64", "-DWX_MLP_GROUPS=2",
)  # fmt: skip
SMALL = (RACES, *SMALL_BLOCKS)

_library = torch.library.Library("weightxform_simt", "FRAGMENT")


def cuda_ops() -> list[str]:
    """The ops that the CUDA sources register."""
    found = []
    for source in sorted(ROOT.glob("csrc/*/cuda*.cu")):
        found += re.findall(r'm\.impl\("(\w+)"', source.read_text())
    return found


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def build(name: str, sources: list[Path], link: list[str], *flags: str) -> Path:
    """A program or shared object of CUDA sources and simt.cpp; made once for each state of the sources and flags.

    With ``-fsanitize=thread`` simt.cpp is compiled without it, see there.
    """
    command = [*compiler(), "-O1", "-g", "-std=c++17", "-fPIC", "-pthread", *WARNINGS, "-include", str(HERE / "simt.h")]
    plain = [f for f in flags if f != RACES]
    machine = [*plain, "-DSIMT_RACES"] if RACES in flags else plain
    jobs = [([*command, *machine, "-O2"], HERE / "simt.cpp"), *(([*command, *flags], source) for source in sources)]
    key = hashlib.sha256(repr((jobs, link)).encode())
    headers = [*ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cuh")]
    for path in (HERE / "simt.cpp", *sources, *sorted(headers)):
        key.update(path.read_bytes())
    out = BUILD / f"{name}-{key.hexdigest()[:16]}"
    if out.exists():
        return out
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):  # for another process that wants the same, and finds it when this one is done
        if not out.exists():
            _build(out, jobs, link, flags)
    return out


def _build(out: Path, jobs: list[tuple[list[str], Path]], link: list[str], flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder, ThreadPool(os.cpu_count()) as pool:
        objects = [f"{folder}/{i}.o" for i in range(len(jobs))]

        def compile_one(job: tuple[list[str], Path], target: str) -> None:
            subprocess.run([*job[0], "-x", "c++", "-c", str(job[1]), "-o", target], check=True)

        pool.starmap(compile_one, zip(jobs, objects, strict=True))
        sanitizers = [f for f in flags if f.startswith("-fsanitize=")]
        partial = f"{folder}/out"
        subprocess.run([*compiler(), "-pthread", *sanitizers, *objects, *link, "-o", partial], check=True)
        os.replace(partial, out)


def compile_for_host(*flags: str, rooms: str = "*") -> Path:
    """Every ``csrc/*/cuda*.cu`` (or of the rooms of this pattern) as one shared object."""
    torch_root = Path(torch.__file__).parent
    includes = ["-fvisibility=hidden", "-ffp-contract=off", "-DWX_SIMT", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes += ["-isystem", f"{torch_root}/include", f"-I{ROOT}/csrc"]
    link = ["-shared", f"-L{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return build("ops.so", sorted(ROOT.glob(f"csrc/{rooms}/cuda*.cu")), link, *includes, *flags)


def build_program(name: str, *flags: str) -> Path:
    """A program of this folder: NAME.cu."""
    link = []
    if is_clang():  # its runtime in the program itself would lie between the __shared__ variables, see fiber.h
        link = ["-shared-libsan", f"-Wl,-rpath,{runtime(*flags).parent}"]
    return build(name, [HERE / f"{name}.cu"], link, *flags)


def is_clang() -> bool:
    return "clang" in subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def library_of_compiler(name: str) -> Path:
    command = [*compiler(), f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def runtime(*flags: str) -> Path:
    """The library of the sanitizer in ``flags``."""
    sanitizer = "tsan" if RACES in flags else "asan"
    name = f"libclang_rt.{sanitizer}-{platform.machine()}.so" if is_clang() else f"lib{sanitizer}.so"
    return library_of_compiler(name)


def sanitized(flags: tuple[str, ...], what: str, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Compiles the kernels with ``flags`` and runs ``sanitized.py what LIBRARY arguments``, see there."""
    command = [*FIXED_ADDRESSES, sys.executable, str(HERE / "sanitized.py"), what, str(compile_for_host(*flags))]
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime(*flags)} {library_of_compiler('libstdc++.so.6')}",
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython and torch keep what they allocate at import
        **options,
    }
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)


def missing_barriers(*flags: str, part: int = 0, parts: int = 1) -> dict[str, tuple[str, bool]]:
    """For every barrier of the kernels, "file:line": its kind, and whether the race check reports its absence.

    ``parts``: into how many they are divided, for as many processes; ``part``: which of these, from 0.

    Threads that go astray without a barrier, so that simt.cpp ends the program, count as a report.
    """
    with tempfile.TemporaryDirectory() as folder:
        every = "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0"
        options = f"log_path={folder}/log exitcode=0 {every}"
        state = Path(folder, "state")
        while True:
            before = state.read_text() if state.exists() else None
            which = str(part), str(parts)
            done = sanitized(flags, "barriers", f"{folder}/log", str(state), *which, TSAN_OPTIONS=options)
            astray = done.returncode in (-signal.SIGABRT, 128 + signal.SIGABRT)
            if not astray or not state.exists() or state.read_text() == before:
                break
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr + "".join(p.read_text() for p in Path(folder).glob("*")))
    return json.loads(done.stdout)


class HostGPU:
    """The loaded library: ``gpu[name]`` is an op, ``gpu.order(...)`` sets the order of threads and blocks."""

    def __init__(self, path: Path) -> None:
        for name in cuda_ops():
            if not hasattr(torch.ops.weightxform_simt, name):  # by the fixture of another file
                _library.define(name + OPS[name].schema)
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(str(path))

    def __getitem__(self, name: str) -> Callable:
        return getattr(torch.ops.weightxform_simt, name).default

    def order(self, name: str) -> None:
        self.library.simt_order(ORDERS[name])

    def device(self, sms: int = 4, shared_bytes: int = 64 << 10, cooperative: bool = True) -> None:
        """What the C++ around the kernels hears of the device; without arguments, the default."""
        self.library.simt_device(sms, shared_bytes, int(cooperative))

    def barriers(self) -> dict[str, str]:
        """The barriers that kernels reached since :meth:`drop`, as ``file:line``, and their kinds."""
        self.library.simt_barriers.restype = ctypes.c_char_p
        lines = self.library.simt_barriers().decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines)

    def drop(self, place: str | None) -> None:
        """Makes the barrier at ``file:line`` do nothing, or with None, none."""
        self.library.simt_drop(place.encode() if place else None)
