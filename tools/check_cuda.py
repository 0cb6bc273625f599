"""CI: every op that csrc/*/cuda*.cu registers is there when ``_cuda`` is loaded, compiled for every architecture, and
each kernel keeps to its budget of registers and shared memory. Prints what each kernel takes.

Needs no GPU. cuobjdump comes with CUDA, and inside the triton wheel.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = "80;90;100;120"

REGISTERS = 65536  # of a multiprocessor, on all of these architectures
STATIC_SHARED = 48 * 1024  # what a block may have without asking
RESERVED_SHARED = 1024  # from sm_90 on the system's own, which cuobjdump counts in


class Budget(NamedTuple):
    """``blocks`` of ``threads`` must fit into a multiprocessor by their registers. ``shared``: static, in bytes.

    ``stack``: bytes that are no spill.
    """

    pattern: str
    threads: int
    blocks: int
    shared: int
    why: str
    stack: int = 0

    @property
    def registers(self) -> int:
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)


# The first pattern that fits the name of a kernel counts.
BUDGETS = (
    Budget("nothing", 256, 8, 0, "does nothing: it is only asked whether it could run"),
    Budget(
        "forward_*<double>",
        256,
        1,
        STATIC_SHARED,
        "two registers for a number: one block an SM",
    ),
    Budget(
        "block_hadamard<double>",
        256,
        1,
        STATIC_SHARED,
        "a thread has 16 numbers of the tile and of theta0, two registers each",
    ),
    Budget("one_hot<double>", 256, 1, STATIC_SHARED, "eight of each, and the permutation of each"),
    Budget("tile_sums<double>", 256, 1, STATIC_SHARED, "the same, and the next gradient under way"),
    Budget(
        "filter_grads",
        96,
        4,
        STATIC_SHARED,
        "a thread has three columns of eight filters and of their gradients, and the next ones under way",
    ),
    Budget("network_grads_any<double>", 128, 2, STATIC_SHARED, "two registers for a number"),
    Budget("network*", 128, 3, STATIC_SHARED, "a thread has the weights of two hidden units, and the sums for them"),
    Budget("matrices*", 256, 2, STATIC_SHARED, "sin and cos of a large angle use a few words of stack", 40),
    Budget("gradients*", 32, 8, STATIC_SHARED, "the same; a warp has a condition", 40),
    Budget("*", 256, 2, STATIC_SHARED, "streams from memory: 512 threads must be there to hide its latency"),
)


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    local: int

    def faults(self) -> list[str]:
        budget = budget_of(self.name)
        faults = []
        if self.stack > budget.stack or self.local:
            faults.append(f"spills or has an array that is indexed at run time: {self.stack} + {self.local} bytes")
        if self.registers > budget.registers:
            faults.append(f"{self.registers} registers, budget {budget.registers}")
        if self.shared > budget.shared + RESERVED_SHARED:
            faults.append(f"{self.shared} bytes of shared memory, budget {budget.shared + RESERVED_SHARED}")
        return [f"{self.name} on {self.arch}: {fault}" for fault in faults]


def budget_of(name: str) -> Budget:
    return next(b for b in BUDGETS if fnmatch.fnmatchcase(name, b.pattern))


def kernel_name(mangled: str) -> str:
    """The name without namespaces: _ZN2wx3gpu2sn5innerIfEEv... is inner, and inner<double> if its first argument is."""
    found, rest = mangled, mangled.removeprefix("_ZN").removeprefix("_Z").removeprefix("K")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        found, rest = rest[match.end() : end], rest[end:]
    return found + "<double>" * rest.startswith("Id")


def parse_usage(text: str) -> Iterator[Kernel]:
    """The kernels in the output of ``cuobjdump -res-usage``."""
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = kernel_name(match[1])
        elif name and (match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            yield Kernel(name, arch, *map(int, match.groups()))
            name = ""


def table(kernels: Iterable[Kernel]) -> list[str]:
    """The most that any instance of a kernel takes, by architecture."""
    rows = [["kernel", "arch", "instances", "registers", "of", "shared", "of", "stack"]]
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name, kernel.arch), []).append(kernel)
    for (name, arch), group in sorted(
        groups.items(), key=lambda item: (item[0][0], int(re.sub(r"\D", "", item[0][1])))
    ):
        budget = budget_of(name)
        registers, shared, stack = (max(getattr(k, f) for k in group) for f in ("registers", "shared", "stack"))
        numbers = len(group), registers, budget.registers, shared, budget.shared + RESERVED_SHARED, stack
        rows.append([name, arch, *map(str, numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def registered_in_sources() -> set[str]:
    found = set()
    for room in {source.parent for source in ROOT.glob("csrc/*/cuda*.cu")} - {ROOT / "csrc" / "common"}:
        names = [n for source in room.glob("cuda*.cu") for n in re.findall(r'm\.impl\("(\w+)"', source.read_text())]
        if not names:
            sys.exit(f"{room.relative_to(ROOT)}/cuda*.cu registers no op")
        found.update(names)
    return found


def cuobjdump(option: str, library: Path) -> str:
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        folders.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        sys.exit("no cuobjdump: pip install triton")
    return subprocess.run([found, option, str(library)], capture_output=True, text=True, check=True).stdout


def check_registrations(library: Path) -> set[str]:
    os.environ["WEIGHTXFORM_LOAD_CUDA"] = "1"
    import torch

    import weightxform  # noqa: F401  registers the ops
    from weightxform._load import CUDA_LIBRARY, status

    if library != CUDA_LIBRARY:
        sys.exit(f"{library} is not that of the weightxform that is imported, {CUDA_LIBRARY}")
    if not status["_cuda"].startswith("loaded"):
        sys.exit(f"_cuda: {status['_cuda']}")
    ops = registered_in_sources()
    missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"weightxform::{op}", "CUDA")]
    if missing:
        sys.exit(f"not registered in _cuda: {', '.join(missing)}")
    return ops


def check_architectures(library: Path, wanted: set[str], ptx: bool) -> int:
    """One cubin an architecture for each .cu file; returns how many files there are."""
    cubins = re.findall(r"\.(sm_\d+[af]?)\.cubin", cuobjdump("--list-elf", library))
    files = len(list(ROOT.glob("csrc/*/cuda*.cu")))
    wrong = [arch for arch in sorted(wanted) if cubins.count(arch) != files]
    if wrong:
        sys.exit(f"_cuda needs {files} cubins for each of {sorted(wanted)}, has {sorted(cubins)}")
    if ptx and not re.search(r"\.sm_80\.ptx", cuobjdump("--list-ptx", library)):
        sys.exit("_cuda needs PTX for sm_80, so that GPUs of the future can run it")
    return files


def check_budgets(text: str) -> list[Kernel]:
    kernels = list(parse_usage(text))
    print("\n".join(table(kernels)))
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    if faults:
        sys.exit("\n".join(["", *faults]))
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", default=ARCHITECTURES, help="as in WEIGHTXFORM_CUDA_ARCHS; the wheel's by default")
    parser.add_argument("--usage", type=Path, metavar="FILE", help="only the budgets, of any object or shared object")
    args = parser.parse_args()
    if args.usage:
        check_budgets(cuobjdump("-res-usage", args.usage))
        return
    library = ROOT / "weightxform" / "_cuda.abi3.so"
    spec = importlib.util.find_spec("weightxform")
    if spec is not None and spec.submodule_search_locations:
        library = Path(spec.submodule_search_locations[0]) / library.name
    wanted = {f"sm_{arch}" for arch in args.archs.split(";") if not arch.endswith("+PTX")}
    ops = check_registrations(library)
    files = check_architectures(library, wanted, ptx=args.archs == ARCHITECTURES)
    kernels = check_budgets(cuobjdump("-res-usage", library))
    absent = wanted - {k.arch for k in kernels}
    if absent:
        sys.exit(f"cuobjdump shows no kernel for {', '.join(sorted(absent))}")
    print(f"\n_cuda: {len(ops)} ops, {files} source files, {len(kernels)} kernels, {', '.join(sorted(wanted))}")


if __name__ == "__main__":
    main()
