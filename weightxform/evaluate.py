"""Any module as a transform: a ``Transform``, a plain module, or an ``nn.Sequential`` of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ._torch import autocast_dtype
from .transform import Transform


def evaluate(transform: nn.Module, raw: Tensor | None, advance: bool) -> Tensor:
    """The computed weight. ``raw`` is ``None`` for a module that owns its parameters."""
    if isinstance(transform, Transform):
        assert raw is not None
        return transform.compute(raw, advance)
    if isinstance(transform, nn.Sequential):
        return _chain(list(transform), raw, advance)
    return transform() if raw is None else transform(raw)


def _chain(links: list[nn.Module], raw: Tensor | None, advance: bool) -> Tensor:
    """Only the last link may cast to the dtype of autocast: the others are followed by more arithmetic."""
    kind = "cpu" if raw is None else raw.device.type
    value = raw
    if autocast_dtype(kind) is not None:
        with torch.autocast(kind, enabled=False):
            for link in links[:-1]:
                value = evaluate(link, value, advance)
        links = links[-1:]
    for link in links:
        value = evaluate(link, value, advance)
    assert value is not None
    return value


def attach(transform: nn.Module, raw: Tensor | None, module: nn.Module, name: str) -> None:
    """Let the transform check and create its state; raises before anything is changed."""
    if isinstance(transform, Transform):
        if raw is None:
            kind = type(transform).__name__
            raise TypeError(f"ComputedParameter: {kind} needs a raw tensor: ComputedParameter(raw, transform)")
        transform.check_alone()
        transform.attach(raw, module, name)
    elif isinstance(transform, nn.Sequential):
        if not len(transform):
            raise ValueError("ComputedParameter: a Sequential of transforms must not be empty")
        value = raw
        for i, link in enumerate(transform):
            attach(link, value, module, name)
            if i + 1 < len(transform):
                with torch.no_grad():
                    value = evaluate(link, value, False)


def reset(transform: nn.Module, raw: Tensor | None) -> None:
    """Make the state fit ``raw``, whose value was replaced."""
    if isinstance(transform, Transform):
        assert raw is not None
        transform.reset(raw)
    elif isinstance(transform, nn.Sequential) and any(isinstance(link, Transform) for link in transform.modules()):
        value = raw
        with torch.no_grad():
            for link in transform:
                reset(link, value)
                value = evaluate(link, value, False)


def right_inverse(transform: nn.Module, value: Tensor) -> Tensor:
    """A raw tensor that gives ``value``; ``RuntimeError`` where the transform has none."""
    if isinstance(transform, nn.Sequential):
        for link in reversed(transform):
            value = right_inverse(link, value)
        return value
    inverse = getattr(transform, "right_inverse", None)
    if inverse is None:
        raise RuntimeError(f"{type(transform).__name__} has no right inverse: assign wx.raw(module, name) instead")
    return inverse(value)


def keeps_graph(transform: nn.Module) -> bool:
    if isinstance(transform, nn.Sequential):
        return all(keeps_graph(link) for link in transform)
    return isinstance(transform, Transform) and transform.keeps_graph


def caches(transform: nn.Module) -> bool:
    if isinstance(transform, nn.Sequential):
        return all(caches(link) for link in transform)
    return not isinstance(transform, Transform) or transform.cache


def state_reader(transform: nn.Module) -> Callable[[], Iterable[Tensor]]:
    """A function that lists the tensors, besides raw, that the weight depends on. It runs at every read."""
    if isinstance(transform, Transform) and type(transform).state is not Transform.state:
        return transform.state
    dicts = [d for m in transform.modules() for d in (m._parameters, m._buffers) if d]

    def read() -> list[Tensor]:
        return [t for d in dicts for t in d.values() if t is not None]

    return read
