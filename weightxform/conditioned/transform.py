"""Transforms of a filter bank that follow a condition: their base class, and sums and chains of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import autocast_dtype
from ..filter_warp import function as filter_warp
from ..numerics import opmath
from ..transform import Transform, describe, require_float

Conditions = Mapping[str, Tensor]


class Kernel(NamedTuple):
    """The spatial part of a weight [O, I, *size] (or [I, O, *size]): taps along each axis, and their distances."""

    size: tuple[int, ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(owner: str, weight: Tensor, module: nn.Module | None) -> Kernel:
        """Of a weight and the layer that it belongs to. Raises ``ValueError`` for a weight with no spatial axes."""
        require_float(owner, "the weight", weight)
        if weight.ndim < 3 or weight.ndim > 5:
            raise ValueError(
                f"{owner}: the weight must have one to three spatial axes, [O, I, *kernel], got {describe(weight)}"
            )
        size = tuple(weight.shape[2:])
        dilation = getattr(module, "dilation", None)
        fits = isinstance(dilation, tuple) and len(dilation) == len(size) and module is not None
        return Kernel(size, dilation if fits else (1,) * len(size))  # type: ignore[arg-type]


class FilterTransform(Transform):
    """A weight that is a function of a stored weight and of a condition; the base class of ``wx.Rotate`` and others.

    It serves three ways: in :class:`weightxform.Conditioned`, which gives it the condition at each call; in
    ``ComputedParameter(layer.weight, transform)``, where it must own what it needs (``wx.Rotate(angle=parameter)``);
    and by itself, ``transform.at(weight, {"angle": angles})`` after ``transform.attach(weight, layer)``.

    A subclass implements :meth:`needs` and :meth:`at`, and :meth:`attach` where its parameters depend on the layer.
    ``a + b`` is the sum of what both give, ``a @ b`` applies b, then a. A *change* (:attr:`is_change`, as
    ``LearnedResidual``) gives what is to be added: alone, or in a sum of changes, it is added to the weight.
    """

    is_change: ClassVar[bool] = False

    def needs(self) -> dict[str | None, tuple[int, ...] | None]:
        """The conditions that :meth:`at` must be given: name -> shape of one.

        ``None`` as name: whichever single one is there. ``None`` as shape: any.
        """
        return {}

    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        """What the transform gives for C conditions.

        Args:
            weight: [O, I, *kernel], of the shape that the transform was attached to.
            conditions: name -> [C, *shape], all with the same C, on the device of ``weight``.
            dtype: of the result; default, that of ``weight``.

        Returns:
            [C, O, I, *kernel]; C is 1 where nothing depends on a condition. Differentiable in ``weight``, the
            conditions and the parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement at(weight, conditions, dtype)")

    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        """:meth:`at`, and for a change the weight with it."""
        out = self.at(weight, conditions, dtype)
        return weight.to(out.dtype) + out if self.is_change else out

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        needed = self.needs()
        if needed:
            names = " and ".join("a condition" if n is None else repr(n) for n in needed)
            raise RuntimeError(
                f"{type(self).__name__} needs {names}: use it in wx.Conditioned(model, transform), or give it a tensor "
                "of its own, as wx.Rotate(angle=torch.nn.Parameter(...))"
            )
        return self.whole(raw, {}, autocast_dtype(raw.device.type))[0]

    def __add__(self, other: Any) -> FilterTransform:
        return Sum(self, other) if isinstance(other, FilterTransform) else NotImplemented

    def __matmul__(self, other: Any) -> FilterTransform:
        return Chain(self, other) if isinstance(other, FilterTransform) else NotImplemented


def given(owner: str, conditions: Conditions, name: str | None) -> Tensor:
    """The condition of this name, or for ``None`` the only one; ``ValueError`` where there is none or several."""
    if name is None and len(conditions) == 1:
        return next(iter(conditions.values()))
    if name is None or name not in conditions:
        there = ", ".join(map(repr, conditions)) or "none"
        wanted = "one condition, or the name of one (condition=...)" if name is None else repr(name)
        raise ValueError(f"{owner}: conditions must have {wanted}, got {there}")
    return conditions[name]


class View(NamedTuple):
    """How a warp sees a weight [O, I, *kernel]: which axes it maps (the others count as channels)."""

    axes: tuple[int, ...]  # of the weight, ascending
    taps: int

    @staticmethod
    def all_of(kernel: Kernel) -> View:
        taps = 1
        for n in kernel.size:
            taps *= n
        return View(tuple(range(2, 2 + len(kernel.size))), taps)


class Warp(FilterTransform):
    """A transform that maps the taps of each filter by a matrix: ``out = A(condition) filter``.

    A subclass implements :meth:`matrix`, and sets :attr:`view` in :meth:`attach`.
    """

    view: View | None = None

    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        """A [C, K, K], float64 or float32 on the device of ``like``: row p says of which taps the new tap p is made."""
        raise NotImplementedError(f"{type(self).__name__} must implement matrix(conditions, like)")

    def seen(self) -> View:
        """:attr:`view`; ``RuntimeError`` before :meth:`attach`."""
        if self.view is None:
            raise RuntimeError(f"{type(self).__name__}: not attached to a weight yet; call attach(weight, layer)")
        return self.view

    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        return warped(weight, self.matrix(conditions, weight), self.seen(), dtype)


def warped(weight: Tensor, matrix: Tensor, view: View, dtype: torch.dtype | None) -> Tensor:
    """The filters of ``weight`` mapped by ``matrix`` [C, K, K] along the axes of ``view``: [C, *weight.shape]."""
    rest = [d for d in range(weight.ndim) if d not in view.axes]
    order = [*rest, *view.axes]
    moved = weight.permute(order)
    out = filter_warp.apply(moved.reshape(1, -1, view.taps), matrix[:, None], dtype)
    out = out.reshape(matrix.shape[0], *moved.shape)
    if order == sorted(order):
        return out
    return out.permute([0, *(1 + order.index(d) for d in range(weight.ndim))])


class _Pair(FilterTransform):
    """Two transforms of one weight."""

    def __init__(self, *parts: FilterTransform) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def needs(self) -> dict[str | None, tuple[int, ...] | None]:
        needed: dict[str | None, tuple[int, ...] | None] = {}
        for part in self.parts:
            for name, shape in part.needs().items():  # type: ignore[operator]
                if needed.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{type(self).__name__}: its parts take {name!r} in different shapes: {needed[name]} and "
                        f"{shape}; give one of them another name (condition=...)"
                    )
        return needed

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        for part in self.parts:
            part.attach(raw, module, name)  # type: ignore[operator]

    def _view(self) -> View | None:
        """Of all parts, if they are warps that map the same axes; else ``None``."""
        views = {part.seen() if isinstance(part, Warp) else None for part in _leaves(self)}
        return views.pop() if len(views) == 1 else None


def _leaves(transform: FilterTransform) -> list[FilterTransform]:
    if not isinstance(transform, _Pair):
        return [transform]
    return [leaf for part in transform.parts for leaf in _leaves(part)]  # type: ignore[arg-type]


def _matrix(transform: Any, conditions: Conditions, like: Tensor) -> Tensor:
    """A of a warp, or of sums and chains of warps that map the same axes."""
    if isinstance(transform, Warp):
        return transform.matrix(conditions, like)
    return transform._matrix(conditions, like)


def _whole_matrix(transform: Any, conditions: Conditions, like: Tensor) -> Tensor:
    a = _matrix(transform, conditions, like)
    return a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) if transform.is_change else a


class Sum(_Pair):
    """The sum of transforms; ``a + b``. Its weight counts once where all of them are changes."""

    @property
    def is_change(self) -> bool:  # type: ignore[override]
        return all(part.is_change for part in self.parts)

    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        view = self._view()
        if view is not None:
            return warped(weight, self._matrix(conditions, weight), view, dtype)
        wide = opmath(weight.dtype)  # one rounding
        out = sum(part.at(weight, conditions, wide) for part in self.parts)  # type: ignore[operator]
        assert isinstance(out, Tensor)
        return out.to(dtype or weight.dtype)

    def _matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        a, b = (_matrix(part, conditions, like) for part in self.parts)
        return a + b


class Chain(_Pair):
    """One transform after the other; ``a @ b`` applies b first."""

    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        view = self._view()
        if view is not None:
            return warped(weight, self._matrix(conditions, weight), view, dtype)
        a, b = self.parts
        inner = b.whole(weight, conditions, opmath(weight.dtype))  # type: ignore[operator]
        outs = [
            a.whole(w, {n: c[i : i + 1] for n, c in conditions.items()}, dtype or weight.dtype)  # type: ignore[operator]
            for i, w in enumerate(inner)
        ]
        return torch.cat(outs)

    def _matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        a, b = (_whole_matrix(part, conditions, like) for part in self.parts)
        return a @ b
