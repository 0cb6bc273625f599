"""Computed weights after what moves no version counter: ``p.data = x``, and an option that is set on the transform."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from computed_oracle import Recorder, linear, normalized, randn, state_of, transform_of, unit
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import weightxform as wx


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, raw: Tensor) -> Tensor:
        return raw * self.rate


def with_gain() -> nn.Module:
    return nn.Sequential(wx.WeightNorm(), Gain())


TRANSFORMS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": wx.WeightNorm,
    "spectral_norm": lambda: wx.SpectralNorm(learn_gain=True),
    "plain": Gain,
    "sequential": with_gain,
}


def model_of(make: Callable[[], nn.Module], grouped: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    if grouped:
        return wx.constrain(model, lambda module, path: make())
    for layer in (model[0], model[2]):
        layer.weight = wx.ComputedParameter(layer.weight, make())
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_data_of_a_parameter_or_buffer_of_the_transform(kind: str, grouped: bool, training: bool) -> None:
    model, x = model_of(TRANSFORMS[kind], grouped).train(training), randn(3, 5)
    before = model(x)
    for which in (0, 2):
        for k, tensor in enumerate([*transform_of(model[which]).parameters(), *transform_of(model[which]).buffers()]):
            new = randn(tensor.numel(), seed=5 + k).reshape(tensor.shape)
            tensor.data = unit(new) if new.ndim else new
            after = model(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, copy.deepcopy(model).eval()(x))  # and no step was taken
            before = after


def test_all_parameters_from_a_vector_after_every_step() -> None:
    """The raw tensors and those of the transform at once: what would be computed again in one go must see both."""
    model, x = model_of(lambda: wx.SpectralNorm(learn_gain=True), True), randn(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        transform_of(model[0]).u.data = unit(randn(5, seed=step))
        parameters = list(model.parameters())
        vector_to_parameters(parameters_to_vector(parameters) * 1.5, parameters)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_data_of_the_raw_tensor_that_lies_where_it_lay() -> None:
    layer = nn.Linear(4, 4, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, Recorder())
    before = layer.weight.detach().clone()
    raw = wx.raw(layer)
    raw.data = raw.data.T
    torch.testing.assert_close(layer.weight, before.T)


def test_data_of_a_spectrally_normalized_raw_tensor_and_its_state() -> None:
    layer = linear().eval()
    _ = layer.weight
    transform_of(layer).v.data = unit(randn(6, seed=9))
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


# options


class Power(wx.Transform):
    def __init__(self) -> None:
        super().__init__()
        self.power, self.computed = 1.0, []  # a list, so that noting is no option

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        self.computed.append(self.power)
        return raw.abs() ** self.power


def powered() -> tuple[nn.Linear, Power]:
    layer, transform = nn.Linear(3, 2, dtype=torch.float64), Power()
    layer.weight = wx.ComputedParameter(layer.weight, transform)
    return layer, transform


@pytest.mark.parametrize("inside", [False, True])
def test_an_option_that_is_set_is_seen(inside: bool) -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    power = Power()
    layer.weight = wx.ComputedParameter(layer.weight, nn.Sequential(power, nn.Identity()) if inside else power)
    _ = layer.weight
    power.power = 2.0
    torch.testing.assert_close(layer.weight, wx.raw(layer).square())


def test_an_option_of_another_transform_costs_no_computation() -> None:
    (layer, power), (other, another) = powered(), powered()
    _ = layer.weight, other.weight
    for value in (2.0, 3.0):
        another.power = value
        _ = layer.weight, other.weight
    layer.train(not layer.training).train(not layer.training)
    _ = layer.weight
    assert power.computed == [1.0] and another.computed == [1.0, 2.0, 3.0]


def test_options_of_a_copy_are_old() -> None:
    layer, power = powered()
    vars(power)["_wx_set"] = 2**62  # as in a process that set more
    twin = copy.deepcopy(layer)
    _ = twin.weight, twin.weight
    assert transform_of(twin).computed == [1.0]
