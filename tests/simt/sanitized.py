"""Runs the cases of every CUDA op in a library that was compiled with sanitizers: ``sanitized.py LIBRARY DTYPE``.

Without the large ones: they take most of the time and no other path.
"""

import sys
from pathlib import Path

import torch
from host_build import HostGPU, cuda_ops

from weightxform.registry import OPS
from weightxform.verify import check_case

if __name__ == "__main__":
    gpu, dtype = HostGPU(Path(sys.argv[1])), getattr(torch, sys.argv[2])
    cases = [(name, case) for name in cuda_ops() for case in OPS[name].cases if "large" not in case]
    results = [check_case(OPS[name], case, dtype, "cpu", gpu[name]) for name, case in cases]
    failures = [str(r) for r in results if not r.passed]
    print("\n".join(failures) or f"{len(results)} cases passed")
    sys.exit(bool(failures))
