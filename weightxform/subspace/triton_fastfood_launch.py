"""The launches of fastfood: on the whole concatenation, in scratch memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..triton_common.sums import add_rows
from .triton_launch import WARPS, Call, ceil, module, type_of

FUSION = {"enable_fp_fusion": False}
PARTS = 1 << 15  # of the sums of the backward: so many numbers are summed at once, if there are


class _Sizes:
    """n, the length of a block and how many there are; ``chunks``: programs for all elements."""

    def __init__(self, call: Call, kernels: Any) -> None:
        total = int(call.layout[:, 0].sum())
        _, form, diagonal = call.kind.split("_")
        self.n = 1 << (call.d - 1).bit_length()
        self.length = 1 << (total - 1).bit_length() if form == "global" else self.n
        self.blocks = ceil(total, self.length)
        self.size = self.blocks * self.length
        self.chunk = kernels.CHUNK.value
        self.signs = diagonal == "sign"
        self.bits = self.length.bit_length() - 1

    def chunks(self, size: int) -> int:
        return ceil(size, self.chunk)


def _transform(kernels: Any, x: Tensor, length: int) -> None:
    """H over each ``length`` numbers of x."""
    bits, at = length.bit_length() - 1, 0
    while at < bits:
        now = min(bits - at, 6 if at else 12)
        programs = ceil(x.numel(), kernels.CHUNK.value)
        kernels.transform[(programs,)](x, x.numel(), AT=at, BITS=now, num_warps=WARPS, **FUSION)
        at += now


def forward(call: Call, z: Tensor, c: Tensor | None) -> None:
    kernels = module("fastfood", call.device)
    sizes, z = _Sizes(call, kernels), z if c is None else z * c
    table = call.table(sizes.chunk)
    step, redrawn = call.redrawn(z)
    options = dict(num_warps=WARPS, **FUSION, **redrawn)
    plan, rows, C = table.table, table.rows, type_of(call.compute)
    u = z.new_empty((call.K, sizes.blocks, sizes.n))
    kernels.start[(sizes.chunks(sizes.blocks * sizes.n), call.K)](
        plan, z, u, step, rows, call.d, sizes.n, sizes.length, sizes.blocks, C=C, **options
    )
    _transform(kernels, u, sizes.n)
    q = z.new_empty((call.K, sizes.size))
    kernels.gather[(sizes.chunks(sizes.size), call.K)](
        plan, u, q, step, rows, sizes.n, sizes.length, sizes.bits, sizes.blocks, C=C, SIGNS=sizes.signs, **options
    )
    _transform(kernels, q, sizes.length)
    kernels.add[(table.work.programs, call.K)](
        plan, call.pointers(), q, table.work.at, rows, sizes.size, **call.types, ALIGNED=call.aligned(),
        num_warps=WARPS, **FUSION,
    )  # fmt: skip


def backward(call: Call, c: Tensor | None, z_bar: Tensor) -> None:
    kernels = module("fastfood", call.device)
    sizes = _Sizes(call, kernels)
    table = call.table(sizes.chunk)
    step, redrawn = call.redrawn(z_bar)
    options = dict(num_warps=WARPS, **FUSION, **redrawn)
    plan, rows, C = table.table, table.rows, type_of(call.compute)
    q = z_bar.new_zeros((call.K, sizes.size))
    kernels.take[(table.work.programs, call.K)](
        plan, call.pointers(), q, table.work.at, rows, sizes.size, **call.types, ALIGNED=call.aligned(),
        num_warps=WARPS, **FUSION,
    )  # fmt: skip
    _transform(kernels, q, sizes.length)
    kernels.diagonal[(sizes.chunks(sizes.size), call.K)](
        plan, q, step, rows, sizes.size, C=C, SIGNS=sizes.signs, **options
    )
    of_one = sizes.length // sizes.n
    each = ceil(of_one, max(1, min(of_one, PARTS // (sizes.blocks * sizes.n))))
    parts = ceil(of_one, each)
    u = z_bar.new_empty((parts, call.K, sizes.blocks, sizes.n), dtype=torch.float64)
    programs = ceil(sizes.blocks * sizes.n, 256), call.K, parts
    kernels.collect[programs](
        plan, q, u, step, rows, sizes.n, sizes.length, sizes.bits, sizes.blocks, each, **{**options, "num_warps": 4}
    )
    summed = u[0] if parts == 1 else add_rows(u, torch.empty_like(u[0]))
    _transform(kernels, summed, sizes.n)
    kernels.end[(ceil(call.d, 256), call.K)](
        plan, summed, z_bar if c is None else c, z_bar, step, rows, call.d, sizes.n, sizes.length, sizes.blocks, C=C,
        SCALED=c is not None, **{**options, "num_warps": 4},
    )  # fmt: skip
