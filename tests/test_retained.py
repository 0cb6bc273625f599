"""Transforms in plain autograd: any number of forwards and backwards through one computed weight."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import randn, set_raw
from torch import Tensor, nn

import weightxform as wx


class Scaled(nn.Module):
    """tanh(raw) * scale: it saves tensors, and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(randn(4, 1, seed=5))
        self.calls = 0

    def forward(self, raw: Tensor) -> Tensor:
        self.calls += 1
        return raw.tanh() * self.scale


def scaled() -> tuple[nn.Linear, Scaled]:
    layer, transform = nn.Linear(6, 4, dtype=torch.float64), Scaled()
    layer.weight = wx.ComputedParameter(layer.weight, transform)
    return layer, transform


def leaves(layer: nn.Linear, transform: Scaled) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in (wx.raw(layer), transform.scale)]


def test_two_forwards_then_two_backwards_compute_once():
    layer, transform = scaled()
    raw, scale = leaves(layer, transform)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    first, second = layer(x), layer(2 * x)
    first.backward(g), second.backward(g)
    layer(3 * x).backward(g)
    (nn.functional.linear(6 * x, raw.tanh() * scale)).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, raw.grad)
    torch.testing.assert_close(transform.scale.grad, scale.grad)
    assert transform.calls == 1


def test_second_derivatives():
    layer, transform = scaled()
    raw, scale = leaves(layer, transform)
    x, g, h = randn(3, 6), randn(3, 4, seed=1), randn(4, 6, seed=2)
    results = []
    for weight, inputs in ((layer.weight, [wx.raw(layer), transform.scale]), (raw.tanh() * scale, [raw, scale])):
        grads = torch.autograd.grad((x @ weight.T).sin(), inputs, g, create_graph=True)
        results.append(torch.autograd.grad((grads[0] * h).sum() + grads[1].exp().sum(), inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("which", ["raw", "scale"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_write_between_forward_and_backward_raises(which, fused):
    layer, transform = scaled()
    y = layer(randn(3, 6))
    tensor = wx.raw(layer) if which == "raw" else transform.scale
    tensor.grad = torch.ones_like(tensor)
    torch.optim.SGD([tensor], lr=0.1, fused=fused).step()
    with pytest.raises(RuntimeError, match=r"written between|modified by an inplace"):
        y.backward(randn(3, 4))
    layer(randn(3, 6)).backward(randn(3, 4))
    assert transform.calls == 2


class Affine(nn.Module):
    """raw + condition, whose condition is neither a parameter nor a leaf."""

    def __init__(self, condition: Tensor) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, raw: Tensor) -> Tensor:
        return raw * self.condition


def test_gradients_reach_tensors_that_the_transform_only_refers_to():
    angle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, Affine(angle.cos()))
    g = randn(4, 6, seed=2)
    layer.weight.backward(g)
    torch.testing.assert_close(angle.grad, -angle.detach().sin() * (g * wx.raw(layer).detach()).sum())
    torch.testing.assert_close(wx.raw(layer).grad, g * angle.detach().cos())


class Transposed(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.T


@pytest.mark.parametrize("transform", [Transposed, nn.Identity])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_view_of_the_raw_tensor_follows_it(transform, requires_grad):
    """A write to raw is then a write to the computed tensor, and no mistake."""
    layer = nn.Linear(5, 5, dtype=torch.float64)
    layer.weight.requires_grad_(requires_grad)
    layer.weight = wx.ComputedParameter(layer.weight, transform())
    for seed in range(3):
        set_raw(layer, randn(5, 5, seed=seed))
        torch.testing.assert_close(layer.weight.detach(), transform()(wx.raw(layer).detach()))
        if requires_grad:
            layer(randn(2, 5)).backward(randn(2, 5, seed=1))
            layer(randn(2, 5)).backward(randn(2, 5, seed=1))


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(randn(5, 2, seed=1)), nn.Parameter(randn(2, 5, seed=2))

    def forward(self) -> Tensor:
        return self.a @ self.b


def test_a_module_that_owns_its_parameters_can_be_stacked_baked_and_replaced():
    layer = nn.Linear(5, 5, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(Factors())
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    with pytest.raises(ValueError, match="no raw tensor"):
        wx.raw(layer)
    assert layer._parameters["weight"] is None and "weight" not in layer.state_dict()
    factors = layer.weight_transform[0]
    layer.eval()
    wx.refresh(layer)
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.weight.detach())[0], torch.ones(()).double(), rtol=1e-4, atol=0
    )
    layer.weight.backward(randn(5, 5))
    assert factors.a.grad is not None and factors.b.grad is not None
    expected = layer.weight.detach().clone()
    wx.bake(layer)
    assert type(layer) is nn.Linear and isinstance(layer._parameters["weight"], nn.Parameter)
    torch.testing.assert_close(layer.weight.detach(), expected)
    layer.weight = wx.ComputedParameter(Factors())
    layer.weight = nn.Parameter(expected)
    assert type(layer) is nn.Linear and layer.weight.is_leaf and not list(layer.children())


def test_something_that_is_no_tensor_raises():
    class Two(nn.Module):
        def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
            return raw, raw

    layer = nn.Linear(3, 3)
    layer.weight = wx.ComputedParameter(layer.weight, Two())
    with pytest.raises(TypeError, match="must be a Tensor, got tuple"):
        _ = layer.weight


def test_baking_tied_weights():
    def tied() -> nn.ModuleList:
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        model[1].weight = model[0].weight
        return wx.constrain(model, wx.SpectralNorm)

    model = tied()
    value = model[0].weight.detach().clone()
    wx.bake(model)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model[0].weight.detach(), value)

    model = tied().eval()
    raw, value = wx.raw(model[1]).detach().clone(), model[1].weight.detach().clone()
    wx.bake(model[0])
    torch.testing.assert_close(wx.raw(model[1]).detach(), raw)
    torch.testing.assert_close(model[1].weight.detach(), value)
    torch.testing.assert_close(model[0].weight.detach(), value)
