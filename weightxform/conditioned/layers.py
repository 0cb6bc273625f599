"""The class of a layer whose weight follows a condition: its own, with a forward that knows of several weights."""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import cast_by_autocast
from ..swap import base_of, child_name, plain_of, set_slots, slots_of
from . import forms
from .condition import Given
from .select import CONVOLUTIONS, Layer
from .transform import FilterTransform
from .weight import ConditionedWeight

TORCHS = (*CONVOLUTIONS, nn.Linear)
_CHILD = child_name("weight")


class _Following(type):
    """The metaclass of what :func:`following` makes; a pickle makes it again."""


_classes: dict[type, _Following] = {}


class _Layer:
    """With one condition the layer's own forward; with several one of the forms of ``forms.py``."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = own_of(self)
        if own is not None:
            if not torch.compiler.is_compiling():
                own.owner.check_checkpoint()
            given = own.given()
            if given.count > 1 and _is_torchs(type(self)):
                return _several(self, own, given, input, *args, **kwargs)
            if given.count > 1:  # a forward of the user's, which knows of one weight
                forms.check_batch(self, input, given)
                forward = super().forward  # type: ignore[misc]

                def call(k: int, part: Any) -> Any:
                    with own.owner.using(given.only(k)):
                        return forward(*part[0], **part[1])

                return forms.each_in_turn(((input, *args), kwargs), given, call)
        return super().forward(input, *args, **kwargs)  # type: ignore[misc]


def own_of(layer: nn.Module) -> ConditionedWeight | None:
    """How the weight of ``layer`` follows the condition, if it does."""
    own = layer._modules.get(_CHILD) if "weight" in slots_of(layer) else None
    if type(own) is nn.Sequential:
        own = own[0]
    return own if isinstance(own, ConditionedWeight) else None


def refuse_more(layer: nn.Module, path: str) -> None:
    """Raise where another transform was put on top: what comes of it would not be computed for each condition."""
    if type(layer._modules.get(_CHILD)) is nn.Sequential:
        raise RuntimeError(
            f"Conditioned: another transform was put on {path}.weight, which follows a condition: make them one "
            "(wx.Rotate() + ..., a @ b, or an nn.Module that does both), and give it to wx.Conditioned"
        )


def check_tied(first: Layer, layer: Layer) -> None:
    """Raise where layers share a weight of which a transform would make two different ones."""

    def facts(of: Layer) -> tuple:
        return of.shape, *(getattr(of.module, name, None) for name in ("dilation", "groups", "transposed"))

    if facts(first) != facts(layer):
        raise ValueError(
            f"Conditioned: {first.path} and {layer.path} share one weight, and must be seen alike (shape, dilation, "
            f"groups, transposed), got {facts(first)} and {facts(layer)}: untie them, or choose one by layers="
        )


def _is_torchs(cls: type) -> bool:
    """Whether the layer computes as torch's own class does."""
    plain: Any = plain_of(base_of(cls))
    torchs: Any = next(c for c in TORCHS if issubclass(plain, c))
    return all(getattr(plain, n, None) is getattr(torchs, n, None) for n in ("forward", "_conv_forward"))


def _several(layer: Any, own: ConditionedWeight, given: Given, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    forms.check_batch(layer, x, given)
    transform = own.transform()
    form = own.owner.form
    if form in ("auto", "activation"):
        acts = isinstance(transform, FilterTransform) and transform.has_activation(own.seen(own.raw(layer)), layer)
        if form == "auto":
            form = "activation" if acts else forms.best(layer, transform, x, given)
    if form == "activation":
        if not torch.compiler.is_compiling():  # what reads the weight would see a write into it
            slots_of(layer)["weight"].weight.check_untouched("weight")
        y = _activation(layer, own, transform, given, x)
        if y is not None:
            return y.to(cast_by_autocast(y) or y.dtype)
        if own.owner.form == "activation":
            raise RuntimeError(
                f"Conditioned: form='activation' is not there for {type(transform).__name__} on a "
                f"{type(layer).__name__}; use 'auto', 'loop' or 'grouped'"
            )
        form = "grouped"
    weight = layer.weight
    if weight.ndim == own.raw(layer).ndim:  # nothing in it depends on a condition
        return forms.plain(layer, x, weight, *args, **kwargs)
    call = forms.looped if form == "loop" else forms.grouped
    return call(layer, x, weight, given, *args, **kwargs)


def _activation(layer: Any, own: ConditionedWeight, transform: Any, given: Given, x: Tensor) -> Tensor | None:
    if not isinstance(transform, FilterTransform):
        return None
    weight = own.seen(own.raw(layer))
    if transform.has_activation(weight, layer):
        return transform.activation(layer, x, weight, given.values, given.rows())
    view = transform.linear()
    if view is None:
        return None
    matrix = transform.whole_matrix(given.values, weight)
    matrix = matrix.expand(given.count, *matrix.shape[1:])
    return forms.on_patches(layer, x, weight, matrix, view, given)


def following(base: type) -> _Following:
    """The class for a layer of class ``base``; there is one for each."""
    if base not in _classes:
        members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[base] = _Following(base.__name__, (_Layer, base), {**members, "__wx_plain__": base})
    return _classes[base]


copyreg.pickle(_Following, lambda cls: (following, (vars(cls)["__wx_plain__"],)))


def follow(layer: nn.Module) -> None:
    """Give a plain layer the class."""
    layer.__class__ = following(type(layer))  # type: ignore[assignment]


def leave(layer: nn.Module) -> None:
    """Make a layer plain again: no transform, no class; its parameter stays."""
    del layer._modules[_CHILD]
    slots_of(layer)["weight"].forget()
    set_slots(layer, {k: s for k, s in slots_of(layer).items() if k != "weight"})
