"""Checkpoints of torch's spectral_norm, in both of its forms, read and written.

::

    ours               parametrizations.spectral_norm               nn.utils.spectral_norm (hooks)
    weight             parametrizations.weight.original             weight_orig
    weight_transform.u parametrizations.weight.0._u                 weight_u
    weight_transform.v parametrizations.weight.0._v                 weight_v (before version 1: none, but weight)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import require_choice
from . import reference


def adopt(state_dict: MutableMapping[str, Any], prefix: str, name: str, axis: Callable[[Tensor], int]) -> None:
    """Rename torch's keys for the weight ``prefix + name`` to ours, in place; other keys are left alone.

    Args:
        axis: the ``dim`` of a weight; read only to solve for a v that is not there.

    Raises:
        RuntimeError: the checkpoint holds several parametrizations of that weight.
    """
    _adopt_parametrization(state_dict, prefix, name)
    _adopt_hook(state_dict, prefix, name, axis)


def _rename(state_dict: MutableMapping[str, Any], old: str, new: str) -> None:
    if old in state_dict:
        state_dict[new] = state_dict.pop(old)


def _adopt_parametrization(state_dict: MutableMapping[str, Any], prefix: str, name: str) -> None:
    theirs = f"{prefix}parametrizations.{name}."
    found = {key.removeprefix(theirs) for key in state_dict if key.startswith(theirs)}
    if "original" not in found:
        return
    if any(key.startswith("1.") for key in found):
        raise RuntimeError(
            f"{prefix}{name}: the checkpoint holds several parametrizations of this weight "
            f"({', '.join(sorted(found))}), which one SpectralNorm cannot load"
        )
    if found <= {"original", "0._u", "0._v"}:
        _rename(state_dict, theirs + "original", prefix + name)
        for vector in "uv":
            _rename(state_dict, f"{theirs}0._{vector}", f"{prefix}{name}_transform.{vector}")


def _adopt_hook(state_dict: MutableMapping[str, Any], prefix: str, name: str, axis: Callable[[Tensor], int]) -> None:
    weight = prefix + name
    if weight + "_orig" not in state_dict or weight + "_u" not in state_dict:
        return
    if weight + "_v" not in state_dict:  # version None
        raw, u = state_dict[weight + "_orig"], state_dict[weight + "_u"]
        state_dict[weight + "_v"] = _solve_v(raw, u, axis(raw))
    _rename(state_dict, weight + "_orig", weight)
    for vector in "uv":
        _rename(state_dict, f"{weight}_{vector}", f"{weight}_transform.{vector}")


@torch.no_grad()
def _solve_v(raw: Tensor, u: Tensor, dim: int) -> Tensor:
    """The unit v, in the row space of W, that the last iteration made u = Wv/|Wv| of."""
    v = torch.linalg.pinv(reference.as_matrix(raw, dim).double()) @ u.double()
    return (v / v.norm()).to(u.dtype)


def _members(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(prefix, name, transform) of every weight that a SpectralNorm computes; ``ValueError`` for a stack of them."""
    from .module import SpectralNorm

    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for child, transform in module.named_children():
            name = child.removesuffix("_transform")
            if name == child:
                continue
            if isinstance(transform, SpectralNorm):
                yield prefix, name, transform
            elif isinstance(transform, nn.Sequential) and any(isinstance(t, SpectralNorm) for t in transform):
                raise ValueError(f"torch_state_dict: {prefix}{name} has several transforms, which has no torch form")


def torch_state_dict(
    model: nn.Module, format: Literal["parametrizations", "hooks"] = "parametrizations"
) -> dict[str, Any]:
    """The ``state_dict`` of ``model`` with the keys that torch's own spectral_norm gives the same model.

    Args:
        model: its weights under :class:`weightxform.SpectralNorm` are translated, everything else is as it is.
        format: ``"parametrizations"``: of ``torch.nn.utils.parametrizations.spectral_norm``; ``"hooks"``: of
            ``torch.nn.utils.spectral_norm``. u and v take the dtype of their weight, as there.

    Raises:
        ValueError: ``format`` is neither, or a transform does what torch's cannot (bound, gain, operator="conv"; a
            vector under hooks).
    """
    require_choice("torch_state_dict", "format", format, ("parametrizations", "hooks"))
    members = list(_members(model))
    for prefix, name, transform in members:
        beyond = [
            option
            for option, used in (
                ("bound", transform.bound is not None),
                ("gain", transform.gain is not None or transform.fixed_gain != 1),
                ("operator='conv'", transform.operator == "conv"),
                ("a vector under hooks", format == "hooks" and transform.u is None),
            )
            if used
        ]
        if beyond:
            raise ValueError(f"torch_state_dict: torch's spectral_norm has no {', '.join(beyond)}: {prefix}{name}")
    state_dict = model.state_dict()
    for prefix, name, transform in members:
        weight = prefix + name
        raw = state_dict[weight]
        if format == "hooks":
            original, vectors = weight + "_orig", weight + "_"
            metadata = getattr(state_dict, "_metadata", {}).setdefault(prefix.removesuffix("."), {})
            metadata.setdefault("spectral_norm", {})[name + ".version"] = 1
        else:
            original, vectors = f"{prefix}parametrizations.{name}.original", f"{prefix}parametrizations.{name}.0._"
        _rename(state_dict, weight, original)
        for vector in "uv" if transform.u is not None else "":
            state_dict[vectors + vector] = state_dict.pop(f"{weight}_transform.{vector}").to(raw.dtype)
    return state_dict
