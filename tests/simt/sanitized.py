"""Runs the cases of every CUDA op in a library that was compiled with sanitizers, in a process of its own.

    sanitized.py cases LIBRARY DTYPE ...
        every case runs; what the sanitizer thinks is in the exit status
    sanitized.py barriers LIBRARY LOG STATE PART PARTS
        the race check finds out when a barrier is missing, one at a time

The numbers are checked without sanitizers, by ``test_host_gpu.py``: references would take most of the time here.
So would the large cases, which take no other path.
"""

import json
import sys
from pathlib import Path

import torch
from host_build import ORDERS, HostGPU, cuda_ops

from weightxform.registry import OPS
from weightxform.spectral_norm.op import make_inputs
from weightxform.verify import make_args

CASES = [(name, case) for name in cuda_ops() for case in OPS[name].cases if "large" not in case]

# Matrices of which a block takes several tiles, one after the other; and one whose products have to be scaled.
MORE = {"wide": ((2, 70_000), 1.0), "tall": ((40_000, 2), 1.0), "huge": ((300, 100), 2.0**60)}


def arguments(name: str, case: str) -> tuple:
    if name != "spectral_norm_fwd" or case not in MORE:
        return make_args(OPS[name], case, torch.float32, "cpu")
    shape, scale = MORE[case]
    weight, u, v = make_inputs(shape, 0, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    return scale * weight, u, v, None, 0, 1, 1e-12, False, None, None


def cases(gpu: HostGPU, dtypes: list[str]) -> None:
    for i, dtype in enumerate(dtypes):
        gpu.order([*ORDERS][i % len(ORDERS)])
        for name, case in CASES:
            op, wanted = OPS[name], getattr(torch, dtype)
            gpu[name](*make_args(op, case, wanted if wanted in op.dtypes else torch.float32, "cpu"))
    print(f"{len(dtypes) * len(CASES)} cases ran")


def barriers(gpu: HostGPU, log: str, state: Path, part: int, parts: int) -> bool:
    """Prints, as JSON, what became of each barrier (of a part of them) left out: a report or the end, or none.

    ``log`` is the log_path of the race check; what it holds grows with each report. A kernel without one of its
    barriers may also end the program, which then starts again: ``state`` has what was found before, and what it was at.
    """

    def run(name: str, case: str, dropped: str | None, order: str) -> bool:
        before = reports()
        gpu.order(order)
        gpu.drop(dropped)
        gpu[name](*made[name, case])
        return reports() > before

    def reports() -> int:
        return sum(path.stat().st_size for path in Path(log).parent.glob(Path(log).name + "*"))

    everywhere = [*CASES, *(("spectral_norm_fwd", more) for more in MORE)]
    made = {one: arguments(*one) for one in everywhere}
    known = json.loads(state.read_text()) if state.exists() else {"found": {}, "at": None, "kinds": {}, "reached": {}}
    found, kinds, reached = known["found"], known["kinds"], known["reached"]
    if known["at"]:
        found[known["at"]] = True
    if not reached:
        for one in everywhere:
            if run(*one, None, "forward"):
                print(f"{'-'.join(one)}: a race, and no barrier was left out")
                return False
            for place, kind in gpu.barriers().items():
                kinds[place] = kind
                reached.setdefault(place, []).append(one)
    for place, where in [*sorted(reached.items())][part::parts]:
        if place not in found:
            state.write_text(json.dumps({**known, "found": found, "at": place}))
            found[place] = any(run(*one, place, order) for order in ORDERS for one in map(tuple, where))
    print(json.dumps({place: [kinds[place], found[place]] for place in sorted(found)}))
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpu = HostGPU(Path(sys.argv[2]))
    if sys.argv[1] == "barriers":
        sys.exit(not barriers(gpu, sys.argv[3], Path(sys.argv[4]), *map(int, sys.argv[5:])))
    cases(gpu, sys.argv[3:])
