"""Warps that move taps onto taps: nothing is interpolated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._torch import outside_autocast, special_mode
from ..checks import require_int
from ..numerics import opmath
from ..transform import describe
from .transform import Conditions, Kernel, Needs, View, Warp, given, numbers
from .warps import plane_of, require_axis

_RING = (0, 3, 6, 7, 8, 5, 2, 1)  # the outer taps of 3x3, counterclockwise from the upper left


class _Tabled(Warp):
    """Of a table [n, K]: with index i the new tap p is the old tap table[i, p]."""

    rows: Tensor | None = None  # on the CPU
    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        if self.table is not None and self.rows is not None and not self.table.is_meta:
            self.table = self.rows.to(self.table.device)  # it may have had no values: of a model made on meta
        return out

    def chosen(self, index: Tensor | None, like: Tensor) -> Tensor:
        """[C, K, K], for ``None`` of the first row: row p has its 1 at table[p]."""
        self.seen()
        assert self.table is not None
        table = self.table[:1] if index is None else self.table[index]
        taps = torch.arange(table.shape[-1], device=table.device)
        return (table[..., None] == taps).to(opmath(like.dtype))


class Flip(_Tabled):
    """Mirrors every filter along one of its axes.

    Args:
        axis: of the kernel, 0, 1 or 2, or from the end (-1: left and right).
        condition: ``None``: always. A name: ``(1 - c) w + c flipped(w)`` for a number c.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(self, axis: int, condition: str | None = None) -> None:
        super().__init__()
        require_int("Flip", "axis", axis)
        if not -3 <= axis <= 2:
            raise ValueError(f"Flip: axis must be in [-3, 2], got {axis}")
        if condition is not None and not isinstance(condition, str):
            raise TypeError(f"Flip: condition must be the name of a condition or None, got {condition!r}")
        self.axis, self.condition = axis, condition

    def extra_repr(self) -> str:
        return f"axis={self.axis}" + ("" if self.condition is None else f", condition={self.condition!r}")

    def needs(self) -> Needs:
        return {} if self.condition is None else {self.condition: ()}

    def plan(self, kernel: Kernel) -> View:
        n = len(kernel.size)
        if not -n <= self.axis < n:
            raise ValueError(f"Flip: axis must be in [{-n}, {n - 1}] for a kernel {list(kernel.size)}, got {self.axis}")
        return View.all_of(kernel)

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        size = weight.shape[2:]
        self.rows = torch.arange(size.numel()).reshape(size).flip(self.axis).reshape(1, -1)
        self.table = self.rows.to(weight.device)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        flipped = self.chosen(None, like)
        if self.condition is None:
            return flipped
        c = numbers("Flip", conditions, self.condition, (), like)[:, None, None]
        return torch.lerp(torch.eye(flipped.shape[-1], dtype=c.dtype, device=c.device)[None], flipped, c)


class Permute(_Tabled):
    """Moves the taps of every filter by one of several permutations, exactly.

    Args:
        group: ``"p4"``: index k turns by k quarters, as ``rot90``. ``"p4m"``: index 4 m + k mirrors left and right if
            m = 1, then turns by k quarters. ``"orn8"``: index k turns the ring of a 3x3 kernel by k steps of 45 degrees
            (Zhou et al. 2017, "Oriented Response Networks"). Or an int64 table [n, K]: with index i the new tap p is
            the old tap table[i, p], of all K taps of the kernel (of the plane, where ``axis`` is given).
        condition: the name of the condition: an integer in 0 ... n - 1 for each.
        axis: for a kernel with three axes, the one that stays.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; IndexError for an index that is out
            of range (on a GPU: torch's assertion).
    """

    def __init__(self, group: str | Tensor = "p4", condition: str = "index", axis: int | None = None) -> None:
        super().__init__()
        if isinstance(group, Tensor):
            _require_table(group)
        elif group not in ("p4", "p4m", "orn8"):
            raise ValueError(f"Permute: group must be 'p4', 'p4m', 'orn8' or a table [n, K], got {group!r}")
        if not isinstance(condition, str):
            raise TypeError(f"Permute: condition must be the name of a condition, got {condition!r}")
        require_axis("Permute", axis)
        self.group: str = "table" if isinstance(group, Tensor) else group
        self.condition, self.axis = condition, axis
        self.rows = group.detach().cpu().clone() if isinstance(group, Tensor) else None

    def extra_repr(self) -> str:
        return f"group={self.group!r}, condition={self.condition!r}" + (
            "" if self.axis is None else f", axis={self.axis}"
        )

    def needs(self) -> Needs:
        return {self.condition: ()}

    def plan(self, kernel: Kernel) -> View:
        if self.group == "table":
            assert self.rows is not None
            view = View.all_of(kernel) if self.axis is None else plane_of("Permute", kernel, self.axis)
            if view.taps != self.rows.shape[1]:
                there = list(self.rows.shape)
                raise ValueError(f"Permute: group must have {view.taps} columns for this kernel, got a table {there}")
            return view
        view = plane_of("Permute", kernel, self.axis)
        sizes = [kernel.size[d - 2] for d in view.axes]
        distances = [kernel.dilation[d - 2] for d in view.axes]
        if sizes[0] != sizes[1] or (self.group == "orn8" and sizes != [3, 3]) or distances[0] != distances[1]:
            shape, got = "3x3" if self.group == "orn8" else "square", f"{sizes} with dilation {distances}"
            raise ValueError(f"Permute: the kernel must be {shape}, dilated equally, for {self.group!r}, got {got}")
        return view

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        if self.group != "table":
            self.rows = _tables(self.group, weight.shape[self.seen().axes[0]])
        assert self.rows is not None
        self.table = self.rows.to(weight.device)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        index = given("Permute", conditions, self.condition)
        if not isinstance(index, Tensor) or index.dtype == torch.bool or index.is_complex():
            got = describe(index) if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"Permute: condition {self.condition!r} must be integers, got {got}")
        if index.ndim != 1 or index.device != like.device:
            got = describe(index)
            raise ValueError(f"Permute: condition {self.condition!r} must be [C] on {like.device}, got {got}")
        return self.chosen(self._checked(index), like)

    def _checked(self, index: Tensor) -> Tensor:
        """As int64. What it holds is looked at where that costs nothing."""
        self.seen()
        assert self.rows is not None
        whole = index.round().long() if index.is_floating_point() else index.long()
        if index.is_cpu and not torch.compiler.is_compiling() and not special_mode():
            outside = (whole < 0) | (whole >= self.rows.shape[0]) | (whole != index)
            if bool(outside.any()):
                bad, last = index[outside][0].item(), self.rows.shape[0] - 1
                raise IndexError(f"Permute: condition {self.condition!r} must be whole, in 0 ... {last}, got {bad}")
        return whole


def _require_table(table: Tensor) -> None:
    if table.dtype != torch.int64 or table.ndim != 2 or not table.numel():
        raise TypeError(f"Permute: group must be an int64 table [n, K], got {describe(table)}")
    expected = torch.arange(table.shape[1], device=table.device)
    wrong = (table.sort(1).values != expected).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"Permute: every row of group must be a permutation, row {row} is {table[row].tolist()}")


def _tables(group: str, side: int) -> Tensor:
    """[n, side side]: which old tap each new tap is."""
    taps = torch.arange(side * side)
    if group == "orn8":
        ring = torch.tensor(_RING)
        table = taps.repeat(8, 1)
        for k in range(8):
            table[k, ring.roll(-k)] = ring
        return table
    square = taps.reshape(side, side)
    starts = [square, square.fliplr()] if group == "p4m" else [square]
    return torch.stack([start.rot90(k).flatten() for start in starts for k in range(4)])
