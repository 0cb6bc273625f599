"""Runs the cases of every CUDA op in a library that was compiled with sanitizers: ``sanitized.py LIBRARY DTYPE``."""

import sys
from pathlib import Path

import torch
from host_build import HostGPU, cuda_ops

from weightxform.registry import OPS
from weightxform.verify import check_case

if __name__ == "__main__":
    gpu, dtype = HostGPU(Path(sys.argv[1])), getattr(torch, sys.argv[2])
    results = [check_case(OPS[name], case, dtype, "cpu", gpu[name]) for name in cuda_ops() for case in OPS[name].cases]
    failures = [str(r) for r in results if not r.passed]
    print("\n".join(failures) or f"{len(results)} cases passed")
    sys.exit(bool(failures))
