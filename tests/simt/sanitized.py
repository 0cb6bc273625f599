"""Runs the cases of every CUDA op in a library that was compiled with sanitizers, in a process of its own.

    sanitized.py cases LIBRARY DTYPE ...     the numbers are right; what the sanitizer thinks is in its exit status
    sanitized.py barriers LIBRARY LOG        the race check finds out when a barrier is missing, one at a time

Without the large cases: they take most of the time and no other path.
"""

import json
import sys
from pathlib import Path

import torch
from host_build import ORDERS, HostGPU, cuda_ops

from weightxform.registry import OPS
from weightxform.spectral_norm.op import make_inputs
from weightxform.verify import check_case, make_args

CASES = [(name, case) for name in cuda_ops() for case in OPS[name].cases if "large" not in case]

# Matrices of which a block takes several tiles, one after the other; and one whose products have to be scaled.
MORE = {"wide": ((2, 70_000), 1.0), "tall": ((40_000, 2), 1.0), "huge": ((300, 100), 2.0**60)}


def arguments(name: str, case: str) -> tuple:
    if case not in MORE:
        return make_args(OPS[name], case, torch.float32, "cpu")
    shape, scale = MORE[case]
    weight, u, v = make_inputs(shape, 0, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    return scale * weight, u, v, None, 0, 1, 1e-12, False, None, None


def cases(gpu: HostGPU, dtypes: list[str]) -> bool:
    results = []
    for i, dtype in enumerate(dtypes):
        gpu.order([*ORDERS][i % len(ORDERS)])
        for name, case in CASES:
            results.append(check_case(OPS[name], case, getattr(torch, dtype), "cpu", gpu[name]))
    failures = [str(r) for r in results if not r.passed]
    print("\n".join(failures) or f"{len(results)} cases passed")
    return not failures


def barriers(gpu: HostGPU, log: str) -> bool:
    """Prints, as JSON, what became of every barrier when it was left out: a report, or none.

    ``log`` is the log_path of the race check; what it holds grows with each report.
    """

    def run(name: str, case: str, dropped: str | None, order: str) -> bool:
        before = reports()
        gpu.order(order)
        gpu.drop(dropped)
        gpu[name](*arguments(name, case))
        return reports() > before

    def reports() -> int:
        return sum(path.stat().st_size for path in Path(log).parent.glob("*"))

    kinds: dict[str, str] = {}
    reached: dict[str, list[tuple[str, str]]] = {}
    for name, case in [*CASES, *(("spectral_norm_fwd", more) for more in MORE)]:
        if run(name, case, None, "forward"):
            print(f"{name}-{case}: a race, and no barrier was left out")
            return False
        for place, kind in gpu.barriers().items():
            kinds[place] = kind
            reached.setdefault(place, []).append((name, case))
    found = {}
    for place, where in reached.items():
        found[place] = any(run(*one, place, order) for one in where for order in ORDERS)
    print(json.dumps({place: [kinds[place], found[place]] for place in sorted(found)}))
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpu = HostGPU(Path(sys.argv[2]))
    good = barriers(gpu, sys.argv[3]) if sys.argv[1] == "barriers" else cases(gpu, sys.argv[3:])
    sys.exit(not good)
