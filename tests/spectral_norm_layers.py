"""Layers, and the two ways to put wx.SpectralNorm on one, for the tests of spectral normalization."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import weightxform as wx

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(3, 5, 3),
    "channels_last": lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(3, 5, 3),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(2, 3, 2),
}
STYLES = ("computed", "parametrize")
EXACT = {"rtol": 1e-11, "atol": 1e-12}
HALVES = (torch.bfloat16, torch.float16)

each_style = pytest.mark.parametrize("style", STYLES)
each_layer = pytest.mark.parametrize("layer", LAYERS)


def make(layer: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[layer]().to(dtype)


def axis(module: nn.Module) -> int:
    return int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))


def put(module: nn.Module, style: str, name: str = "weight", seed: int = 1, **options) -> nn.Module:
    """wx.SpectralNorm on ``module.<name>``: as a computed weight, or in torch's register_parametrization."""
    torch.manual_seed(seed)
    if style == "computed":
        raw = module._parameters[name]
        setattr(module, name, wx.ComputedParameter(raw, wx.SpectralNorm(**options)))
    else:
        if getattr(module, name).ndim > 1 and options.get("operator") != "conv":
            options.setdefault("dim", axis(module))
        parametrize.register_parametrization(module, name, wx.SpectralNorm(**options))
    return module


def put_torch(module: nn.Module, name: str = "weight", seed: int = 1, **options) -> nn.Module:
    torch.manual_seed(seed)
    return parametrizations.spectral_norm(module, name, **options)


def pair(layer: str, style: str, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's) on equal weights, from equal seeds."""
    module = make(layer, dtype)
    return put(copy.deepcopy(module), style, **options), put_torch(module, **options)


def raw(module: nn.Module, name: str = "weight") -> Tensor:
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original
    return module._parameters[name]


def transform(module: nn.Module, name: str = "weight") -> wx.SpectralNorm:
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name][0]
    return getattr(module, f"{name}_transform")


def vectors(module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    """u and v of ours or of torch's."""
    if parametrize.is_parametrized(module, name):
        norm = module.parametrizations[name][0]
        if not isinstance(norm, wx.SpectralNorm):
            return norm._u, norm._v
    norm = transform(module, name)
    return norm.u, norm.v


def write(module: nn.Module, amount: float = 0.1, seed: int = 2, name: str = "weight") -> None:
    """Change the raw weight in place, as an optimizer does."""
    target = raw(module, name)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64).to(target)
    with torch.no_grad():
        target.add_(noise, alpha=amount)


def input_for(module: nn.Module, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (4, module.in_features)
    else:
        shape = (2, module.in_channels, *(5,) * (raw(module).ndim - 2))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(raw(module).dtype)


def like(tensor: Tensor, seed: int = 4) -> Tensor:
    """A random upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def norm_of(weight: Tensor, dim: int = 0) -> float:
    """The largest singular value, by SVD."""
    matrix = weight.detach().double().movedim(dim, 0).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


def assert_same_vectors(ours: nn.Module, theirs: nn.Module, **tolerance) -> None:
    for a, b in zip(vectors(ours), vectors(theirs), strict=True):
        assert_close(a, b, **(tolerance or EXACT))


def assert_unit(module: nn.Module, tolerance: float = 1e-5) -> None:
    for x in vectors(module):
        assert float(x.double().norm()) == pytest.approx(1, abs=tolerance)
