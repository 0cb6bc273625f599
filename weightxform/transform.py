"""Transform: a weight computed from a raw tensor. What a room's module implements and ``ComputedParameter`` calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .numerics import FLOAT_DTYPES

Repeat = Callable[[tuple[list[int], list[int]]], list[Tensor] | None]


_SET = "_wx_set"  # in a transform's __dict__: Transform.configured when something was last set on it


class Transform(nn.Module):
    """Base class of transforms: ``weight = transform(raw)``.

    A subclass implements :meth:`compute`, and whichever of the others its state needs; a ``right_inverse(value)``, a
    raw tensor whose computed weight is ``value`` as nearly as may be, where there is one (for ``wx.assign``).

    It may also be used in ``torch.nn.utils.parametrize.register_parametrization``, which calls no :meth:`attach`: one
    with state, or that depends on the layer, wants ``transform.attach(layer.weight, layer)`` first (``SpectralNorm``
    does that itself).
    """

    groupable: ClassVar[bool] = False  # whether compute_group does better than one compute after another
    keeps_graph: ClassVar[bool] = False  # its graph stands many backward passes: a Function with its state on ctx
    shares_state: ClassVar[bool] = False  # all members of a group have the same state(), and no step to take
    tensor_parallel: ClassVar[bool] = False  # whether compute takes a DTensor
    cache = True  # False: compute at every read, and in training mode advance at every read
    configured: ClassVar[int] = 0  # counts what was set on any transform: options, modes, buffers, devices
    instead_of_writing: ClassVar[str] = (  # into the computed weight, for the message
        "Write wx.raw(module, {name!r}), use wx.assign(module, {name!r}, value), layer.reset_parameters() or "
        "model.apply(init_fn); to compute it from something else, assign wx.ComputedParameter(raw, transform) to "
        "module.{name}."
    )

    def __setattr__(self, name: str, value: Any) -> None:
        # Where it is traced Dynamo would compile again whenever the count had moved; train() once more sets nothing.
        if not torch.compiler.is_compiling() and not (name == "training" and self.__dict__.get(name) is value):
            Transform.configured += 1
            if name != "training":  # whoever keeps a value compares the modes themselves
                self.__dict__[_SET] = Transform.configured
        super().__setattr__(name, value)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.__dict__.pop(_SET, None)  # of another process

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        Transform.configured += 1
        return super()._apply(fn, recurse)

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        """Check that the transform fits ``raw`` (and the module that owns it), then create the state.

        Raises ``ValueError`` or ``TypeError`` before anything is changed.
        """

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        """The computed weight. ``advance``: take one step of the state (a power iteration); else leave it alone."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute(raw, advance)")

    def forward(self, raw: Tensor) -> Tensor:
        return self.compute(raw, self.training)

    def reset(self, raw: Tensor) -> None:
        """Make the state fit ``raw``, whose value was replaced (an assignment, an init, a checkpoint without state)."""

    def check_alone(self) -> None:
        """Raise ``ValueError`` where the weight cannot be computed from the raw tensor alone (it needs a condition)."""

    def check_bake(self) -> None:
        """Raise ``RuntimeError`` where the weight is not one that ``wx.bake`` can leave in the module."""

    @property
    def foldable(self) -> bool:
        """Whether layers may take :meth:`compute_state` in the place of the weight; see ``wx.nn``."""
        return False

    def compute_state(self, raw: Tensor, advance: bool) -> Tensor:
        """What a folded layer needs in the place of the weight; no gradient goes through it."""
        raise NotImplementedError(f"{type(self).__name__} cannot be folded into a layer")

    @classmethod
    def compute_state_group(
        cls, transforms: Sequence[Transform], raws: Sequence[Tensor], advance: Sequence[bool]
    ) -> list[Tensor]:
        """``[t.compute_state(r, a) for ...]`` in one call, as :meth:`compute_group`."""
        return [t.compute_state(r, a) for t, r, a in zip(transforms, raws, advance, strict=True)]

    def state(self) -> tuple[Tensor, ...]:
        """The tensors, besides raw, that the computed weight depends on. A write to one invalidates the weight."""
        return (*self.parameters(), *self.buffers())

    def group_key(self, raw: Tensor) -> Hashable:
        """Members of a group with equal keys are computed in one call; ``None``: this one is computed alone."""
        return None

    @classmethod
    def compute_group(
        cls, transforms: Sequence[Transform], raws: Sequence[Tensor], advance: Sequence[bool]
    ) -> list[Tensor]:
        """``[t.compute(r, a) for ...]`` in one call, for members whose :meth:`group_key` is the same."""
        return [t.compute(r, a) for t, r, a in zip(transforms, raws, advance, strict=True)]

    @classmethod
    def repeat_group(
        cls, transforms: Sequence[Transform], raws: Sequence[Tensor], advance: Sequence[bool], accumulates: bool
    ) -> Repeat | None:
        """A faster :meth:`compute_group` of just these, called while nothing but the values of the raw tensors changes.

        It gets the versions and the optimizer steps of the raw tensors, and returns ``None``, with nothing done, where
        :meth:`compute_group` has to do it. ``None`` where there is none. ``accumulates``: a backward may add to
        ``raw.grad`` itself.
        """
        return None


def configured_after(root: nn.Module, count: int) -> bool:
    """Whether anything but the mode was set on a transform in ``root`` since ``Transform.configured`` was ``count``."""
    return any(vars(m).get(_SET, 0) > count for m in root.modules())


def describe(raw: Tensor) -> str:
    """``float32[64, 3, 3, 3] on cpu``, for error messages."""
    return f"{str(raw.dtype).removeprefix('torch.')}{list(raw.shape)} on {raw.device}"


def require_float(owner: str, argument: str, raw: object) -> None:
    """Raise ``TypeError`` unless ``raw`` is a real floating-point tensor."""
    if not isinstance(raw, Tensor):
        raise TypeError(f"{owner}: {argument} must be a Tensor, got {type(raw).__name__}")
    if raw.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{owner}: {argument} must be float64, float32, bfloat16 or float16, got {describe(raw)}")
    if raw.layout != torch.strided:
        raise TypeError(f"{owner}: {argument} must be dense (strided), got {raw.layout}")
