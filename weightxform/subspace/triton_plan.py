"""The tables that the Triton kernels of projections read: which tensors there are, and which program does what.

A ``Table`` depends on everything but addresses. It is uploaded once and kept, see ``triton_common``;
addresses go into a second, small table. ``table`` is int64::

    header        the float64 bits of 2^-1/2 as the dtype of the numbers rounds it
    lows          [strata + 1]: the first column of each stratum, and d
    rows          [tensors, FIELDS]
    windows       [tensors, strata]: o_t | delta_t << 32
    entries       for each launch, the work in order: tensor | block << 32
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_common.tables import bits_of, ceil
from . import philox as draw
from .reference import Row, root, stratum

NAMES = ("numel", "start", "k0", "k1", "first", "count", "factor", "spread")
FIELDS = len(NAMES)
CHUNK = 4096  # elements that a program holds at once; 16 for each of its threads
ROWS = 8  # tiles that it holds, at most


def chunk_of(tile: int) -> int:
    """The elements of a program of a tiled kind."""
    return min(CHUNK, ROWS * tile)


class Member(NamedTuple):
    """What a table has of a tensor: its row of the layout, what of it is here, its factor.

    ``spread``: all strides are 0, one number stands for every element.
    """

    row: Row
    first: int
    size: int
    factor: float
    spread: bool


class Launch(NamedTuple):
    """``programs`` entries of the table from ``at`` on."""

    at: int
    programs: int


class Table:
    """See above. ``rows``, ``windows``: where they begin; ``work``: the entries of the one launch."""

    def __init__(
        self, members: Sequence[Member], dtype: torch.dtype, dim: int, unit: int, tile: int = 1, strata: int = 1,
        windows: bool = False,
    ) -> None:  # fmt: skip
        self.members, self.dtype, self.dim, self.unit = members, dtype, dim, unit
        self.tile, self.strata, self.with_windows = tile, strata, windows
        self.rows = 1 + strata + 1
        self.windows = self.rows + FIELDS * len(members)
        self.work = Launch(0, 0)
        self.table: Any = None
        self.held = False

    @property
    def wide(self) -> bool:
        """Whether a place of a window needs more than 32 bits on its way."""
        return any(max(self.dim + 2 * m.row.numel, m.row.start + m.row.numel) >= 2**32 for m in self.members)

    def finish(self) -> Tensor:
        """The table on the host; sets ``work``."""
        parts = [torch.tensor([bits_of(root(2, self.dtype)), *self._lows()], dtype=torch.int64)]
        for (numel, start, key), first, count, factor, spread in self.members:
            row = [numel, start, *key, first, count, bits_of(factor), int(spread)]
            parts.append(torch.tensor(row, dtype=torch.int64))
        if self.with_windows:
            parts.append(self._windows().flatten())
        at = sum(map(len, parts))
        blocks = [
            torch.arange(m.first // self.unit, ceil(m.first + m.size, self.unit) if m.size else m.first // self.unit)
            for m in self.members
        ]
        entries = [(block << 32) | i for i, block in enumerate(blocks)]
        self.work = Launch(at, sum(map(len, entries)))
        return torch.cat([*parts, *entries])

    def _lows(self) -> list[int]:
        return [stratum(self.dim, self.strata, r)[0] for r in range(self.strata)] + [self.dim]

    def _windows(self) -> Tensor:
        """[tensors, strata]: where the window of the first block begins, and by how much each pass is turned."""
        r = torch.arange(self.strata)
        words = torch.stack([draw.philox(m.row.key, draw.SETUP, torch.zeros_like(r), r) for m in self.members])
        widths = torch.tensor(self._lows()).diff()
        delta = torch.where(widths > self.tile, (words[..., 1] * widths) >> 32, 0)
        return ((words[..., 0] * widths) >> 32) | (delta << 32)


def accumulators(work: int, width: int, elements: int) -> int:
    """How many partial sums of ``width`` numbers a backward keeps: as long as they are few beside ``elements``."""
    return max(1, min(work, 1024, max((1 << 20) // width, elements // (2 * width))))
