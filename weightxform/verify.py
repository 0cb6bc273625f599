"""Every op's cases on this machine against float64: ``python -m weightxform verify``.

A kernel passes where, for each output,

    err(kernel, float64) <= 2 err(reference in the same dtype, float64) + 2 eps(output dtype)

with err the relative error over the whole tensor. Float64 has no oracle in twice its precision: the error of the
reference is taken to be that in float32 times eps(float64)/eps(float32), and counts once more because the oracle has it
too. Memory that a kernel does not write is NaN, inputs must come back unchanged, a second run must give the same bits.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .info import columns
from .numerics import FLOAT_DTYPES, relative_error
from .registry import OPS, Op

FACTOR = 2.0  # of the reference's own error
SLACK = 2.0  # eps of the output's dtype


@dataclass(frozen=True)
class Result:
    """What :func:`check_case` found. ``error`` and ``bound`` belong to the output that came nearest to its bound."""

    op: str
    case: str
    dtype: str
    device: str
    error: float
    bound: float
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.failure is None

    def __str__(self) -> str:
        where = f"{self.op}-{self.case}, {self.dtype} on {self.device}"
        return f"{where}: {self.failure or 'ok'} (error {self.error:.2e}, bound {self.bound:.2e})"


def make_args(op: Op, case: str, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """The arguments of one case; the same values every time and on every device."""
    return op.cases[case](dtype, torch.device(device), torch.Generator().manual_seed(0))


def convert(value: Any, convert_tensor: Callable[[Tensor], Tensor]) -> Any:
    """``value`` (an argument list) with every tensor converted."""
    if isinstance(value, Tensor):
        return convert_tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(convert(v, convert_tensor) for v in value)
    return value


def oracle(op: Op, args: tuple) -> list[Tensor]:
    """The outputs in float64, on the CPU: the reference on upcast arguments, output dtypes included."""

    def upcast(tensor: Tensor) -> Tensor:
        return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()

    wide = tuple(torch.float64 if isinstance(a, torch.dtype) else a for a in convert(args, upcast))
    return flatten(op.reference(*wide))


def flatten(outputs: Any) -> list[Tensor]:
    """The tensors among an op's results or arguments, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (list, tuple)):
        return [tensor for part in outputs for tensor in flatten(part)]
    return []


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN inside: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Only the fill is wanted: what torch says about the determinism of its own ops is not our subject.
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def allowed_errors(op: Op, case: str, dtype: torch.dtype) -> list[float]:
    """For each output, twice the error of the reference in ``dtype``; for float64 three times (see above)."""
    return list(standard(op, case, dtype).allowed)


class Standard(NamedTuple):
    """What the outputs of a case are compared with; one for each output."""

    exact: tuple[Tensor, ...]  # float64
    allowed: tuple[float, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]


@lru_cache(maxsize=32)  # the backends are checked one after another
def standard(op: Op, case: str, dtype: torch.dtype) -> Standard:
    measured = torch.float32 if dtype == torch.float64 else dtype
    args = make_args(op, case, measured, "cpu")
    like, exact = flatten(op.reference(*args)), oracle(op, args)
    factor = FACTOR if measured == dtype else (FACTOR + 1) * torch.finfo(dtype).eps / torch.finfo(measured).eps
    allowed = tuple(factor * relative_error(*pair) for pair in zip(like, exact, strict=True))
    if measured != dtype:
        args = make_args(op, case, dtype, "cpu")
        like, exact = flatten(op.reference(*args)), oracle(op, args)
    return Standard(tuple(exact), allowed, tuple((t.shape, t.dtype) for t in like))


def check_case(op: Op, case: str, dtype: torch.dtype, device: torch.device | str, call: Callable[..., Any]) -> Result:
    """Run ``call`` (``op``, or one of its overloads) on a case and compare it with float64.

    Args:
        op: an entry of ``weightxform.registry.OPS``.
        case: a key of ``op.cases``.
        dtype: of the case's tensors, one of ``op.dtypes``.
        device: of the case's tensors.
        call: takes the arguments of the case and returns what the op returns.

    Returns:
        A :class:`Result`; nothing is raised for a wrong answer.
    """
    args = make_args(op, case, dtype, device)
    before = convert(args, torch.clone)
    with poisoned():
        outputs = flatten(call(*args))
        again = flatten(call(*args))
    expected, allowed, like = standard(op, case, dtype)
    error, bound, failure = 0.0, float("inf"), None
    if not all(map(_same, flatten(args), flatten(before))):
        failure = "an input was written"
    if len(outputs) != len(like):
        failure = failure or f"{len(outputs)} outputs, expected {len(like)}"
    else:
        place = torch.device(device).type
        for i, (out, kind, exact, share) in enumerate(zip(outputs, like, expected, allowed, strict=True)):
            if (out.shape, out.dtype, out.device.type) != (*kind, place):
                there = _kind(out.shape, out.dtype, out.device.type)
                failure = failure or f"output {i} is {there}, expected {_kind(*kind, place)}"
                continue
            e = relative_error(out, exact)
            b = share + SLACK * torch.finfo(out.dtype).eps
            if bound == float("inf") or e / b > error / bound:
                error, bound = e, b
            if not e <= b:
                failure = failure or f"output {i}: error {e:.2e} > {b:.2e}"
        if not all(map(_same, outputs, again)):
            failure = failure or "two runs differ"
    name = str(dtype).removeprefix("torch.")
    return Result(op.name, case, name, torch.device(device).type, error, bound, failure)


def _kind(shape: torch.Size, dtype: torch.dtype, device: str) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def backends_on(op: Op, device: str) -> tuple[str, ...]:
    """The backends of ``op`` that can run on ``device``. Triton on a CPU is its interpreter."""
    found = []
    for name in backends.available(op.name):
        if device not in backends.DEVICES.get(name, (device,)):
            continue
        if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            continue
        found.append(name)
    return tuple(found)


def verify(ops: Iterable[Op], device: str, backend: str | None, dtypes: Iterable[torch.dtype]) -> list[dict[str, Any]]:
    """Check every case of ``ops``; one row for each op, backend and dtype. ``backend=None`` checks each one."""
    rows = []
    for op in ops:
        names = [name for name in backends_on(op, device) if backend in (None, name)]
        kinds = [d for d in dtypes if d in op.dtypes]
        results: dict[tuple[str, torch.dtype], list[Result]] = {(name, d): [] for name in names for d in kinds}
        for dtype, case, name in product(kinds, op.cases, names):
            with backends.backend(name):
                results[name, dtype].append(_guarded(op, case, dtype, device))
        rows += [_row(op, name, found) for (name, _), found in results.items()]
    return rows


def _guarded(op: Op, case: str, dtype: torch.dtype, device: str) -> Result:
    """:func:`check_case`, where a kernel that raises has failed its case."""
    try:
        return check_case(op, case, dtype, device, op)
    except Exception as e:
        text = str(e).strip().splitlines() or [""]
        failure = f"raised {type(e).__name__}: {text[0]}"
        return Result(op.name, case, str(dtype).removeprefix("torch."), device, float("nan"), float("nan"), failure)


def _row(op: Op, backend: str, results: list[Result]) -> dict[str, Any]:
    worst = max(results, key=lambda r: (not r.passed, r.error / r.bound))
    return {
        "op": op.name,
        "backend": backend,
        "device": worst.device,
        "dtype": worst.dtype,
        "cases": len(results),
        "passed": sum(r.passed for r in results),
        "worst_case": worst.case,
        "error": worst.error,
        "bound": worst.bound,
        "failures": [str(r) for r in results if not r.passed],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = [["op", "backend", "dtype", "cases", "worst case", "error", "allowed", ""]]
    for r in rows:
        passed, error, bound = f"{r['passed']}/{r['cases']}", f"{r['error']:.1e}", f"{r['bound']:.1e}"
        verdict = "FAILED" if r["failures"] else "ok"
        table.append([r["op"], r["backend"], r["dtype"], passed, r["worst_case"], error, bound, verdict])
    print("\n".join(columns(table)))


DTYPES = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--backend", choices=backends.NAMES, help="default: every one that is available")
    parser.add_argument("--op", default="*", metavar="PATTERN", help="names of ops, such as 'spectral_norm_*'")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Namespace) -> int:
    """0: everything passed; 1: something failed; 2: nothing to check with these arguments."""
    os.environ.setdefault("WEIGHTXFORM_POISON", "1")  # outputs that torch's own fill does not reach
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = [op for name, op in OPS.items() if fnmatch.fnmatch(name, args.op)]
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: torch sees no CUDA GPU")
    if device == "cuda":
        torch.cuda.init()  # from here on it is known which backends this GPU can run
    if not ops:
        return _refuse(f"--op {args.op}: no op has such a name; there are {', '.join(OPS)}")
    rows = verify(ops, device, args.backend, [DTYPES[d] for d in args.dtype or DTYPES])
    if not rows:
        there = sorted({name for op in ops for name in backends_on(op, device)})
        return _refuse(
            f"--backend {args.backend}: not available for these ops on {device}; there is {', '.join(there)}"
        )
    failures = [failure for row in rows for failure in row["failures"]]
    if args.json:
        print(json.dumps({"device": device, "passed": not failures, "rows": rows}, indent=2))
    else:
        _print_table(rows)
        print("\n".join(failures) or f"{sum(row['cases'] for row in rows)} cases passed on {device}")
    return 1 if failures else 0


def _refuse(message: str) -> int:
    print(f"verify: {message}", file=sys.stderr)
    return 2
