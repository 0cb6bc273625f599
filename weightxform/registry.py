"""One declaration of an op: its schema, fake, reference and cases. Tests, ``verify`` and benchmarks read it.

Every op is private and functional. ``weightxform::<name>`` is what the dispatcher serves (compiled kernels register
themselves under their device; the reference is ``CompositeExplicitAutograd``, so the op runs on any device with nothing
compiled); ``weightxform::<name>.reference`` and ``.triton`` are the same op with the backend fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import backends
from ._torch import first_device, outside_autocast
from .numerics import FLOAT_DTYPES

LIBRARY = torch.library.Library("weightxform", "FRAGMENT")
OPS: dict[str, Op] = {}

# A case makes the arguments of an op: (dtype, device, generator) -> args. Random values come from the generator (a CPU
# one), so that the same case has the same values on every device.
Case = Callable[[torch.dtype, torch.device, torch.Generator], tuple]


@dataclass(eq=False)
class Op:
    """A registered op. Calling it calls the backend that serves the arguments' device, or the forced one.

    Attributes:
        name: the op is ``torch.ops.weightxform.<name>``.
        schema: arguments and returns, as in ``torch.library``.
        reference: the maths in plain torch; runs on any device and dtype, and is the oracle in float64.
        fake: shapes, strides and dtypes of the outputs, for ``torch.compile`` and ``torch.export``.
        cases: named argument lists; odd shapes and layouts included.
        bytes_moved: the traffic floor of a call, each input read once and each output written once.
        dtypes: what the op computes in.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cases: Mapping[str, Case]
    bytes_moved: Callable[..., int]
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    triton: Callable[..., Any] | None = None
    triton_serves_cuda: bool = False
    default: Any = field(init=False)
    reference_overload: Any = field(init=False)

    def __call__(self, *args: Any) -> Any:
        """Call the op below autograd: a room's Function is what differentiates (under Dynamo, in the graph)."""
        if torch.compiler.is_compiling():
            return self._call(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(*args)

    def _call(self, *args: Any) -> Any:
        if backends.forced is None:
            return self.default(*args)
        call = backends.forced_call(self.name, self.default, self.reference_overload, self.triton)
        name = backends.forced
        if name in backends.DEVICES:
            device = first_device(args)
            if device is not None and device not in backends.DEVICES[name]:
                raise RuntimeError(f"{self.name}: backend {name!r} is forced, but the tensors are on {device!r}")
        return call(*args)


def _overload(op: Op, suffix: str, kernel: Callable[..., Any], key: str) -> Any:
    name = f"{op.name}.{suffix}" if suffix else op.name
    LIBRARY.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"weightxform::{name}", op.fake, lib=LIBRARY)
    return getattr(getattr(torch.ops.weightxform, op.name), suffix or "default")


def register(op: Op) -> Op:
    """Define ``op`` with its reference on every device, and list it for tests, ``verify`` and benchmarks."""
    if op.name in OPS:
        raise ValueError(f"an op named {op.name!r} is registered already")
    kernel = outside_autocast(op.reference)  # which is on below an op as well
    op.default = _overload(op, "", kernel, "CompositeExplicitAutograd")
    op.reference_overload = _overload(op, "reference", kernel, "CompositeExplicitAutograd")
    OPS[op.name] = op
    return op


def register_triton(op: Op, launcher: Callable[..., Any]) -> None:
    """Add a Triton kernel to ``op``; it also serves CUDA tensors where no compiled CUDA kernel was loaded."""
    op.triton = _overload(op, "triton", launcher, "CompositeExplicitAutograd")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"weightxform::{op.name}", "CUDA"):
        LIBRARY.impl(op.name, launcher, "CUDA")
        op.triton_serves_cuda = True
