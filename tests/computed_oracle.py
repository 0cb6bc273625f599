"""What a computed weight must be, in plain torch and independent of the package: for test_computed_*.py.

State is set to unit vectors that have not converged, so that one power iteration more or less shows.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

import weightxform as wx

State = tuple[Tensor, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def randn_like(x: Tensor, seed: int = 0) -> Tensor:
    return randn(*x.shape, seed=seed, dtype=x.dtype)


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x)


def matrix(weight: Tensor, dim: int = 0) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


def iterated(weight: Tensor, state: State, times: int = 1, dim: int = 0) -> State:
    """``times`` power iterations, u first."""
    w = matrix(weight.detach(), dim)
    u, v = state
    for _ in range(times):
        u = unit(w @ v)
        v = unit(w.T @ u)
    return u, v


def normalized(weight: Tensor, state: State, dim: int = 0) -> Tensor:
    """weight / u'Wv, differentiable in weight with u and v frozen."""
    u, v = state
    return weight / (u @ matrix(weight, dim) @ v)


def sigma(weight: Tensor) -> Tensor:
    """Its spectral norm, by SVD."""
    return torch.linalg.svdvals(weight.detach().flatten(1))[0]


def transform_of(layer: nn.Module, name: str = "weight") -> nn.Module:
    return layer.get_submodule(f"{name}_transform")


def state_of(layer: nn.Module, name: str = "weight") -> State:
    """A copy of (u, v)."""
    transform = transform_of(layer, name)
    return transform.u.clone(), transform.v.clone()


def unsettle(model: nn.Module, seed: int = 7) -> nn.Module:
    """Replace every u and v by random unit vectors."""
    g = generator(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, wx.SpectralNorm):
                for x in (module.u, module.v):
                    if x is not None:
                        x.copy_(unit(torch.randn(x.shape, generator=g, dtype=torch.float64)))
    return model


def iterations(before: State, after: State, weight: Tensor, dim: int = 0, most: int = 3) -> int:
    """How many power iterations of ``weight`` lead from one state to the other; fails where no number does."""
    for n in range(most + 1):
        expected = iterated(weight, before, n, dim)
        if all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(expected, after, strict=True)):
            return n
    raise AssertionError(f"the state is not the result of 0 to {most} power iterations")


def computed(layer: nn.Module, name: str = "weight", **options: object) -> nn.Module:
    """``layer`` with a spectrally normalised weight whose state has not converged."""
    setattr(layer, name, wx.ComputedParameter(getattr(layer, name), wx.SpectralNorm(**options)))
    return unsettle(layer)


def linear(inputs: int = 6, outputs: int = 4, seed: int = 0, dtype=torch.float64, **options: object) -> nn.Linear:
    """A Linear layer with a spectrally normalised weight whose state has not converged."""
    torch.manual_seed(seed)
    return computed(nn.Linear(inputs, outputs, dtype=dtype), **options)


def net(seed: int = 0) -> nn.Sequential:
    """Two such layers."""
    return nn.Sequential(linear(seed=seed), nn.Tanh(), linear(4, 3, seed=seed + 1))


def through_torch_save(value: object, weights_only: bool = False) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def set_raw(layer: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Write the raw weight the way that every version counter sees."""
    with torch.no_grad():
        wx.raw(layer, name).copy_(value)


def plain_loss(w: Tensor, b: Tensor, state: State, x: Tensor) -> Tensor:
    """What a Linear layer computes from a given state, as a function of its raw weight and its bias."""
    return nn.functional.linear(x, normalized(w, state), b)


def leaves(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Copies of its raw weight and its bias, each a leaf."""
    return wx.raw(layer).detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()


def check_grads(layer: nn.Linear, w: Tensor, b: Tensor) -> None:
    """Its gradients are those of the leaves."""
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    torch.testing.assert_close(layer.bias.grad, b.grad)


def is_normalized_raw(layer: nn.Module) -> None:
    """The weight read now is that of the present raw tensor and state (a cached weight has been advanced already)."""
    torch.testing.assert_close(layer.weight.detach(), normalized(wx.raw(layer).detach(), state_of(layer)))


class Recorder(wx.Transform):
    """2 raw, with a note of every computation: its ``advance`` flag."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bool] = []

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        self.calls.append(advance)
        return 2 * raw

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


class Symmetric(nn.Module):
    """A transform that is a plain module: the symmetric part, through plain autograd (it saves nothing)."""

    def forward(self, raw: Tensor) -> Tensor:
        return (raw + raw.T) / 2


class Squashed(nn.Module):
    """A transform that is a plain module and whose backward reads saved tensors."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw.tanh() * raw.exp()
