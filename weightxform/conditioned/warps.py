"""Warps of filters by geometry: a condition, or a tensor of its own, says how far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._torch import outside_autocast, special_mode
from ..checks import require_bool, require_choice, require_int, require_number
from ..numerics import opmath
from ..transform import describe, require_float
from ..warp_matrix import function as warp_matrix
from ..warp_matrix.reference import INTERPOLATIONS, PADDINGS
from .condition import Positive, first
from .transform import Conditions, Kernel, Needs, View, Warp, numbers


class Source(NamedTuple):
    """Where the numbers of a warp are from: a tensor of its own, kept as ``attribute``, or a condition."""

    owner: str
    attribute: str
    condition: str
    shape: tuple[int, ...]

    @property
    def argument(self) -> str:
        """Which gave the tensor: a module cannot keep one under the name of its method."""
        return "matrix" if self.attribute == "theta" else self.attribute

    def hold(self, module: Warp, value: object) -> None:
        """Check, then register ``value`` as a parameter or buffer; ``None``: the condition says."""
        if not isinstance(self.condition, str):
            raise TypeError(f"{self.owner}: condition must be the name of a condition, got {self.condition!r}")
        what = f"a Tensor {list(self.shape)}" if self.shape else "a number or a 0-dim Tensor"
        if value is not None and not isinstance(value, Tensor):
            if self.shape:
                raise TypeError(f"{self.owner}: {self.argument} must be {what} or None, got {value!r}")
            require_number(self.owner, self.argument, value)
            value = torch.tensor(float(value))  # type: ignore[arg-type]
        if value is not None:
            require_float(self.owner, self.argument, value)
            if tuple(value.shape) != self.shape:
                raise ValueError(f"{self.owner}: {self.argument} must be {what} or None, got {describe(value)}")
            if not value.is_meta and not special_mode():
                self._check(value, self.argument)
        if isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(self.attribute, value)
        else:
            module.register_buffer(self.attribute, value)

    def _check(self, value: Tensor, name: str) -> None:
        kind, wrong = "finite", ~value.isfinite()
        if isinstance(self.shape, Positive):
            kind, wrong = "positive", wrong | (value <= 0)
        if bool(wrong.any()):
            raise ValueError(f"{self.owner}: {name} must be {kind}, got {first(value, wrong)}")

    def own(self, module: Warp) -> Tensor | None:
        return getattr(module, self.attribute)

    def of(self, module: Warp, conditions: Conditions, like: Tensor) -> Tensor:
        """[C, *shape] in the opmath dtype of ``like``; C is 1 for the warp's own."""
        own = self.own(module)
        if own is None:
            given = numbers(self.owner, conditions, self.condition, self.shape, like)
            if given.is_cpu and isinstance(self.shape, Positive) and not (is_compiling() or special_mode()):
                self._check(given.detach(), f"condition {self.condition!r}")  # where looking costs nothing
            return given
        if own.device != like.device:
            expected = f"on {like.device} as weight is"
            raise ValueError(f"{self.owner}: {self.argument} must be {expected}, got {describe(own)}")
        return own.to(opmath(like.dtype))[None]


class Sampled(Warp):
    """A warp that interpolates between the taps; ``kind`` of ``warp_matrix`` where it is nothing else."""

    kind = ""

    def __init__(
        self, attribute: str, value: object, condition: str, shape: tuple[int, ...], interpolation: str, padding: str,
        axis: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = type(self).__name__
        require_choice(owner, "interpolation", interpolation, INTERPOLATIONS)
        require_choice(owner, "padding", padding, PADDINGS)
        require_axis(owner, axis)
        self.interpolation, self.padding, self.axis = interpolation, padding, axis
        self.source = Source(owner, attribute, condition, shape)
        self.source.hold(self, value)
        self.kernel: Kernel | None = None

    def extra_repr(self) -> str:
        own = self.source.own(self)
        of = f"condition={self.source.condition!r}" if own is None else f"{self.source.attribute}={describe(own)}"
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"{of}, interpolation={self.interpolation!r}, padding={self.padding!r}{axis}"

    def needs(self) -> Needs:
        return {} if self.source.own(self) is not None else {self.source.condition: self.source.shape}

    def plan(self, kernel: Kernel) -> View:
        return plane_of(type(self).__name__, kernel, self.axis)

    def check(self, weight: Tensor, module: nn.Module | None) -> None:
        super().check(weight, module)
        own = self.source.own(self)
        if isinstance(own, nn.Parameter) and own.device != weight.device:
            expected = f"on {weight.device} as the weight is"
            raise ValueError(f"{type(self).__name__}: {self.source.argument} must be {expected}, got {describe(own)}")

    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        super().create(weight, module)
        own = self.source.own(self)
        if own is not None and not isinstance(own, nn.Parameter):
            setattr(self, self.source.attribute, own.to(weight.device))
        self.kernel = Kernel.of(type(self).__name__, weight, module)

    def sampled(self, params: Tensor, kind: str, *axes: int) -> Tensor:
        """The matrices [C, K, K] of warps [C, P] along one or two spatial axes of the kernel."""
        assert self.kernel is not None
        sizes, distances = ([of[d] for d in axes] for of in self.kernel)
        if len(axes) == 1:
            sizes, distances = [1, *sizes], [1, *distances]
        options = warp_matrix.Options(
            kind, sizes[0], sizes[1], float(distances[0]), float(distances[1]), self.interpolation, self.padding
        )
        return warp_matrix.apply(params, options)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        axes = [d - 2 for d in self.seen().axes]
        values = self.source.of(self, conditions, like)
        return self.sampled(values.reshape(values.shape[0], -1), self.kind, *axes)


def require_axis(owner: str, axis: object) -> None:
    """Of the plane of a kernel with three axes."""
    if axis is not None:
        require_int(owner, "axis", axis)
        if axis not in (0, 1, 2):
            raise ValueError(f"{owner}: axis must be None, 0, 1 or 2 (the one that stays), got {axis}")


def plane_of(owner: str, kernel: Kernel, axis: int | None) -> View:
    """Both axes of a kernel, or of three all but ``axis``; ``ValueError`` where these are not two."""
    n = len(kernel.size)
    if n == 1:
        raise ValueError(
            f"{owner}: the kernel must have two or three axes, got {list(kernel.size)}; Scale and Flip serve one"
        )
    if n == 3 and axis is None:
        raise ValueError(f"{owner}: axis must be 0, 1 or 2 (the one that stays) for a kernel {list(kernel.size)}")
    if n == 2 and axis is not None:
        raise ValueError(f"{owner}: axis must be None for a kernel {list(kernel.size)}, got {axis}")
    a, b = (d for d in range(n) if d != axis)
    return View((2 + a, 2 + b), kernel.size[a] * kernel.size[b])


class Rotate(Sampled):
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

    A filter turns within its own taps, and what leaves them is lost: of a square kernel the corners, of 1x7 or 7x1
    taps at 90 degrees all but the middle one. Such layers are better left out (``layers=[...]``). Of a Linear layer the
    inputs are turned; one whose outputs become a map, as the first of a generator, does not turn.

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
        super().__init__("angle", angle, condition, (), interpolation, padding, axis)


class Scale(Sampled):
    """Enlarges every filter about its middle: the new tap at x is the old kernel at x / scale.

    Args:
        scale: > 0, also where it is a condition. ``None``, a number, a tensor: as ``angle`` of :class:`Rotate`.
        condition: the name of the condition.
        isotropic: one number for all axes, of shape (); else two (s_x, s_y), of shape (2,), for two axes.
        interpolation, padding: as for :class:`Rotate`.
        axis: of a kernel with three axes, the one that stays; ``None``, and isotropic: all three are scaled.

    The taps' sum is not kept. Kernels with one, two or three axes.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    kind = "scale"
    scale: Tensor | None

    def __init__(
        self,
        scale: Tensor | float | None = None,
        condition: str = "scale",
        isotropic: bool = True,
        interpolation: str = "bilinear",
        padding: str = "zeros",
        axis: int | None = None,
    ) -> None:
        require_bool("Scale", "isotropic", isotropic)
        super().__init__("scale", scale, condition, Positive(() if isotropic else (2,)), interpolation, padding, axis)

    def plan(self, kernel: Kernel) -> View:
        if not self.source.shape and len(kernel.size) != 2 and self.axis is None:
            return View.all_of(kernel)
        if len(kernel.size) == 1 and self.source.shape:
            raise ValueError(f"Scale: isotropic must be True for a kernel with one axis, {list(kernel.size)}")
        return super().plan(kernel)

    @outside_autocast
    def matrix(self, conditions: Conditions, like: Tensor) -> Tensor:
        axes = [d - 2 for d in self.seen().axes]
        values = self.source.of(self, conditions, like)
        params = values if self.source.shape else values[:, None].expand(-1, 2)
        if len(axes) < 3:
            return self.sampled(params, "scale", *axes)
        a, b = self.sampled(params, "scale", axes[0]), self.sampled(params, "scale", *axes[1:])
        return (a[:, :, None, :, None] * b[:, None, :, None, :]).flatten(3).flatten(1, 2)


class Shear(Sampled):
    """Shears every filter: the new tap at (x, y) is the old kernel at (x + m_x y, y + m_y x), y downwards.

    Args:
        shear: (m_x, m_y), of shape (2,). ``None``, or a tensor: as ``angle`` of :class:`Rotate`.
        condition: the name of the condition.
        interpolation, padding, axis: as for :class:`Rotate`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    kind = "shear"

    def __init__(
        self,
        shear: Tensor | None = None,
        condition: str = "shear",
        interpolation: str = "bilinear",
        padding: str = "zeros",
        axis: int | None = None,
    ) -> None:
        super().__init__("shear", shear, condition, (2,), interpolation, padding, axis)


class Affine(Sampled):
    """Warps every filter by a 2x3 matrix T: the new tap at (x, y) is the old kernel at T (x, y, 1).

    Args:
        matrix: [2, 3], rows for x and y; positions from the middle of the kernel, x to the right, y down, in units of
            the input (see :func:`weightxform.functional.affine_matrix`). ``None``, or a tensor: as ``angle`` of
            :class:`Rotate`; its own is called ``theta``.
        condition: the name of the condition.
        interpolation, padding, axis: as for :class:`Rotate`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    kind = "affine"

    def __init__(
        self,
        matrix: Tensor | None = None,
        condition: str = "matrix",
        interpolation: str = "bilinear",
        padding: str = "zeros",
        axis: int | None = None,
    ) -> None:
        super().__init__("theta", matrix, condition, (2, 3), interpolation, padding, axis)
