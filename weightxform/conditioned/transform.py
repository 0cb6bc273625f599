"""Transforms of a filter bank that follow a condition: their base class, and sums and chains of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import cast_by_autocast, outside_autocast
from ..filter_warp import function as filter_warp
from ..numerics import opmath
from ..transform import Transform, describe, require_float
from .respond import over_channels, respond

Conditions = Mapping[str, Tensor]
Needs = dict[str | None, tuple[int, ...] | None]


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

    A subclass implements :meth:`needs` and :meth:`at`, and :meth:`check` and :meth:`create` where it depends on the
    layer. ``a + b`` is the sum of what both give, ``a @ b`` applies b, then a. A *change* (:attr:`is_change`, as
    ``LearnedResidual``) gives what is to be added: alone, or in a sum of changes, it is added to the weight.
    """

    is_change: ClassVar[bool] = False
    needs_kernel: ClassVar[bool] = True  # False: it serves a Linear as it is, too
    shape: tuple[int, ...] | None = None  # of the weight that it serves

    def needs(self) -> Needs:
        """The conditions that :meth:`at` must be given: name -> shape of one.

        ``None`` as name: whichever single one is there. ``None`` as shape: any.
        """
        return {}

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        self.check(raw, module)
        self.create(raw, module)

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        """Raise ``ValueError`` or ``TypeError`` where this cannot serve ``weight`` of ``module``; change nothing."""
        owner = type(self).__name__
        require_float(owner, "the weight", weight)
        if self.shape is not None:
            raise ValueError(f"{owner}: this instance serves another weight already; give each weight its own")

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        """Create what depends on the weight, which :meth:`check` has passed."""
        self.shape = tuple(weight.shape)

    def fitting(self, weight: Tensor) -> Tensor:
        """``weight``, if it is of the shape that was attached; else ``RuntimeError`` or ``ValueError``."""
        owner = type(self).__name__
        if self.shape is None:
            raise RuntimeError(f"{owner}: not attached to a weight yet; call attach(weight, layer)")
        require_float(owner, "weight", weight)
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"{owner}: weight must be {list(self.shape)}, as was attached, got {describe(weight)}")
        return weight

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

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        """:meth:`at`, and for a change the weight with it."""
        if not self.is_change:
            return self.at(weight, conditions, dtype)
        wide = opmath(weight.dtype)  # one rounding
        return (weight.to(wide) + self.at(weight, conditions, wide)).to(dtype or weight.dtype)

    def linear(self) -> View | None:
        """The axes along which :meth:`matrix` maps the taps, where this is such a map (as warps are); else ``None``."""
        return None

    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        """For a transform with :meth:`linear`: A [C, K, K], in the opmath dtype of ``like`` and on its device.

        Row p says of which taps the new tap p is made.
        """
        raise NotImplementedError(f"{type(self).__name__} has no matrix(conditions, like)")

    def whole_matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        """:meth:`matrix`, and for a change the identity with it."""
        a = self.matrix(conditions, like)
        return a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) if self.is_change else a

    def has_activation(self, weight: Tensor, layer: nn.Module) -> bool:
        """Whether :meth:`activation` serves this layer, and a weight for each sample can be avoided."""
        return False

    def activation(
        self, layer: nn.Module, x: Tensor, weight: Tensor, conditions: Conditions, index: Tensor | None
    ) -> Tensor | None:
        """What ``layer`` gives for ``x`` with its weight transformed, without a weight for each sample.

        Args:
            layer: of which bias, stride, padding and the like are taken.
            x: [B, ...], its input.
            weight: as in :meth:`at`.
            conditions: name -> [C, *shape].
            index: int64 [B]: which of the C conditions each sample has; ``None``: each its own.

        Returns:
            The output, or ``None`` where :meth:`has_activation` is false.
        """
        if not self.has_activation(weight, layer):
            return None
        bias: Any = layer.bias
        if self.is_change:
            y = respond(layer, x, weight.to(x.dtype), bias)
            return y + self.response(layer, x, weight, conditions, index)
        y = self.response(layer, x, weight, conditions, index)
        return y if bias is None else y + over_channels(layer, bias.to(y.dtype))

    def response(
        self, layer: nn.Module, x: Tensor, weight: Tensor, conditions: Conditions, index: Tensor | None
    ) -> Tensor:
        """:meth:`activation` of the weight of :meth:`at`, without bias; only where :meth:`has_activation` is true."""
        raise NotImplementedError(f"{type(self).__name__} has no response(layer, x, weight, conditions, index)")

    def check_alone(self) -> None:
        needed = self.needs()
        if needed:
            names = " and ".join("a condition" if n is None else repr(n) for n in needed)
            raise ValueError(
                f"{type(self).__name__} needs {names}: use it in wx.Conditioned(model, transform), or give it a tensor "
                "of its own, as wx.Rotate(angle=torch.nn.Parameter(...))"
            )

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        self.check_alone()
        return self.whole(raw, {}, cast_by_autocast(raw))[0]

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


def numbers(owner: str, conditions: Conditions, name: str | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """:func:`given`, [C, *shape], in the opmath dtype of ``like``; ``ValueError``, ``TypeError`` if it does not fit."""
    c = given(owner, conditions, name)
    label = "the condition" if name is None else f"condition {name!r}"
    require_float(owner, label, c)
    if c.ndim == 0 or tuple(c.shape[1:]) != shape or c.device != like.device:
        expected = ", ".join(["C", *map(str, shape)])
        raise ValueError(f"{owner}: {label} must be [{expected}] on {like.device}, got {describe(c)}")
    return c.to(opmath(like.dtype))


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

    A subclass implements :meth:`matrix`, and :meth:`plan` where it maps fewer than all spatial axes.
    """

    view: View | None = None

    def plan(self, kernel: Kernel) -> View:
        """Which axes it maps; ``ValueError`` for a kernel that it cannot serve. Changes nothing."""
        return View.all_of(kernel)

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        self.plan(Kernel.of(type(self).__name__, weight, module))

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        self.view = self.plan(Kernel.of(type(self).__name__, weight, module))

    def seen(self) -> View:
        """:attr:`view`; ``RuntimeError`` before :meth:`attach`."""
        if self.view is None:
            raise RuntimeError(f"{type(self).__name__}: not attached to a weight yet; call attach(weight, layer)")
        return self.view

    def linear(self) -> View | None:
        return self.seen()

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        return warped(self.fitting(weight), self.matrix(conditions, weight), self.seen(), dtype)

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        return warped(self.fitting(weight), self.whole_matrix(conditions, weight), self.seen(), dtype)


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

    def needs(self) -> Needs:
        needed: Needs = {}
        for part in self.parts:
            for name, shape in part.needs().items():  # type: ignore[operator]
                if needed.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{type(self).__name__}: its parts take {name!r} in different shapes: {needed[name]} and "
                        f"{shape}; give one of them another name (condition=...)"
                    )
        return needed

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        mine = leaves(self)
        for i, leaf in enumerate(mine):
            if any(leaf is other for other in mine[:i]):
                raise ValueError(f"{type(self).__name__}: one {type(leaf).__name__} is in it twice; make two of them")
            leaf.check(weight, module)

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        for part in self.parts:
            part.attach(weight, module)  # type: ignore[operator]

    def linear(self) -> View | None:
        """Of both parts, if they map the same axes."""
        views = {part.linear() for part in self.parts}  # type: ignore[operator]
        return views.pop() if len(views) == 1 else None

    @outside_autocast
    def at(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        view = self.linear()
        if view is None:
            return self.of_parts(self.fitting(weight), conditions, dtype or weight.dtype)
        return warped(self.fitting(weight), self.matrix(conditions, weight), view, dtype)

    def of_parts(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype) -> Tensor:
        """:meth:`at` where there is no matrix."""
        raise NotImplementedError


def leaves(transform: FilterTransform) -> list[FilterTransform]:  # of which it is the sum or chain
    if not isinstance(transform, _Pair):
        return [transform]
    return [leaf for part in transform.parts for leaf in leaves(part)]  # type: ignore[arg-type]


class Sum(_Pair):
    """The sum of transforms; ``a + b``. Its weight counts once where all of them are changes."""

    @property
    def is_change(self) -> bool:  # type: ignore[override]
        return all(part.is_change for part in self.parts)

    @outside_autocast
    def whole(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype | None = None) -> Tensor:
        view = self.linear()
        if view is not None:
            return warped(self.fitting(weight), self.whole_matrix(conditions, weight), view, dtype)
        if not self.is_change:
            return self.at(weight, conditions, dtype)
        a, b = self.parts  # the weight comes with one of them, which may have it for nothing
        wide = opmath(self.fitting(weight).dtype)
        out = a.whole(weight, conditions, wide) + b.at(weight, conditions, wide)  # type: ignore[operator]
        return out.to(dtype or weight.dtype)

    def has_activation(self, weight: Tensor, layer: nn.Module) -> bool:
        return all(part.has_activation(weight, layer) for part in self.parts)  # type: ignore[operator]

    def response(
        self, layer: nn.Module, x: Tensor, weight: Tensor, conditions: Conditions, index: Tensor | None
    ) -> Tensor:
        a, b = (part.response(layer, x, weight, conditions, index) for part in self.parts)  # type: ignore[operator]
        return a + b

    def of_parts(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype) -> Tensor:
        wide = opmath(weight.dtype)  # one rounding
        a, b = (part.at(weight, conditions, wide) for part in self.parts)  # type: ignore[operator]
        return (a + b).to(dtype)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        a, b = (part.matrix(conditions, like) for part in self.parts)  # type: ignore[operator]
        return a + b


class Chain(_Pair):
    """One transform after the other; ``a @ b`` applies b first."""

    def of_parts(self, weight: Tensor, conditions: Conditions, dtype: torch.dtype) -> Tensor:
        a: Any
        b: Any
        a, b = self.parts
        inner = b.whole(weight, conditions, opmath(weight.dtype))
        if inner.shape[0] == 1:
            return a.whole(inner[0], conditions, dtype)
        view = a.linear()
        if view is not None:  # each condition has its own weight
            matrix = a.whole_matrix(conditions, inner)
            last = tuple(range(inner.ndim - len(view.axes), inner.ndim))
            moved = inner.movedim([1 + d for d in view.axes], last)
            out = moved.reshape(inner.shape[0], -1, view.taps) @ matrix.transpose(1, 2)
            return out.reshape(moved.shape).movedim(last, [1 + d for d in view.axes]).to(dtype)
        outs = [a.whole(w, {n: c[i : i + 1] for n, c in conditions.items()}, dtype) for i, w in enumerate(inner)]
        return torch.cat(outs)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        a, b = (part.whole_matrix(conditions, like) for part in self.parts)  # type: ignore[operator]
        return a @ b
