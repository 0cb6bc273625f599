"""The tables that the Triton kernels read: where each weight lies, how it is cut, which program does which part.

A ``Plan`` depends on shapes and options alone. It is uploaded once, kept, and used again by every call with the same
shapes; what changes from call to call (addresses) is in a second, small table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_common.tables import bits_of, ceil
from . import triton_kernels as kernels

TILE = {torch.float64: 4096}  # numbers in a tile of W: 32 a thread, or 16 of eight bytes
DEFAULT_TILE = 8192
PARTS = 256  # partial sums of a member, from where on programs take more of the matrix


class Layout(NamedTuple):
    """A weight as the matrix [m, a b] that is stored as [a, m, b]; ``swapped``: the transpose of the one that is meant.

    Column c stands at (c % period) * turns + c // period in v (or u, where swapped).
    """

    a: int
    m: int
    b: int
    period: int
    turns: int
    swapped: bool

    @property
    def n(self) -> int:
        return self.a * self.b


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...], dim: int) -> Layout | None:
    """How a dense weight is read where it lies; ``None``: it is not dense, or in an order that needs a copy."""
    numel = math.prod(shape)
    if numel == 0:
        n = math.prod(s for i, s in enumerate(shape) if i != dim)
        return Layout(1, shape[dim], n, 1, n, False)
    order = sorted((i for i, size in enumerate(shape) if size != 1), key=lambda i: -stride[i])
    step = 1
    for i in reversed(order):
        if stride[i] != step:
            return None
        step *= shape[i]
    at = order.index(dim) if dim in order else 0
    rest = [i for i in order if i != dim]
    a, b = (math.prod(shape[i] for i in part) for part in (rest[:at], rest[at:]))
    period, logical = 1, sorted(rest)
    if rest != logical:  # channels_last: the axes of v, turned around
        first = logical.index(rest[0])
        if rest != logical[first:] + logical[:first]:
            return None
        period = math.prod(shape[i] for i in logical[:first])
    if b == 1 and a > 1:
        return Layout(1, a, shape[dim], 1, shape[dim], True) if period == 1 else None
    return Layout(a, shape[dim], b, period, a * b // period, False)


class Launch(NamedTuple):
    """``programs`` entries of the plan from ``at`` on; ``kinds``: of tiles, a bit each."""

    at: int
    programs: int
    kinds: int


class Plan:
    """The table of one list of weights on its device.

    Attributes:
        table: int64, as ``triton_kernels.py`` says.
        launches: by phase, in order.
        numbers, sums: how much workspace the launches share, in the compute dtype and in float64.
    """

    def __init__(self, eps: float, bound: float | None) -> None:
        self.header = [bits_of(eps), bits_of(1.0 if bound is None else bound), int(bound is not None)]
        self.rows: list[list[int]] = []
        self.counts: list[tuple[list[int], int]] = []  # of programs for each member, and kinds: one entry a launch
        self.launches: list[Launch] = []
        self.numbers = self.sums = 0
        self.table: Any = None
        self.held = False

    def add(self, **fields: int) -> None:
        row = [0] * len(kernels.FIELD)
        for name, value in fields.items():
            row[kernels.FIELD[name]] = value
        self.rows.append(row)

    def take_numbers(self, n: int) -> int:
        self.numbers += n
        return self.numbers - n

    def take_sums(self, n: int) -> int:
        self.sums += n
        return self.sums - n

    def launch(self, programs: Sequence[int], kinds: Iterable[int] = ()) -> None:
        mask = 0
        for kind in kinds:
            mask |= 1 << kind
        self.counts.append((list(programs), mask))

    def finish(self) -> Tensor:
        """The table on the host; sets ``launches``."""
        parts = [torch.tensor([*self.header, *(x for row in self.rows for x in row)], dtype=torch.int64)]
        at = parts[0].numel()
        for programs, mask in self.counts:
            counts = torch.tensor(programs, dtype=torch.int64)
            member = torch.repeat_interleave(counts)
            block = torch.arange(member.numel()) - (counts.cumsum(0) - counts)[member]
            parts.append((block << 32) | member)
            self.launches.append(Launch(at, member.numel(), mask))
            at += member.numel()
        return torch.cat(parts)


class ForwardMember(NamedTuple):
    """What a plan depends on of a member; ``aligned``: its addresses are multiples of 16."""

    layout: Layout
    n_iter: int
    aligned: bool


def forward_plan(
    members: Sequence[ForwardMember], dtype: torch.dtype, eps: float, v_first: bool, bound: Any, write: bool
):
    """Launches: products and gather for each iteration (products alone where nothing is iterated), then finish."""
    plan = Plan(eps, bound)
    tile, state = TILE.get(dtype, DEFAULT_TILE), 0
    programs, gathers, finishes, kinds = [], [], [], []
    for layout, n_iter, aligned in members:
        m, n, b, swapped = layout.m, layout.n, layout.b, layout.swapped
        rows = n_iter == 0 or v_first == swapped  # the outer axis is that of the rows
        outer, inner = (m, n) if rows else (n, m)
        bucket, length = 0, 64
        while length < inner:
            bucket, length = bucket + 1, 2 * length
        if tile // length < (1 if rows else 32):
            bucket, length = kernels.WIDE.value, tile // 32
        at_once = tile // length
        least = 8 if dtype.itemsize >= 4 else 16  # along the outer axis: parts of e are few against W
        groups = ceil(max(at_once, least, ceil(outer, PARTS)), at_once)
        parts = ceil(outer, groups * at_once) if m * n else 0
        columns = ceil(inner, kernels.GATHER_COLUMNS.value)
        tiles = max(1, ceil(columns, kernels.MAX_PARTS.value))
        gather = ceil(columns, tiles) if m * n else 0
        fast = aligned and layout.a == 1 and b % 16 == 0
        kind = 4 * bucket + 2 * rows + fast
        y_size, x_size = m, n
        y_at, x_at = (state + x_size, state) if swapped else (state, state + y_size)
        identity, turned = (1, max(1, m)), (layout.period, max(1, layout.turns))
        y, x = (y_at, identity), (x_at, turned)
        (outer_at, outer_map), (inner_at, inner_map) = (y, x) if rows else (x, y)
        plan.add(
            kind=kind, m=m, n=n, b=max(1, b), slab=m * b, outer=outer, inner=inner,
            outer_period=outer_map[0], outer_turns=outer_map[1], inner_period=inner_map[0], inner_turns=inner_map[1],
            outer_at=outer_at, inner_at=inner_at, sigma_at=state + m + n, iterations=n_iter if m * n else 0,
            parts=parts, groups=groups, gathers=gather, tiles=tiles,
            part_at=plan.take_numbers(parts * inner), power_at=plan.take_numbers(parts),
            d_at=plan.take_numbers(outer), e_at=plan.take_numbers(inner),
            dsum_at=plan.take_sums(parts), esum_at=plan.take_sums(gather), factor_at=plan.take_sums(1), numel=m * n,
        )  # fmt: skip
        state += m + n + 1
        programs.append(parts)
        gathers.append(gather)
        kinds.append(kind)
        finishes.append(max(1, ceil(max(m * n if write else 0, m, n), elementwise_tile(dtype))))
    for i in range(max(1, *(member.n_iter for member in members))):
        on = [i == 0 or member.n_iter > i for member in members]
        plan.launch(
            [p * o for p, o in zip(programs, on, strict=True)], [k for k, o in zip(kinds, on, strict=True) if o]
        )
        plan.launch([g * (member.n_iter > i) for g, member in zip(gathers, members, strict=True)])
    plan.launch(finishes)
    return plan


class BackwardMember(NamedTuple):
    layout: Layout
    offset: int
    aligned: bool


def backward_plan(members: Sequence[BackwardMember], dtype: torch.dtype, bound: Any) -> Plan:
    """Launches: inner, update."""
    plan = Plan(0.0, bound)
    tile = elementwise_tile(dtype)
    inners, updates, kinds = [], [], []
    for layout, offset, aligned in members:
        m, n, b = layout.m, layout.n, layout.b
        tiles = max(1, ceil(ceil(m * n, tile), kernels.MAX_PARTS.value))
        parts = ceil(ceil(m * n, tile), tiles)
        bucket = 0
        while 16 << bucket < min(b, 1024):
            bucket += 1
        lines, across = layout.a * m, max(1, ceil(b, 16 << bucket))
        kind = 2 * bucket + (aligned and layout.a == 1 and b % 16 == 0)
        y_at, x_at = (offset + n, offset) if layout.swapped else (offset, offset + m)
        plan.add(
            kind=kind, m=max(1, m), n=n, b=b, outer_at=y_at, inner_at=x_at, inner_period=layout.period,
            inner_turns=max(1, layout.turns), sigma_at=offset + m + n, parts=parts, tiles=tiles,
            dsum_at=plan.take_sums(parts), numel=m * n, lines=lines, column_blocks=across,
        )  # fmt: skip
        inners.append(parts)
        updates.append(max(1, ceil(lines, tile // (16 << bucket)) * across))
        kinds.append(kind)
    plan.launch(inners)
    plan.launch(updates, kinds)
    return plan


def elementwise_tile(dtype: torch.dtype) -> int:
    """Numbers that a program of an elementwise kernel handles at once."""
    return TILE.get(dtype, DEFAULT_TILE) // 2
