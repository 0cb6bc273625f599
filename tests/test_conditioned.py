"""wx.Conditioned: what its numbers and gradients are, against plain torch.func.functional_call with grid_sample."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conditioned_models import Digits, conditioned, digits, inputs, plain, turned
from torch import Tensor, nn
from torch.nn import functional as F

import weightxform as wx

__all__ = ["digits"]  # a fixture


def test_the_flattened_linear_is_found_and_one_tap_is_left_alone(digits: nn.Module) -> None:
    assert conditioned(digits).names == ("first", "second", "fc")


@pytest.mark.parametrize("form", ["auto", "loop", "grouped", "activation"])
def test_each_sample_its_own_angle(digits: nn.Module, form: str) -> None:
    x, angles = inputs()
    net = conditioned(digits, form=form)
    ours, theirs = (a.clone().requires_grad_() for a in (angles, angles))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = net(xs[0], ours), plain(digits, xs[1], theirs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("form", ["auto", "loop", "grouped", "activation"])
def test_equal_angles_are_computed_once(digits: nn.Module, form: str) -> None:
    x, angles = inputs()
    net = conditioned(digits, form=form)
    repeated = angles[[2, 0, 2, 2, 0, 1]]
    torch.testing.assert_close(net(x, repeated), plain(digits, x, repeated))
    with net.at(repeated, batch=6):
        assert net.model.first.weight.shape == (3, 6, 1, 5, 5)
    torch.testing.assert_close(net(x, repeated[:1].expand(6)), plain(digits, x, repeated[:1].expand(6)))
    net.deduplicate = False
    torch.testing.assert_close(net(x, repeated), plain(digits, x, repeated))


@pytest.mark.parametrize("angle", [0.7, torch.tensor(0.7, dtype=torch.float64), {"angle": 0.7}, torch.tensor([0.7])])
def test_one_angle_for_the_batch(digits: nn.Module, angle: Any) -> None:
    x, _ = inputs()
    net = conditioned(digits)
    expected = plain(digits, x, torch.full((6,), 0.7, dtype=torch.float64))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if isinstance(angle, Tensor) and angle.dtype == torch.float32 else {}
    torch.testing.assert_close(net(x, angle), expected, **tolerance)
    with net.at(angle):
        assert net.model.first.weight.shape == digits.first.weight.shape


def test_one_condition_is_one_plain_convolution(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                calls.append(args[8])
            return func(*args, **(kwargs or {}))

    with Count():
        net(x, angles[:1].expand(6))
    assert calls == [1, 2, 1]  # the layers' own groups


def test_gradients_of_a_base_that_is_not_frozen(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits, freeze=False)
    other = copy.deepcopy(digits)
    y, expected = net(x, angles), plain(other, x, angles)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for (name, p), q in zip(net.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_frozen_base_gets_no_gradient_and_keeps_its_statistics(digits: nn.Module) -> None:
    x, angles = inputs()
    net = wx.Conditioned(copy.deepcopy(digits), wx.Rotate() + wx.LearnedResidual(), sample=x).train()
    net(x, angles).sum().backward()
    assert all(p.grad is None for p in digits.parameters())
    ours = list(net.transform_parameters())
    assert ours and any(bool(p.grad.any()) for p in ours if p.grad is not None)
    assert {id(p) for p in net.parameters() if p.grad is not None} <= set(map(id, ours))
    torch.testing.assert_close(net.model.norm.running_mean, digits.norm.running_mean, rtol=0, atol=0)
    assert net.model.drop.training and not net.model.norm.training


def test_training_moves_what_a_residual_can_learn(digits: nn.Module) -> None:
    """The residual learns that filters should be mirrored, which no angle does."""
    torch.manual_seed(0)
    x, _ = inputs(4)
    net = wx.Conditioned(copy.deepcopy(digits), wx.LearnedResidual(harmonics=1), layers=["first"])
    target = nn.functional.conv2d(x, digits.first.weight.flip(-1), digits.first.bias).detach()
    optimizer = torch.optim.Adam(net.transform_parameters(), 0.05)

    def loss() -> Tensor:
        with net.at(0.3):
            return (net.model.first(x) - target).square().mean()

    before = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 0.01 * before


class Forum(nn.Module):
    """The question's own network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 9, bias=False)

    def forward(self, weights: Tensor, condition: Any) -> Tensor:
        param = condition["angle"] if isinstance(condition, Mapping) else condition
        rows = weights.reshape(-1, 9)
        return self.linear(torch.cat([rows, param.reshape(1, 1).expand(len(rows), 1)], 1)).reshape(weights.shape)


@pytest.mark.parametrize("named", [False, True])
def test_the_network_of_the_question(named: bool) -> None:
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    other, own = copy.deepcopy(cnn), Forum()
    net = wx.Conditioned(cnn, own)
    x, angles = torch.randn(4, 1, 9, 9), torch.rand(4)
    y = net(x, {"angle": angles} if named else angles)
    y.sum().backward()
    ours = own.linear.weight.grad.clone()
    own.zero_grad()
    expected = torch.cat(
        [
            torch.func.functional_call(
                other, {n: own(other.get_parameter(n), a) for n in ("0.weight", "2.weight")}, (x[k : k + 1],)
            )
            for k, a in enumerate(angles)
        ]
    )
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    torch.testing.assert_close(ours, own.linear.weight.grad)
    assert list(net.transform_parameters()) == [own.linear.weight]


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
@pytest.mark.parametrize("form", ["loop", "grouped"])
def test_every_kind_of_convolution(kind: str, form: str) -> None:
    torch.manual_seed(0)
    axes = int(kind[-2])
    layer = getattr(nn, kind)(4, 6, 3, stride=2, padding=1, dilation=1, groups=2).double()
    own = Scaled()
    net = wx.Conditioned(nn.Sequential(copy.deepcopy(layer)), own, form=form)
    x, c = torch.randn(3, 4, *[7] * axes, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = [
        torch.func.functional_call(layer, {"weight": own(layer.weight, a)}, (x[k : k + 1],)) for k, a in enumerate(c)
    ]
    torch.testing.assert_close(net(x, c), torch.cat(expected))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
        return weights * torch.exp(self.rate * condition)


def test_output_size_of_a_transposed_convolution_and_other_padding() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double()
    around = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dilation=1).double()
    x, c = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for form in ("loop", "grouped"):
        net = wx.Conditioned(nn.ModuleList([copy.deepcopy(up), copy.deepcopy(around)]), Scaled(), form=form)
        with net.at(c, batch=3):
            y, z = net.model[0](x, output_size=[16, 16]), net.model[1](x)
        own = net.transform
        for k, a in enumerate(c):
            one = F.conv_transpose2d(x[k : k + 1], own(up.weight, a), up.bias, 2, 1, 1)
            torch.testing.assert_close(y[k : k + 1], one)
            torch.testing.assert_close(
                z[k : k + 1], torch.func.functional_call(around, {"weight": own(around.weight, a)}, (x[k : k + 1],))
            )


def test_bake_and_unwrap(digits: nn.Module) -> None:
    x, _ = inputs()
    keys = list(digits.state_dict())
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.1)
    plain_model = net.bake(0.8)
    assert type(plain_model) is Digits and type(plain_model.first) is nn.Conv2d
    assert list(plain_model.state_dict()) == keys
    assert all(p.requires_grad for p in plain_model.parameters())
    torch.testing.assert_close(plain_model(x), net(x, 0.8), rtol=0, atol=0)
    before = net(x, 0.0)
    with torch.no_grad():
        plain_model.first.weight.zero_()
    torch.testing.assert_close(net(x, 0.0), before, rtol=0, atol=0)
    model = net.unwrap()
    assert model is digits and type(model.first) is nn.Conv2d and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_tied_layers_share_one_map(digits: nn.Module) -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    net = wx.Conditioned(nn.Sequential(first, second), wx.Rotate() + wx.LearnedResidual())
    assert first.weight_transform is second.weight_transform
    assert net(torch.randn(2, 3, 6, 6), 0.3).shape == (2, 3, 6, 6)
    with net.at(0.3):
        assert first.weight is second.weight


def test_a_hook_and_a_subclass_of_a_layer(digits: nn.Module) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    layer = Doubled(1, 2, 3).double()
    x, angles = inputs(3)
    net = wx.Conditioned(nn.Sequential(copy.deepcopy(layer)), wx.Rotate())
    seen = []
    net.model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    y = net(x, angles)
    expected = [2 * F.conv2d(x[k : k + 1], turned(layer.weight, a), layer.bias) for k, a in enumerate(angles)]
    torch.testing.assert_close(y, torch.cat(expected))
    assert seen == [(3, 2, 15, 15)]
    assert type(pickle.loads(pickle.dumps(wx.Conditioned(nn.Sequential(nn.Conv2d(1, 2, 3)), wx.Rotate()))).model[0])
