"""The ops of projections on Triton: arguments, memory, launches. The kernels are in ``triton_*.py``.

The tiled kinds take two launches forward and three backward, the entrywise ones one and three, whatever the list of
tensors; fastfood takes passes over all elements in scratch memory. Tensors are read where they lie if they are
contiguous or one number with strides 0; others cost a copy. Nothing waits for the device, but for a list of new shapes,
whose table is uploaded.

Triton itself is imported by the first call of a kernel: it takes long, and most processes never need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import FLOAT_DTYPES, opmath
from ..registry import register_triton
from ..triton_common import tables
from ..triton_common.launch import REGISTERS
from ..triton_common.sums import sliced
from ..triton_common.tables import ceil, on, type_of
from . import op
from .reference import ENTRYWISE, FASTFOOD, KINDS, Row

WARPS = 8
MOST = 65535  # programs along the second and third axis of a grid


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(f"subspace: {what}")


def module(name: str, device: torch.device) -> Any:
    """``triton_<name>``, where it can run on ``device``."""
    return tables.module("subspace", f"{__package__}.triton_{name}", device)


def _spread(t: Tensor) -> bool:
    return not t.is_contiguous() and not any(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)


class Call(NamedTuple):
    """The arguments that both ops have; ``K``: 1 without a batch.

    ``sources``: theta0, or the gradients, as they are read; ``targets``: where theta goes, or nothing.
    """

    members: tuple[Any, ...]
    sources: list[Tensor]
    targets: list[Tensor]
    kind: str
    layout: Tensor
    factors: Tensor
    step: Tensor | None
    d: int
    K: int
    tile: int
    strata: int
    packed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def compute(self) -> torch.dtype:
        return opmath(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.sources[0].device

    @property
    def elements(self) -> int:
        return sum(m.size for m in self.members)

    @property
    def types(self) -> dict[str, Any]:
        return {"T": type_of(self.dtype), "C": type_of(self.compute)}

    def redrawn(self, like: Tensor) -> tuple[Tensor, dict[str, bool]]:
        """The pointer to the step, and whether there is one."""
        return (like if self.step is None else self.step), {"REDRAWN": self.step is not None}

    def pointers(self) -> Tensor:
        """[members, 2]: the addresses of sources and targets."""
        targets = [t.data_ptr() for t in self.targets] or [0] * len(self.sources)
        rows = [(s.data_ptr(), t) for s, t in zip(self.sources, targets, strict=True)]
        table: Tensor = tables.address_table(rows, self.device)
        return table

    def aligned(self) -> bool:
        """Whether 16 bytes may be moved at once, wherever a chunk begins."""
        size = self.dtype.itemsize
        for i, (m, source) in enumerate(zip(self.members, self.sources, strict=True)):
            at = [0 if m.spread else source.data_ptr(), m.first * size, (m.size if self.K > 1 else 0) * size]
            at += [self.targets[i].data_ptr()] if self.targets else []
            if m.size and any(a % 16 for a in at):
                return False
        return True

    def table(self, unit: int, windows: bool = False) -> Any:
        plan = module("plan", self.device)
        tile, strata = (self.tile, self.strata) if windows else (1, 1)
        args = self.members, self.compute, self.d, unit, tile, strata, windows
        return tables.plan_for("subspace", args, self.device, lambda: plan.Table(*args))


def _call(
    tensors: Sequence[Tensor], members: Sequence[int], firsts: Sequence[int], layout: Tensor, factors: Tensor,
    step: Tensor | None, c: Tensor | None, kind: str, d: int, batch: int, tile: int, strata: int, packed: bool,
    gradients: bool,
) -> Call:  # fmt: skip
    _check(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check(
        bool(tensors) and len(tensors) == len(members) == len(firsts), "tensors, members and firsts: as many of each"
    )
    dtype, device = tensors[0].dtype, tensors[0].device
    _check(dtype in FLOAT_DTYPES, "tensors must be float64, float32, bfloat16 or float16")
    _check(all(t.dtype == dtype and t.device == device for t in tensors), "tensors must have one dtype and one device")
    on_host = layout.device.type == factors.device.type == "cpu"
    _check(on_host and layout.dtype == torch.int64 and factors.dtype == torch.float64, "layout and factors: on the CPU")
    _check(1 <= d < 2**31 and 1 <= strata <= d, "dim must be from 1 to 2^31 - 1, strata from 1 to dim")
    _check(
        64 <= tile <= 1 << 14 and tile & (tile - 1) == 0, f"tile must be a power of two from 64 to 16384, got {tile}"
    )
    _check(batch <= MOST and strata <= MOST, f"the Triton kernels take at most {MOST} members of a batch, or strata")
    _check(d + strata * tile < 2**31, "dim + strata tile must be less than 2^31 for the Triton kernels")
    large = kind.startswith("fastfood_global") and int(layout[:, 0].sum()) > 1 << 30
    _check(not large, "fastfood_global takes at most 2^30 elements")
    if c is not None:
        _check(c.shape == (d,) and c.dtype == opmath(dtype) and c.device == device, "c must be [d], as z")
    if step is not None:
        _check(
            step.numel() == 1 and step.dtype == torch.int64 and step.device == device, "step must be an int64 scalar"
        )
    plan = module("plan", device)
    rows, scales = layout.tolist(), factors.tolist()
    found = []
    sources = [t if t.is_contiguous() or _spread(t) else t.contiguous() for t in tensors]
    for t, source, m, first in zip(tensors, sources, members, firsts, strict=True):
        _check(0 <= m < len(rows), "member is out of range")
        numel, start, k0, k1 = rows[m]
        if gradients and batch:
            _check(t.dim() > 0 and t.shape[0] == batch, "gradients must have the batch in front")
        count = t.numel() // batch if gradients and batch else t.numel()
        _check(first >= 0 and first + count <= numel, "a tensor has more elements than its row of the layout")
        spread = not source.is_contiguous()
        found.append(plan.Member(Row(numel, start, (k0, k1)), first, count, scales[m], spread))
    return Call(
        tuple(found), sources, [], kind, layout, factors, step, d, max(1, batch), tile, strata, packed
    )  # fmt: skip


def forward(z, c, theta0, members, firsts, layout, factors, step, kind, tile, strata, packed) -> list[Tensor]:
    """``subspace_fwd``."""
    batch = z.shape[0] if z.ndim == 2 else 0
    _check(z.ndim in (1, 2), "z must be [d] or [K, d]")
    call = _call(
        theta0, members, firsts, layout, factors, step, c, kind, z.shape[-1], batch, tile, strata, packed, False
    )
    _check(z.dtype == call.compute and z.device == call.device, "z must be where the tensors are, float64 or float32")
    outs = outputs(theta0, z)
    call = call._replace(targets=[out if out.is_contiguous() else out.new_empty(out.shape) for out in outs])
    if call.elements and (batch or z.ndim == 1):
        with on(call.device):
            z, c = z.contiguous(), None if c is None else c.contiguous()
            run = _tiled_forward if kind not in (*ENTRYWISE, *FASTFOOD) else _other(call, "forward")
            run(call, z, c)
    return [out if out is t else out.copy_(t) for out, t in zip(outs, call.targets, strict=True)]


def outputs(theta0: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    if z.ndim == 1:
        return [torch.empty_like(t) for t in theta0]
    return [t.new_empty((z.shape[0], *t.shape)) for t in theta0]


def backward(
    grads, c, members, firsts, layout, factors, step, kind, dim, batch, tile, strata, packed
) -> Tensor:  # fmt: skip
    """``subspace_bwd``."""
    call = _call(grads, members, firsts, layout, factors, step, c, kind, dim, batch, tile, strata, packed, True)
    z_bar = grads[0].new_zeros((batch, dim) if batch else (dim,), dtype=call.compute)
    if call.elements:
        with on(call.device):
            c = None if c is None else c.contiguous()
            run = _tiled_backward if kind not in (*ENTRYWISE, *FASTFOOD) else _other(call, "backward")
            run(call, c, z_bar)
    return z_bar


def _other(call: Call, way: str) -> Any:
    """The launches of the kinds without tiles."""
    importlib.import_module(f"{__package__}.triton_plan")
    name = "entries_launch" if call.kind in ENTRYWISE else "fastfood_launch"
    return getattr(importlib.import_module(f"{__package__}.triton_{name}"), way)


def _tile_options(call: Call, table: Any) -> dict[str, Any]:
    return dict(
        call.types, TILE=call.tile, LOG=call.tile.bit_length() - 1, PACKED=call.packed, BIG=table.wide,
        ALIGNED=call.aligned(), num_warps=WARPS, **REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip


def _tiled_table(call: Call) -> tuple[Any, bool]:
    plan = module("plan", call.device)
    hadamard = call.kind == "block_hadamard"
    chunk = plan.chunk_of(call.tile)
    return call.table(max(chunk, call.tile) if hadamard else chunk, windows=True), hadamard


def _tiled_forward(call: Call, z: Tensor, c: Tensor | None) -> None:
    table, hadamard = _tiled_table(call)
    sums, extent = module("sums", call.device), call.d + call.strata * call.tile
    zx = z.new_empty((call.K, extent))
    grid = ceil(ceil(call.d, call.strata) + call.tile, 1024), call.strata, call.K
    scaled = {"SCALED": c is not None, "enable_fp_fusion": False}
    sums.extend[grid](table.table, z, z if c is None else c, zx, call.d, extent, TILE=call.tile, N=1024, **scaled)
    step, redrawn = call.redrawn(z)
    options = {**_tile_options(call, table), **redrawn}
    place = table.work.at, table.rows, table.windows
    if hadamard:
        plan = module("plan", call.device)
        scratch = zx if call.tile <= plan.CHUNK else z.new_empty(table.work.programs * call.tile)
        module("hadamard", call.device).forward[(table.work.programs,)](
            table.table, call.pointers(), zx, scratch, step, *place, call.K, extent, **options
        )
    else:
        module("one_hot", call.device).forward[(table.work.programs,)](
            table.table, call.pointers(), zx, step, *place, call.K, call.strata, extent,
            SIGNED=call.kind != "one_hot_unsigned", ONE=call.strata == 1, **options,
        )  # fmt: skip


def _tiled_backward(call: Call, c: Tensor | None, z_bar: Tensor) -> None:
    table, hadamard = _tiled_table(call)
    extent = call.d + call.strata * call.tile
    plan = module("plan", call.device)
    rows = max(1, plan.chunk_of(call.tile) // call.tile)
    work = table.work.programs
    programs = plan.accumulators(work, rows * call.K * extent, call.K * call.elements)
    each = ceil(work, programs)
    programs = ceil(work, each)
    acc = z_bar.new_zeros((programs * rows, call.K, extent))
    step, redrawn = call.redrawn(z_bar)
    options = {**_tile_options(call, table), **redrawn}
    place = table.work.at, work, table.rows, table.windows, each, call.K
    if hadamard:
        scratch = acc if call.tile <= plan.CHUNK else z_bar.new_empty(programs * call.tile)
        module("hadamard", call.device).backward[(programs,)](
            table.table, call.pointers(), acc, scratch, step, *place, extent, **options
        )
    else:
        module("one_hot", call.device).backward[(programs,)](
            table.table, call.pointers(), acc, step, *place, call.strata, extent,
            SIGNED=call.kind != "one_hot_unsigned", **options,
        )  # fmt: skip
    finished(call, table, acc, c, z_bar, call.tile, call.strata)


def finished(call: Call, table: Any, acc: Tensor, c: Tensor | None, z_bar: Tensor, tile: int, strata: int) -> None:
    """z_bar = c times the sum of acc [count, K, extent]."""
    sums = module("sums", call.device)
    folded = sliced(acc)
    slices, columns = folded.shape[0], sums.COLUMNS.value
    sums.finish[(ceil(ceil(call.d, strata), columns), strata, call.K)](
        table.table, folded, z_bar if c is None else c, z_bar, slices, call.K, acc.shape[-1], call.d, TILE=tile,
        SCALED=c is not None, C=type_of(call.compute), S=16, enable_fp_fusion=False,
    )  # fmt: skip


def register() -> None:
    """Give the ops of this room their Triton kernels; called where Triton is installed."""
    register_triton(op.subspace_fwd, forward)
    register_triton(op.subspace_bwd, backward)
    dense = importlib.import_module(f"{__package__}.triton_dense_launch")
    register_triton(op.subspace_dense_fwd, dense.forward)
    register_triton(op.subspace_dense_bwd, dense.backward)
