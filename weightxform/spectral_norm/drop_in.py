"""``wx.spectral_norm``: the drop-in for torch's."""

from __future__ import annotations

from torch import nn

from ..checks import require_int
from ..computed import ComputedParameter, is_computed
from .module import SpectralNorm


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Drop-in for ``torch.nn.utils.parametrizations.spectral_norm``: same arguments, iterates and errors.

    Args:
        module: the owner of the weight; it is changed in place.
        name: of a Parameter of ``module``. On one that is computed already the norm goes on top, as with torch's.
        n_power_iterations, eps, dim: as in :class:`SpectralNorm`; at least one iteration.

    Returns:
        ``module``. ``module.weight`` now reads weight / sigma; the raw tensor keeps its name in ``state_dict``.

    Unlike torch's, power iteration runs once per value of the raw weight and not once per read
    (``wx.SpectralNorm(cache=False)`` does that), complex weights are refused, and so are buffers.

    Raises:
        ValueError: no Parameter of that name, or ``n_power_iterations`` below 1.
        IndexError: ``dim`` is no axis of the weight.
        TypeError: an argument of the wrong type, or a weight that is not real floating point.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"spectral_norm: module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"spectral_norm: name must be a str, got {name!r}")
    raw = getattr(module, name) if is_computed(module, name) else module._parameters.get(name)
    if raw is None:
        there = [n for n, p in module._parameters.items() if p is not None]
        raise ValueError(f"spectral_norm: name must be that of a Parameter of {module} ({there}), got {name!r}")
    require_int("spectral_norm", "n_power_iterations", n_power_iterations, 1)
    setattr(module, name, ComputedParameter(raw, SpectralNorm(n_power_iterations, eps, dim)))
    return module
