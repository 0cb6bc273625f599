"""Warps of filters by geometry: a condition, or a tensor of its own, says how far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require_choice, require_int, require_number
from ..numerics import opmath
from ..transform import describe, require_float
from ..warp_matrix import function as warp_matrix
from ..warp_matrix.reference import INTERPOLATIONS, PADDINGS
from .transform import Conditions, Kernel, Needs, View, Warp, numbers


class Given:
    """The numbers of a warp: a tensor of its own, or the name of a condition."""

    def __init__(self, module: Warp, attribute: str, value: object, condition: object, shape: tuple[int, ...]) -> None:
        owner = type(module).__name__
        if not isinstance(condition, str):
            raise TypeError(f"{owner}: condition must be the name of a condition, got {condition!r}")
        if value is not None and not isinstance(value, Tensor):
            if shape:
                raise TypeError(f"{owner}: {attribute} must be a Tensor {list(shape)} or None, got {value!r}")
            require_number(owner, attribute, value)
            value = torch.tensor(float(value))  # type: ignore[arg-type]
        if value is not None:
            require_float(owner, attribute, value)
            if tuple(value.shape) != shape:
                what = f"a Tensor {list(shape)}" if shape else "a number or a 0-dim Tensor"
                raise ValueError(f"{owner}: {attribute} must be {what} or None, got {describe(value)}")
        if isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(attribute, value)
        else:
            module.register_buffer(attribute, value)
        self.owner, self.attribute, self.condition, self.shape = owner, attribute, condition, shape

    def needs(self, module: Warp) -> Needs:
        return {} if getattr(module, self.attribute) is not None else {self.condition: self.shape}

    def of(self, module: Warp, conditions: Conditions, like: Tensor) -> Tensor:
        """[C, *shape] in the opmath dtype of ``like``; C is 1 for the warp's own."""
        own = getattr(module, self.attribute)
        if own is None:
            return numbers(self.owner, conditions, self.condition, self.shape, like)
        if own.device != like.device:
            raise ValueError(
                f"{self.owner}: {self.attribute} must be on {like.device} as weight is, got {describe(own)}"
            )
        return own.to(opmath(like.dtype))[None]

    def shown(self, module: Warp) -> str:
        own = getattr(module, self.attribute)
        return f"condition={self.condition!r}" if own is None else f"{self.attribute}={describe(own)}"


class _Plane(Warp):
    """A warp of a plane of the kernel by ``warp_matrix``."""

    kind = ""

    def __init__(self, given: tuple, interpolation: object, padding: object, axis: object) -> None:
        super().__init__()
        owner = type(self).__name__
        require_choice(owner, "interpolation", interpolation, INTERPOLATIONS)
        require_choice(owner, "padding", padding, PADDINGS)
        if axis is not None:
            require_int(owner, "axis", axis)
            if axis not in (0, 1, 2):
                raise ValueError(f"{owner}: axis must be None, 0, 1 or 2 (the one that stays), got {axis}")
        self.interpolation, self.padding, self.axis = interpolation, padding, axis
        self.given = Given(self, *given)
        self.plane: Any = None  # (height, width, dy, dx), once attached

    def extra_repr(self) -> str:
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"{self.given.shown(self)}, interpolation={self.interpolation!r}, padding={self.padding!r}{axis}"

    def needs(self) -> Needs:
        return self.given.needs(self)

    def plan(self, kernel: Kernel) -> View:
        owner, n = type(self).__name__, len(kernel.size)
        if n == 1:
            raise ValueError(
                f"{owner}: the kernel must have two or three axes, got {list(kernel.size)}; Scale and Flip serve one"
            )
        if n == 3 and self.axis is None:
            raise ValueError(f"{owner}: axis must be 0, 1 or 2 (the one that stays) for a kernel {list(kernel.size)}")
        if n == 2 and self.axis is not None:
            raise ValueError(f"{owner}: axis must be None for a kernel {list(kernel.size)}, got {self.axis}")
        axes = tuple(d for d in range(n) if n == 2 or d != self.axis)
        return View(tuple(2 + d for d in axes), kernel.size[axes[0]] * kernel.size[axes[1]])

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        kernel = Kernel.of(type(self).__name__, weight, module)
        a, b = (d - 2 for d in self.seen().axes)
        self.plane = (kernel.size[a], kernel.size[b], float(kernel.dilation[a]), float(kernel.dilation[b]))

    def parameters_of(self, values: Tensor) -> Tensor:
        """What ``warp_matrix`` takes [C, P], of the condition's numbers [C, *shape]."""
        return values.reshape(values.shape[0], -1)

    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        self.seen()
        options = warp_matrix.Options(self.kind, *self.plane, self.interpolation, self.padding)
        return warp_matrix.apply(self.parameters_of(self.given.of(self, conditions, like)), options)


class Rotate(_Plane):
    """Turns every filter by an angle, counterclockwise as ``torch.rot90`` and torchvision's ``rotate``.

    Args:
        angle: in radians, any. ``None``: from the condition. A number, or a 0-dim tensor: its own, a buffer, or for an
            ``nn.Parameter`` a parameter, which then learns.
        condition: the name of the condition, a number for each.
        interpolation: ``"bilinear"`` or ``"bicubic"``, as ``grid_sample(align_corners=True)``.
        padding: what lies outside the kernel: ``"zeros"``, or its nearest tap, ``"border"``.
        axis: for a kernel with three axes, the one (0, 1, 2) that stays; the plane of the other two turns as
            ``rot90`` of those dims.

    Dilated taps turn as they lie. The derivative in the angle is one-sided where a tap lands on a tap.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; when it is attached, for a kernel
            with one axis, or with three where ``axis`` is not given.
    """

    kind = "rotate"

    def __init__(
        self,
        angle: Tensor | float | None = None,
        condition: str = "angle",
        interpolation: str = "bilinear",
        padding: str = "zeros",
        axis: int | None = None,
    ) -> None:
        super().__init__(("angle", angle, condition, ()), interpolation, padding, axis)
