"""What may be done to a computed weight: bake, raw, assignment, and writes that would be lost."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import Recorder, Squashed, computed, iterations, linear, normalized, randn, sigma, state_of
from torch import nn

import weightxform as wx

# bake, raw, is_computed


@pytest.mark.parametrize("requires_grad", [True, False])
def test_bake_leaves_a_plain_parameter(requires_grad):
    layer = linear().eval()
    wx.raw(layer).requires_grad_(requires_grad)
    x = randn(3, 6)
    y, before, raw = layer(x), state_of(layer), wx.raw(layer).detach().clone()
    wx.bake(layer, "weight")
    assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    assert layer.weight.requires_grad == requires_grad and layer.weight.is_leaf
    assert set(layer.state_dict()) == {"weight", "bias"} and not wx.is_computed(layer, "weight")
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.weight.detach(), normalized(raw, before))
    computed(layer)  # a baked weight can be computed again
    assert wx.is_computed(layer)


def test_bake_in_training_mode_does_not_iterate():
    layer = linear()
    before, raw = state_of(layer), wx.raw(layer).detach().clone()
    wx.bake(layer)
    torch.testing.assert_close(layer.weight.detach(), normalized(raw, before))


def test_bake_one_of_two():
    layer = linear()
    layer.bias = wx.ComputedParameter(layer.bias, Recorder())
    weight = layer.weight.detach().clone()
    wx.bake(layer, "bias")
    assert wx.is_computed(layer, "weight") and not wx.is_computed(layer, "bias")
    torch.testing.assert_close(layer.weight.detach(), weight)
    assert "bias_transform" not in dict(layer.named_modules())


def test_names_that_are_not_computed_raise():
    plain, layer = nn.Linear(3, 3), linear()
    assert not wx.is_computed(plain) and not wx.is_computed(plain, "weight") and not wx.is_computed(layer, "bias")
    for call in (wx.raw, wx.bake):
        with pytest.raises(ValueError, match="weight"):
            call(plain, "weight")
        with pytest.raises(ValueError, match="nothing_here"):
            call(layer, "nothing_here")
    with pytest.raises(ValueError, match="weight"):
        wx.assign(plain, "weight", torch.zeros(3, 3))


# assignment


def test_assigning_a_tensor_raises_as_in_torch():
    layer = linear()
    raw = wx.raw(layer)
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.zeros(4, 6)
    assert wx.raw(layer) is raw and wx.is_computed(layer)


def test_assigning_a_parameter_sets_the_raw_tensor_and_costs_no_iteration():
    layer = linear()
    before = state_of(layer)
    new = nn.Parameter(randn(4, 6, seed=9))
    layer.weight = new
    assert wx.raw(layer) is new
    assert iterations(before, state_of(layer), new) == 0, "an assignment alone"
    weight = layer.weight
    assert iterations(before, state_of(layer), new) == 1
    torch.testing.assert_close(weight, normalized(new, state_of(layer)))


def test_assigning_a_parameter_in_eval_makes_the_state_fit():
    layer = linear().eval()
    value = torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.1], dtype=torch.float64)) @ randn(4, 6, seed=3)
    layer.weight = nn.Parameter(value)
    torch.testing.assert_close(sigma(layer.weight), torch.ones((), dtype=torch.float64), rtol=1e-3, atol=1e-3)
    before = state_of(layer)
    _ = layer.weight
    assert iterations(before, state_of(layer), value) == 0


@pytest.mark.parametrize("training", [True, False])
def test_assign_goes_through_the_right_inverse_and_resets_the_state(training):
    layer = linear().train(training)
    raw = wx.raw(layer)
    value = randn(4, 6, seed=11) * 3
    wx.assign(layer, "weight", value)
    assert wx.raw(layer) is raw, "in place: the optimizer keeps its parameter"
    torch.testing.assert_close(raw.detach(), value)
    torch.testing.assert_close(sigma(layer.weight), torch.ones((), dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_assign_without_a_right_inverse_raises_and_changes_nothing():
    layer = nn.Linear(4, 4)
    layer.weight = wx.ComputedParameter(layer.weight, Squashed())
    before = wx.raw(layer).detach().clone()
    with pytest.raises(RuntimeError, match="right inverse"):
        wx.assign(layer, "weight", torch.zeros(4, 4))
    torch.testing.assert_close(wx.raw(layer).detach(), before)


@pytest.mark.parametrize("value", [torch.zeros(3, 3), torch.zeros(4, 6, dtype=torch.int64), "weight", None])
def test_assign_of_something_else_raises(value):
    layer = linear()
    before = wx.raw(layer).detach().clone()
    with pytest.raises((ValueError, TypeError), match=r"assign|value|weight"):
        wx.assign(layer, "weight", value)
    torch.testing.assert_close(wx.raw(layer).detach(), before)


def test_assigning_none_reads_none():
    layer = linear()
    layer.weight = None
    assert layer.weight is None and layer._parameters["weight"] is None


# writes that would be lost


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_write_into_the_computed_tensor_raises_at_the_next_read(cache, training):
    layer = linear(cache=cache).train(training)
    nn.init.orthogonal_(layer.weight)
    with pytest.raises(RuntimeError, match=r"written|in place|computed"):
        _ = layer.weight
    with pytest.raises(RuntimeError):
        layer(randn(2, 6))
    wx.invalidate(layer)
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


def test_data_of_the_computed_tensor_replaced_is_seen():
    layer = linear()
    layer.weight.data = torch.zeros(4, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"written|in place|computed|replaced"):
        _ = layer.weight


def test_init_through_apply_reset_parameters_and_raw():
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)
            with torch.no_grad():
                module.weight[0, 0] = 7.0

    model = nn.Sequential(linear(), nn.ReLU(), linear(4, 3)).eval()
    model.apply(init)
    for layer in (model[0], model[2]):
        assert wx.raw(layer)[0, 0] == 7.0 and wx.raw(layer)[1, 1] == 0.5
        torch.testing.assert_close(sigma(layer.weight), torch.ones((), dtype=torch.float64), rtol=1e-3, atol=1e-3)

    layer = linear().eval()
    before = wx.raw(layer).detach().clone()
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    plain = nn.Linear(6, 4, dtype=torch.float64)
    torch.testing.assert_close(wx.raw(layer), plain.weight)
    assert not torch.equal(wx.raw(layer), before)
    torch.testing.assert_close(sigma(layer.weight), torch.ones((), dtype=torch.float64), rtol=1e-2, atol=1e-2)

    nn.init.eye_(wx.raw(layer))
    torch.testing.assert_close(layer.weight, normalized(torch.eye(4, 6, dtype=torch.float64), state_of(layer)))
