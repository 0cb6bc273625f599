"""CI: every op that csrc/*/cuda*.cu registers is there when ``_cuda`` is loaded, compiled for every architecture.

Needs no GPU. cuobjdump comes with CUDA, and inside the triton wheel.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["WEIGHTXFORM_LOAD_CUDA"] = "1"

import torch

import weightxform  # noqa: F401  registers the ops
from weightxform._load import CUDA_LIBRARY, status

ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
ROOT = Path(__file__).parent.parent


def registered_in_sources() -> set[str]:
    found = set()
    for source in ROOT.glob("csrc/*/cuda*.cu"):
        names = re.findall(r'm\.impl\("(\w+)"', source.read_text())
        if not names:
            sys.exit(f"{source.relative_to(ROOT)} registers no op")
        found.update(names)
    return found


def cuobjdump() -> str:
    folders = [os.environ.get("CUDA_HOME", "") + "/bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        folders.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    return found or sys.exit("no cuobjdump: pip install triton")


def main() -> None:
    if not status["_cuda"].startswith("loaded"):
        sys.exit(f"_cuda: {status['_cuda']}")
    ops = registered_in_sources()
    missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"weightxform::{op}", "CUDA")]
    if missing:
        sys.exit(f"not registered in _cuda: {', '.join(missing)}")

    def listed(option: str) -> str:
        return subprocess.run([cuobjdump(), option, CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout

    # One cubin an architecture for each .cu file.
    cubins = re.findall(r"\.(sm_\d+[af]?)\.cubin", listed("--list-elf"))
    files = len(list(ROOT.glob("csrc/*/cuda*.cu")))
    wrong = [arch for arch in sorted(ARCHITECTURES) if cubins.count(arch) != files]
    if wrong or not re.search(r"\.sm_80\.ptx", listed("--list-ptx")):
        sys.exit(f"_cuda needs {files} cubins for each of {sorted(ARCHITECTURES)} and PTX, has {sorted(cubins)}")
    print(f"_cuda: {len(ops)} ops, {files} source files, cubins for {', '.join(sorted(ARCHITECTURES))}, and PTX")


if __name__ == "__main__":
    main()
