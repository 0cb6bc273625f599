"""What is true of weight normalization alone; tests/test_ops.py has its cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations

import weightxform as wx
from weightxform.weight_norm import reference
from weightxform.weight_norm.function import apply


@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 0), ((4, 6), 1), ((3, 2, 2, 2), 1), ((5,), 0)], ids=str)
def test_derivatives_of_every_order_and_mode(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.rand(shape[dim], dtype=torch.float64, requires_grad=True)

    def f(weight: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return apply(weight, g, dim, None)[0]

    torch.testing.assert_close(f(weight, g), reference.apply(weight, g, dim))
    assert gradcheck(f, (weight, g), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (weight, g), check_fwd_over_rev=True)


def test_training_equals_torchs() -> None:
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for i in (0, 2):
        ours[i].weight = wx.ComputedParameter(ours[i].weight, wx.WeightNorm())
        parametrizations.weight_norm(theirs[i])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for _ in range(5):
        x, target = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(nn.functional.mse_loss(model(x), target))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


def test_attaching_and_assigning_keep_the_value() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    layer.weight = wx.ComputedParameter(layer.weight, wx.WeightNorm())
    torch.testing.assert_close(layer.weight, before)
    wx.assign(layer, "weight", 2 * before)
    torch.testing.assert_close(layer.weight, 2 * before)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_transform.g"]


def test_a_row_of_zeros() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    weight[1] = 0
    weight.requires_grad_()
    g = torch.rand(3, dtype=torch.float64)
    out, norms = apply(weight, g, 0, None)
    assert torch.equal(out[1], torch.zeros(4, dtype=torch.float64)) and norms[1] == 1
    upstream = torch.randn_like(out)
    out.backward(upstream)
    torch.testing.assert_close(weight.grad[1], g[1] * upstream[1])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: wx.WeightNorm(dim="0"), TypeError, "dim must be an int, got '0'"),
        (lambda: wx.WeightNorm(dim=2).attach(torch.randn(3, 3)), IndexError, r"dim must be in \[-2, 1\]"),
        (lambda: wx.WeightNorm().attach(torch.ones(3, dtype=torch.int64)), TypeError, "must be float64"),
        (lambda: wx.WeightNorm()(torch.randn(3)), RuntimeError, "not attached"),
    ],
)
def test_errors(make, kind, message) -> None:
    with pytest.raises(kind, match=message):
        make()
