"""Which kernel serves a call: ``cuda``, ``triton``, ``cpu`` or ``reference``.

A compiled kernel is registered with the dispatcher under its device, so the choice is made once, when the library is
loaded, and costs nothing per call. ``WEIGHTXFORM_BACKEND`` or ``with wx.backend(name):`` forces one for the process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import TracebackType

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
DEVICES = {"cuda": ("cuda",), "triton": ("cuda", "cpu"), "cpu": ("cpu",)}  # reference: any device

retired: str | None = None  # why the kernels that were registered for CUDA tensors are not used
forced: str | None = None  # read by Op.__call__; a plain global, so that torch.compile guards on it


def compiled(op_name: str, backend: str) -> bool:
    """Whether a compiled kernel of ``op_name`` is registered for ``backend`` ("cpu" or "cuda")."""
    from .registry import OPS

    op = OPS[op_name]
    if backend == "cuda" and (retired is not None or op.triton_serves_cuda):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"weightxform::{op_name}", backend.upper())


def available(op_name: str | None = None) -> tuple[str, ...]:
    """The backends that are there, for one op or (``None``) for at least one op."""
    from .registry import OPS

    ops = OPS if op_name is None else {op_name: OPS[op_name]}
    found = {"reference"}
    for name, op in ops.items():
        found.update(b for b in ("cpu", "cuda") if compiled(name, b))
        if op.triton is not None:
            found.add("triton")
    return tuple(n for n in NAMES if n in found)


def serving(op_name: str, device_type: str) -> tuple[str, str]:
    """``(backend, why)`` for a call of ``op_name`` on tensors of ``device_type`` as things stand."""
    from .registry import OPS

    if forced is not None:
        return forced, "forced by WEIGHTXFORM_BACKEND or wx.backend"
    if device_type in ("cpu", "cuda") and compiled(op_name, device_type):
        return device_type, "compiled kernel"
    cuda = device_type == "cuda"
    if cuda and OPS[op_name].triton_serves_cuda:
        return "triton", retired or "no compiled kernel loaded"
    return "reference", (retired if cuda else None) or f"no kernel for {device_type}"


def kernels_for_cuda() -> bool:
    """Whether anything but the reference serves CUDA tensors."""
    from .registry import OPS

    return any(op.triton_serves_cuda or compiled(name, "cuda") for name, op in OPS.items())


def retire_cuda(reason: str, triton: bool) -> None:
    """From now on CUDA tensors use Triton (if allowed, for ops that have it) or the reference, whatever served them."""
    global retired
    from .registry import LIBRARY, OPS

    retired = reason
    for name, op in OPS.items():
        op.triton_serves_cuda = triton and op.triton is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the dispatcher says that a kernel was there
            LIBRARY.impl(name, op.triton if op.triton_serves_cuda else op.reference, "CUDA")


def check(name: str) -> str:
    """``name`` if at least one op has that backend; raises ``ValueError`` or ``RuntimeError`` otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    there = available()
    if name not in there:
        raise RuntimeError(f"backend {name!r} is not available here{_why(name)}; available: {', '.join(there)}")
    return name


def _why(name: str) -> str:
    from ._load import status

    if name == "triton" and status["triton"].startswith("not"):
        return f" ({status['triton']})"
    return f" ({retired})" if name == "cuda" and retired else ""


def forced_call(op_name: str, default: Callable, reference: Callable, triton: Callable | None) -> Callable:
    """The overload that a forced backend means for one op."""
    there = available(op_name)
    if forced not in there:
        why = _why(forced or "")
        raise RuntimeError(f"{op_name}: backend {forced!r} has no kernel for it{why}; available: {', '.join(there)}")
    if forced == "reference":
        return reference
    if forced == "triton":
        assert triton is not None
        return triton
    return default


class backend:
    """Force a backend, for the whole process, inside a ``with`` block.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is not the name of a backend.
        RuntimeError: the backend is not available here; the message names those that are.

    Inside the block an op called on a tensor of a device that the backend does not serve raises ``RuntimeError``.
    """

    def __init__(self, name: str) -> None:
        self.name = check(name)
        self.before: list[str | None] = []

    def __enter__(self) -> backend:
        global forced
        self.before.append(forced)
        forced = self.name
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global forced
        forced = self.before.pop()


def force_from_environment() -> None:
    """Apply ``WEIGHTXFORM_BACKEND``; called once, when all rooms are imported."""
    global forced
    name = os.environ.get("WEIGHTXFORM_BACKEND", "")
    if name:
        try:
            forced = check(name)
        except (ValueError, RuntimeError) as e:
            raise type(e)(f"WEIGHTXFORM_BACKEND={name!r}: {e}") from None
