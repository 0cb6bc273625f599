"""wx.Conditioned: what is kept for a condition, and everything that must make it be computed again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conditioned_small import ANGLES, F64, Scale, X, cnn, learning, plain
from torch import Tensor, nn
from torch.nn import functional as F

import weightxform as wx


def test_every_order_of_modes_at_the_same_condition_tensor() -> None:
    net = learning()
    conditions = [0.5, ANGLES.clone()]
    expected, grads = [], []
    for c in conditions:
        y = copy.deepcopy(net)(X, c)
        expected.append(y.detach())
        other = copy.deepcopy(net)
        other(X, c).square().sum().backward()
        grads.append([p.grad for p in other.transform_parameters()])
    modes: list[Callable[[], Any]] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    steps = list(itertools.product(modes, (0, 1), (True, False)))
    for pair in itertools.product(steps, steps):
        for mode, which, training in pair:
            net.train(training)
            with mode():
                y = net(X, conditions[which])
            torch.testing.assert_close(y, expected[which])
            if mode is torch.enable_grad:
                net.zero_grad()
                y.square().sum().backward()
                torch.testing.assert_close([p.grad for p in net.transform_parameters()], grads[which])


def test_a_graph_after_none_where_there_is_no_condition() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate(angle=nn.Parameter(torch.tensor(0.5, dtype=F64))))
    with torch.no_grad():
        net(X)
    net(X).sum().backward()
    assert all(p.grad is not None for p in net.transform_parameters())


@pytest.mark.parametrize("form", ["auto", "activation"])
def test_a_condition_tensor_that_is_written_behind_its_version(form: str) -> None:
    net, angles = wx.Conditioned(cnn(), wx.Rotate(), form=form), ANGLES.clone()
    with torch.no_grad():
        net(X, angles)
        angles.data.uniform_(-3, 3)
        torch.testing.assert_close(net(X, angles), plain(cnn(), X, angles))
        torch.testing.assert_close(net(X, ANGLES), plain(cnn(), X, ANGLES))  # kept, and not with the memory of then
    trained = learning(freeze=False)
    trained(X, angles)
    angles.data.uniform_(-3, 3)
    torch.testing.assert_close(trained(X, angles), copy.deepcopy(trained)(X, angles.clone()))


@pytest.mark.parametrize("leaf", [nn.Parameter, lambda a: a.requires_grad_()])
def test_a_fused_optimizer_of_the_condition(leaf: Any) -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    net(X, ANGLES + 1)
    angles = leaf(ANGLES.clone())
    optimizer = torch.optim.Adam([angles], 0.1, fused=True)
    for _ in range(2):
        y = net(X, angles)
        torch.testing.assert_close(y, plain(cnn(), X, angles))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()


def test_data_of_the_raw_weight_and_a_round_trip_of_dtypes() -> None:
    net, new = wx.Conditioned(cnn(), wx.Rotate()), torch.randn(3, 1, 3, 3, dtype=F64)
    other = cnn()
    other[0].weight.data = new
    with torch.no_grad():
        net(X, 0.5), net(X, 0.7)
        wx.raw(net.model[0]).data = new
        torch.testing.assert_close(net(X, 0.5), plain(other, X, 0.5))
        net.float().double()
        torch.testing.assert_close(net(X, 0.5), plain(other.float().double(), X, 0.5))


@pytest.mark.parametrize("form", ["auto", "activation"])
def test_what_inference_mode_kept_serves_a_gradient_of_the_input(form: str) -> None:
    net = wx.Conditioned(cnn(), wx.Rotate(), form=form)
    for c in (0.5, ANGLES):
        with torch.inference_mode():
            net(X, c)
        xs = [X.clone().requires_grad_() for _ in range(2)]
        net(xs[0], c).square().sum().backward()
        plain(cnn(), xs[1], c).square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)


def test_a_transform_with_dropout_is_not_kept_in_training_mode() -> None:
    class Dropped(nn.Module):
        def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
            return F.dropout(weights, 0.5, self.training)

    net = wx.Conditioned(cnn(), Dropped()).train()
    with torch.no_grad():
        assert not torch.equal(net(X, 0.5), net(X, 0.5))
        torch.testing.assert_close(net.eval()(X, 0.5), cnn()(X))


def test_modules_of_the_transform_that_are_replaced() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale()

        def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
            return self.inner(weights, condition)

    net = wx.Conditioned(cnn(), Gain())
    for rate in (0.5, 1.0):
        net.transform.inner = Scale().eval()
        net.transform.inner.rate.data.fill_(rate)
        other = copy.deepcopy(net)
        with torch.no_grad():
            torch.testing.assert_close(net(X, 0.5), other(X, 0.5), rtol=0, atol=0)
        net(X, 0.5).sum().backward()
        assert net.transform.inner.rate.grad is not None


def test_a_transform_that_writes_into_its_argument() -> None:
    class Writes(nn.Module):
        def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
            return weights.mul_(condition)

    with pytest.raises(RuntimeError, match="Writes wrote into the weight that it was given"):
        wx.Conditioned(cnn(), Writes())(X, 0.5)


def test_a_fused_optimizer_of_a_parameter_that_came_later() -> None:
    net = wx.Conditioned(cnn(), Scale())
    with torch.no_grad():
        net(X, 0.5)
        net.transform.rate = nn.Parameter(torch.tensor(0.2, dtype=F64))
        net(X, 0.5)
    net.transform.rate.grad = torch.ones_like(net.transform.rate)
    torch.optim.SGD([net.transform.rate], 1.0, fused=True).step()
    with torch.no_grad():
        torch.testing.assert_close(net(X, 0.5), copy.deepcopy(net)(X, 0.5), rtol=0, atol=0)
