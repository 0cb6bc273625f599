"""Everything that needs a GPU, unattended: build, verify, tests, sanitizers, times. ``make gpu`` runs it.

For a bare machine: the Python that runs this has torch and pytest, nvcc is somewhere, there is no network. Nothing is
installed. Each step has a time limit and a log, none stops the ones after it, and ``summary.json`` is written after
each; ``everything.tar.gz`` holds all that is in the folder. Steps that only check run beside each other. Times are
taken last and alone, the most telling ones first, for as long as there is time.

Exit status: 0 if every step passed; 1 if one failed, ran out of its time, or found no time left (but for times, which
may end early). A sanitizer that is not there or refuses the device is listed as "not run" and fails nothing.

``--device cpu`` is the rehearsal: the same steps without a GPU, on the kernels of the CPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 6  # processes that share the GPU while nothing is timed
LEAST = 10.0  # seconds: with less than that a step is not started
ROOMS = "subspace", "spectral_norm", "weight_norm"  # the longest first
PATHS = "phases", "resident"  # WEIGHTXFORM_CUDA_PATH: the two ways in which the CUDA kernels are launched

# Layers that fit into one block or not, tall, wide, strided, and a list of all kinds; projections of every kind.
SMALL_CASES = (
    "linear", "prime_wide", "large", "conv_transpose", "v_first_large", "mixed", "two_of_three",
    "one_hot-shards", "one_hot-more_columns_than_tile", "sparse-toy_tile_64", "block_hadamard-toy_tile_64",
    "block_hadamard-net_tile_4096", "block_hadamard-shards", "rademacher-net", "gaussian-batch",
    "fastfood_global_sign-net", "fastfood_stacked_binomial-batch", "toy", "wide", "bfloat16_basis",
)  # fmt: skip

# The figures that the README asks for come first; "*": whatever is left.
TIMED = (
    ("mlp-64x64x64", True), ("linear-2048x2048", True), ("resnet-18", True), ("linear-8192x8192", True),
    ("block_hadamard-2^24-d1000", True), ("one_hot-2^24-d1000", True), ("block_hadamard-1e8-d10000", True),
    ("one_hot-1e8-d10000", True), ("rademacher-2^20-d256", True), ("dense-2^20-d256", True),
    ("linear-512x512", True), ("mlp-64x64x64", False), ("resnet-50", True), ("biggan-discriminator", True),
    ("linear-4096x4096", True), ("sngan-discriminator", True), ("transformer-12", True),
)  # fmt: skip

FACTS = """
import importlib.util, json, os, platform, shutil, sysconfig
facts = {"python": platform.python_version(), "cores": os.cpu_count()}
facts["Python.h"] = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
facts["programs"] = {p: shutil.which(p) for p in ("nvcc", "g++", "ninja", "compute-sanitizer", "cuobjdump")}
facts["modules"] = {m: importlib.util.find_spec(m) is not None
                    for m in ("setuptools", "ninja", "pytest", "rich", "triton", "numpy", "hypothesis")}
import torch
facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts["gpus"].append({"name": p.name, "arch": f"{p.major}{p.minor}", "bytes": p.total_memory,
                              "multiprocessors": p.multi_processor_count})
if facts["modules"]["triton"]:
    import triton
    facts["triton"] = triton.__version__
print(json.dumps(facts))
"""


@dataclass
class Step:
    """One command. ``status``: "passed", "failed", "timed out", "no time left" or "not run" (and ``note`` says why)."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    required: bool = True  # that it runs at all
    status: str = ""
    exit: int | None = None
    seconds: float = 0.0
    note: str = ""


class Run:
    """The steps of one run, its clock and its folder."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds
        self.start = time.monotonic()
        self.steps: list[Step] = []
        self.facts: dict[str, Any] = {}
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)
        for old in (*out.glob("*.log"), *out.glob("bench*.json")):  # of an earlier run
            old.unlink()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def do(self, step: Step) -> Step:
        """Run one step within its limit and what is left of the whole; write its log and the summary."""
        limit = min(step.limit, self.left())
        began = time.monotonic()
        if self.stopped or limit < LEAST:
            step.status = "no time left"
        else:
            self._run(step, limit)
        step.seconds = round(time.monotonic() - began, 1)
        with self.lock:
            self.steps.append(step)
            self.write_summary()
            print(
                f"{self.seconds - self.left():5.0f} s  {step.name:24} {step.status:12} {step.seconds:6.1f} s",
                flush=True,
            )
        return step

    def _run(self, step: Step, limit: float) -> None:
        log = self.log(step)
        with log.open("w") as file:
            file.write(f"$ {' '.join(f'{k}={v}' for k, v in step.environment.items())} {' '.join(step.command)}\n")
            file.flush()
            try:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=environment(step.environment), stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as e:
                step.status, step.note = "failed", str(e)
                return
            self.processes.add(process)
            try:
                step.exit = process.wait(limit)
                step.status = "passed" if step.exit == 0 else "failed"
            except subprocess.TimeoutExpired:
                cut = limit < step.limit and not step.required  # by the end of the run, not by its own fault
                step.status, step.note = "no time left" if cut else "timed out", f"after {limit:.0f} s"
            finally:
                end(process)
                self.processes.discard(process)

    def together(self, steps: Sequence[Step]) -> list[Step]:
        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(self.do, steps))

    def log(self, step: Step) -> Path:
        return self.out / f"{step.name}.log"

    def failures(self) -> list[Step]:
        return [s for s in self.steps if s.status != "passed" and (s.required or s.status in ("failed", "timed out"))]

    def write_summary(self) -> None:
        summary = {
            "passed": not self.failures(),
            "seconds": round(self.seconds - self.left(), 1),
            "commit": commit(),
            "machine": self.facts,
            "steps": [asdict(step) for step in self.steps],
        }
        write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")

    def stop(self, *_: object) -> None:
        """The machine is taken away: end what runs, keep what there is."""
        self.stopped = True
        for process in list(self.processes):
            end(process)


def write(path: Path, text: str) -> None:
    """Never half a file, whenever this is killed."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def end(process: subprocess.Popen) -> None:
    """Whatever is left of a process and its children."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(3)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def environment(more: dict[str, str]) -> dict[str, str]:
    """This one's, with this source first, and with the programs of CUDA and of this Python in reach."""
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin", str(Path(sys.executable).parent)]
    folders += sorted(map(str, Path("/usr/local").glob("cuda-*/bin")), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WEIGHTXFORM_")}
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


def commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def found(program: str) -> str | None:
    return shutil.which(program, path=environment({})["PATH"])


PYTHON = [sys.executable, "-X", "faulthandler"]
OURS = [*PYTHON, "-m", "weightxform"]


def checks(device: str) -> list[Step]:
    """What may run beside each other, the longest first."""
    gpu = device == "cuda"
    verify = [*OURS, "verify", "--device", device]
    pytest = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100"]
    where = {"WEIGHTXFORM_TEST_DEVICE": device}
    steps = [
        Step(f"test-{path.stem.removeprefix('test_gpu_')}", [*pytest, str(path.relative_to(ROOT))], 170, where)
        for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    ]
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}
    forced = {"WEIGHTXFORM_BACKEND": "triton", **interpreted}
    if gpu:
        for path in PATHS:
            steps.append(sanitizer("memcheck", path))
            steps.append(sanitizer("racecheck", path))
        for path in PATHS:
            command = [*verify, "--backend", "cuda", "--op", "spectral_norm_*"]  # the others have one path
            steps.append(Step(f"verify-{path}", command, 120, {"WEIGHTXFORM_CUDA_PATH": path}))
    files = {"triton": "weightxform/{}/triton*.py", "cuda": "csrc/{}/cuda*.cu"}
    for room in ROOMS:
        for backend in ("triton", "reference", device):
            if backend not in files or any(ROOT.glob(files[backend].format(room))):
                command = [*verify, "--backend", backend, "--op", f"{room}_*"]
                name = f"verify-{backend}-{room.replace('_', '-')}"
                steps.append(Step(name, command, 170, forced if backend == "triton" else {}))
    return steps


def sanitizer(tool: str, path: str) -> Step:
    """Errors of the CUDA API are left out: torch itself asks for entry points that a driver does not have."""
    program = found("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
    settings = {"WEIGHTXFORM_CUDA_PATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has its own bounds
    command = [program, *options, sys.executable, str(Path(__file__)), "--small"]
    return Step(f"{tool}-{path}", command, 150, settings, required=False)


def excuse(run: Run, step: Step) -> None:
    """A sanitizer that could not work found nothing."""
    text = run.log(step).read_text(errors="replace") if run.log(step).exists() else ""
    if found("compute-sanitizer") is None:
        step.status, step.note = "not run", "no compute-sanitizer"
    elif "Device not supported" in text or "not supported on this" in text:
        step.status, step.note = "not run", "compute-sanitizer refuses this device"


def times(device: str, out: Path) -> list[Step]:
    """One process a case: one that is stopped leaves the results of the others."""
    steps = []
    for case, main_only in TIMED if device == "cuda" else TIMED[:2]:
        name = f"bench-{case}" + ("" if main_only else "-full")
        command = [*OURS, "bench", case, "--device", device, "--seconds", "2", "--json", str(out / f"{name}.json")]
        steps.append(Step(name, [*command, *(["--main-only"] if main_only else [])], 100, required=False))
    return steps


def small() -> int:
    """A few cases of each op, for the sanitizers."""
    import torch

    from weightxform.registry import OPS
    from weightxform.verify import check_case

    checked = 0
    for op in OPS.values():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"weightxform::{op.name}", "CUDA"):
            continue
        for case in (c for c in SMALL_CASES if c in op.cases):
            for dtype in (torch.float32, torch.bfloat16):
                result = check_case(op, case, dtype, "cuda", op)
                checked += 1
                if not result.passed:
                    sys.exit(str(result))
    print(f"{checked} cases passed")
    return 0 if checked else 1


def gather(run: Run) -> None:
    """The times of all cases in one file, and everything in one archive."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(run.out.glob("bench-*.json"))}
    if results:
        write(run.out / "bench.json", json.dumps(results, indent=1) + "\n")
    archive = run.out / "everything.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(run.out.iterdir()):
            if path.is_file() and path != archive:
                tar.add(path, path.name)


def tails(run: Run, lines: int = 25) -> None:
    for step in run.failures():
        log = run.log(step)
        text = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
        print(f"\n--- {step.name}: {step.status} {step.note}", *text, sep="\n")


def build_settings(run: Run) -> dict[str, str]:
    """Only for the GPU that is here: each architecture takes as long again."""
    archs = sorted({gpu["arch"] for gpu in run.facts.get("gpus", [])})
    if not archs:
        ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            text = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
        archs = sorted({line.strip().replace(".", "") for line in text.splitlines() if line.strip()[:1].isdigit()})
    return {"WEIGHTXFORM_CUDA_ARCHS": ";".join(archs)} if archs else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=470, help="that the whole may take; 470")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of steps; build and machine always run")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        return small()
    out = args.out.resolve()
    first = [Step("info", [*OURS, "info", "--json"], 60)]
    stages = [[s for s in steps if fnmatch.fnmatch(s.name, args.only)] for steps in
              (first, checks(args.device), times(args.device, out))]  # fmt: skip
    if args.list:
        for step in (s for stage in stages for s in stage):
            print(f"{step.name:24} {step.limit:4.0f} s  {' '.join(step.command)}")
        return 0
    run = Run(out, args.seconds)
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)

    machine = run.do(Step("machine", [*PYTHON, "-c", FACTS], 90))
    if machine.status == "passed":
        run.facts = json.loads(run.log(machine).read_text().splitlines()[-1])  # above it torch may have warned
    if args.device == "cuda" and not run.facts.get("gpus"):
        machine.status, machine.note = "failed", machine.note or "torch sees no GPU"
    if args.device == "cuda":
        run.do(Step("nvidia-smi", ["nvidia-smi"], 30, required=False))
        settings = build_settings(run)
        run.do(Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240, settings))
        archs = ["--archs", *settings.values()] if settings else []
        run.do(Step("budgets", [sys.executable, "tools/check_cuda.py", *archs], 60))
    for step in stages[0]:
        run.do(step)
    for step in run.together(stages[1]):
        if step.name.startswith(("memcheck", "racecheck")) and step.status != "passed":
            excuse(run, step)
    gather(run)
    for step in stages[2]:
        run.do(step)
    run.write_summary()
    gather(run)
    tails(run)
    print(f"\n{'FAILED' if run.failures() else 'passed'}; {out / 'summary.json'}")
    return 1 if run.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
