"""Partial sums of programs, added in an order that depends on their number alone, in float64."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .tables import ceil, type_of

SLICES, AT_ONCE = 16, 1024  # more rows than ``AT_ONCE`` are added in two steps, the first one in that many slices


def sliced(acc: Tensor) -> Tensor:
    """[slices, width], float64: slices of the rows of acc [count, ...], each added up. At most ``SLICES``."""
    count, width = acc.shape[0], acc[0].numel()
    each = max(64, ceil(ceil(count, SLICES), 64) * 64)
    out = acc.new_empty((ceil(count, each), width), dtype=torch.float64)
    _fold(acc, out, each)
    return out


def add_rows(acc: Tensor, out: Tensor) -> Tensor:
    """``out``, filled with the sum of acc [count, *out.shape] over its rows; count is at least 1."""
    if out.numel():
        rows = sliced(acc) if acc.shape[0] > AT_ONCE else acc
        _fold(rows, out, rows.shape[0])
    return out


def _fold(acc: Tensor, out: Tensor, each: int) -> None:
    kernels: Any = importlib.import_module(f"{__package__}.kernels")
    count, width = acc.shape[0], acc[0].numel()
    grid = ceil(width, kernels.COLUMNS.value), ceil(count, each)
    kernels.fold[grid](acc, out, count, each, width, TO=type_of(out.dtype))
