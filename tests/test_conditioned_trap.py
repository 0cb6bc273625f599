"""wx.Conditioned: writes that would be lost and values that would be old, each seen or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conditioned_small import ANGLES, F64, Scale, X, cnn, learning
from torch import Tensor, nn
from torch.nn.utils import parametrize, vector_to_parameters

import weightxform as wx


class Times(nn.Module):
    def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
        return weights * condition


def fresh(net: wx.Conditioned, condition: Any) -> Tensor:
    return copy.deepcopy(net)(X, condition)


@torch.no_grad()
@pytest.mark.parametrize("condition", [0.3, ANGLES], ids=["one", "each"])
def test_data_of_the_parameters_of_the_transform(condition: Any) -> None:
    net = learning()
    before = net(X, condition)
    parameters = list(net.transform_parameters())
    vector_to_parameters(torch.randn(sum(p.numel() for p in parameters), dtype=F64), parameters)
    after = net(X, condition)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, fresh(net, condition))
    raw = wx.raw(net.model[0])
    raw.data = raw.data.transpose(2, 3)  # where it lay
    torch.testing.assert_close(net(X, condition), fresh(net, condition))


@torch.no_grad()
def test_a_kept_weight_that_was_written_is_not_served() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    before = net(X, 0.1)
    for write in (Tensor.zero_, lambda w: setattr(w, "data", torch.zeros_like(w))):
        with net.at(0.1):
            weight = net.model[0].weight
        net(X, 0.5)
        write(weight)
        torch.testing.assert_close(net(X, 0.1), before, rtol=0, atol=0)


def test_an_option_that_is_set_on_the_transform() -> None:
    net, condition = wx.Conditioned(cnn(), wx.Rotate() + wx.Rotate(angle=0.2)), 0.5
    before = net(X, condition)
    for module in net.modules():
        if isinstance(module, wx.Rotate):
            module.interpolation = "bicubic"
    assert not torch.equal(net(X, condition), before)
    torch.testing.assert_close(net(X, condition), fresh(net, condition))
    layer = cnn()[0]
    layer.weight = wx.ComputedParameter(layer.weight, wx.Rotate(angle=0.3))
    old = layer(X)
    layer.weight_transform.interpolation = "bicubic"
    assert not torch.equal(layer(X), old)


def test_dropout_of_a_filter_transform_goes_with_the_mode() -> None:
    class Dropped(wx.FilterTransform):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout()

        def needs(self) -> Any:
            return {"angle": ()}

        def at(self, weight: Tensor, conditions: Any, dtype: Any = None) -> Tensor:
            return self.inner(weight)[None]

    net = wx.Conditioned(cnn(), Dropped()).train()
    net(X, 0.1)
    torch.testing.assert_close(net.eval()(X, 0.1), cnn()(X))


def test_another_batch_size_under_compile() -> None:
    net = wx.Conditioned(cnn(), Scale())
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for size in (4, 3):
        torch.testing.assert_close(compiled(X[:size], ANGLES[:size]), net(X[:size], ANGLES[:size]))


@pytest.mark.parametrize("transform", [wx.Rotate, lambda: wx.LowRank(1)], ids=["grouped", "activation"])
def test_data_of_the_computed_weight(transform: Any) -> None:
    net = wx.Conditioned(cnn(), transform())
    rule = r"a map of the weight belongs in the transform of wx.Conditioned\(model, transform\)"
    with pytest.raises(RuntimeError, match=f"no condition yet: .*{rule}"):
        net.model[0].weight.data = torch.zeros(3, 1, 3, 3, dtype=F64)
    with net.at(ANGLES, 4):
        net.model[0].weight.data = torch.zeros(4, 3, 1, 3, 3, dtype=F64)
        with pytest.raises(RuntimeError, match=f"'weight' was written.*{rule}"):
            net.model(X)
    with pytest.raises(RuntimeError, match=rule):
        net(X, ANGLES + 1)


def test_a_strict_load_without_the_trained_transform() -> None:
    old, net = wx.Conditioned(cnn(), wx.Rotate()).state_dict(), learning()
    trained = {key for key in net.state_dict() if "weight_transform" in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight_transform"):
        net.load_state_dict(old)
    assert set(net.load_state_dict(old, strict=False).missing_keys) == trained
    last = max(trained)
    with pytest.raises(RuntimeError, match=f'Missing key.*: "{last}". '):
        net.load_state_dict({key: value for key, value in net.state_dict().items() if key != last})


def test_a_condition_is_wanted_where_there_is_none() -> None:
    layer = cnn()[0]
    raw = layer.weight
    with pytest.raises(ValueError, match=r"needs 'angle' and a condition: use it in wx\.Conditioned"):
        layer.weight = wx.ComputedParameter(layer.weight, wx.Rotate() + wx.LearnedResidual())
    assert layer.weight is raw and not wx.is_computed(layer)
    layer.weight = wx.ComputedParameter(layer.weight, wx.Rotate(angle=0.1))


def test_in_a_parametrization_of_torch() -> None:
    layers = cnn()[0], cnn()[0]
    rotate = wx.Rotate(angle=0.3)
    rotate.attach(layers[0].weight, layers[0])
    parametrize.register_parametrization(layers[0], "weight", rotate)
    layers[1].weight = wx.ComputedParameter(layers[1].weight, wx.Rotate(angle=0.3))
    torch.testing.assert_close(layers[0](X), layers[1](X))
    norm = wx.WeightNorm()
    norm.attach(layers[0].weight)
    parametrize.register_parametrization(layers[0], "weight", norm)
    torch.testing.assert_close(layers[0](X), layers[1](X))
    with pytest.raises(RuntimeError, match=r"Rotate has no right inverse: assign wx.raw\(module, name\)"):
        wx.assign(layers[1], "weight", torch.zeros(3, 1, 3, 3, dtype=F64))


def test_a_trace_is_told_what_to_do() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace want net.bake\(condition\)"):
        torch.jit.trace(net, (X, ANGLES))


def test_a_mapping_with_one_condition_is_a_mapping() -> None:
    class Named(nn.Module):
        def forward(self, weights: Tensor, conditions: dict[str, Tensor]) -> Tensor:
            return weights * conditions["condition"]

    net, other = wx.Conditioned(cnn(), Named()), wx.Conditioned(cnn(), Times())
    for c in (0.5, ANGLES):
        torch.testing.assert_close(net(X, {"condition": c}), other(X, c))
    with pytest.raises(ValueError, match="Conditioned: the condition must be finite"):
        other(X, float("nan"))
