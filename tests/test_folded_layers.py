"""Folded layers as modules: how they are made, copied, saved and undone."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of
from folded_layers import (
    FOLDED,
    KINDS,
    assert_close,
    folded_twin,
    folds,
    input_for,
    linear,
    pair,
    small_ones_fold,
    step,
    unfolded,
)
from torch import nn

import weightxform as wx
from weightxform import nn as folding
from weightxform.numerics import relative_error

__all__ = ["folds", "small_ones_fold"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

EACH = ("rides", "conv1d", "conv2d", "conv3d")


def built(kind: str, **options) -> nn.Module:
    cls, args, kwargs, _ = KINDS[kind]
    torch.manual_seed(0)
    return FOLDED[cls](*args, **kwargs, dtype=torch.float64, **options)


def is_folded(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(FOLDED.values()))


# making one


@pytest.mark.parametrize("kind", EACH)
def test_a_constructor_does_what_the_two_lines_do(kind, folds):
    cls, args, kwargs, _ = KINDS[kind]
    options = {"n_power_iterations": 2, "eps": 1e-8, "order": "v_first", "bound": 0.5, "gain": 1.5, "learn_gain": True}
    layer = built(kind, **options)
    torch.manual_seed(0)
    plain = cls(*args, **kwargs, dtype=torch.float64)
    plain.weight = wx.ComputedParameter(plain.weight, wx.SpectralNorm(**options))
    assert isinstance(layer, FOLDED[cls]) and isinstance(layer, cls) and wx.is_computed(layer, "weight")
    assert repr(layer.weight_transform) == repr(plain.weight_transform)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    x = input_for(kind)
    assert_close(step(layer, x), step(plain, x))
    assert len(folds) == 1


@pytest.mark.parametrize("cls", FOLDED.values())
def test_the_signature_is_torchs_and_keyword_only_options(cls):
    own = inspect.signature(cls)
    theirs = inspect.signature(cls.__wx_plain__)
    names = list(theirs.parameters)
    assert list(own.parameters)[: len(names)] == names
    assert {n: p.default for n, p in theirs.parameters.items()}.items() <= {
        n: p.default for n, p in own.parameters.items()
    }.items()
    rest = list(own.parameters.values())[len(names) :]
    assert [p.name for p in rest] == ["n_power_iterations", "eps", "order", "bound", "gain", "learn_gain"]
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    ours = inspect.signature(wx.SpectralNorm).parameters
    assert all(p.default == ours[p.name].default for p in rest)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_power_iterations": -1}, ValueError, "SpectralNorm: n_power_iterations"),
        ({"eps": 0.0}, ValueError, "SpectralNorm: eps"),
        ({"order": "w"}, ValueError, "SpectralNorm: order"),
        ({"bound": -1.0}, ValueError, "SpectralNorm: bound"),
        ({"gain": "1"}, TypeError, "SpectralNorm: gain"),
        ({"learn_gain": 1}, TypeError, "SpectralNorm: learn_gain"),
        ({"dtype": torch.complex64}, TypeError, "SpectralNorm: the weight"),
        ({"dim": 1}, TypeError, "dim"),
    ],
)
def test_errors_of_a_constructor(options, error, message):
    with pytest.raises(error, match=message):
        wx.nn.SpectralLinear(3, 4, **options)


def test_a_layer_on_meta_then_materialized(folds):
    layer = wx.nn.SpectralLinear(6, 5, device="meta")
    assert layer(torch.empty(1, 6, device="meta")).shape == (1, 5)
    layer.to_empty(device="cpu").reset_parameters()
    layer(torch.randn(2, 6)).sum().backward()
    assert wx.raw(layer).grad.isfinite().all()
    assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 1) < 0.1
    assert folds == ["tensors", "numbers"]


def test_layers_of_one_kind_share_a_class():
    assert type(linear()) is type(linear(5, 4))


# turning a computed layer into one


@pytest.mark.parametrize("kind", KINDS)
def test_fold_layer_and_bake(kind):
    layer = unfolded(kind)
    cls = KINDS[kind][0]
    keys = list(layer.state_dict())
    assert folding.fold_layer(layer) is True and folding.fold_layer(layer) is True
    assert isinstance(layer, FOLDED[cls]) and list(layer.state_dict()) == keys
    expected = layer.eval().weight.detach().clone()
    wx.bake(layer)
    assert type(layer) is cls
    assert torch.equal(layer.weight, expected)
    assert folding.fold_layer(layer) is False and type(layer) is cls


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def squared(module):
    module.weight = wx.ComputedParameter(module.weight, nn.Sequential(wx.SpectralNorm(), wx.WeightNorm()))
    return module


def normalized(module, **options):
    module.weight = wx.ComputedParameter(module.weight, wx.SpectralNorm(**options))
    return module


def patched(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 4),
        lambda: normalized(OwnForward(3, 4)),
        lambda: normalized(nn.ConvTranspose2d(3, 4, 3)),
        lambda: normalized(nn.Embedding(3, 4)),
        lambda: normalized(nn.Bilinear(3, 4, 5)),
        lambda: normalized(nn.Conv2d(3, 4, 3), operator="conv", input_size=(5, 5)),
        lambda: squared(nn.Linear(3, 4)),
        lambda: patched(normalized(nn.Linear(3, 4))),
        lambda: nn.ReLU(),
    ],
    ids=[
        "plain",
        "subclass",
        "transposed",
        "embedding",
        "bilinear",
        "conv_operator",
        "stacked",
        "patched",
        "no_weight",
    ],
)
def test_what_does_not_fold_is_left_alone(make):
    module = make()
    before = type(module)
    assert folding.fold_layer(module) is False
    assert type(module) is before


def test_a_computed_bias_beside_it(folds):
    layer = unfolded("rides")
    layer.bias = wx.ComputedParameter(layer.bias, wx.SpectralNorm())
    plain = copy.deepcopy(layer)
    assert folding.fold_layer(layer)
    x = input_for("rides")
    assert_close(step(layer, x), step(plain, x))
    assert len(folds) == 1
    wx.bake(layer, "bias")
    assert is_folded(layer)
    wx.bake(layer)
    assert type(layer) is nn.Linear


def test_a_subclass_of_a_folded_layer(folds):
    class Twice(wx.nn.SpectralLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Twice(20, 30, dtype=torch.float64)
    x = input_for("rides")
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    assert len(folds) == 1
    assert type(wx.bake(layer)) is Twice
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    assert len(folds) == 1


def test_another_transform_on_top_runs_unfolded(folds):
    layer = linear()
    layer.weight = wx.ComputedParameter(layer.weight, wx.WeightNorm())
    x = input_for("rides")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert folds == []


# copies and checkpoints


def _pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", EACH)
def test_copies_are_independent(kind, copied, folds):
    layer, plain = pair(kind, learn_gain=True)
    x = input_for(kind)
    step(layer, x), step(plain, x)
    twin, plain = copied(layer), copied(plain)
    assert type(twin) is type(layer)
    set_raw(layer, wx.raw(layer) + 1)
    assert_close(step(twin, x), step(plain, x))
    set_raw(twin, wx.raw(twin) + 0.1), set_raw(plain, wx.raw(plain) + 0.1)
    assert_close(step(twin, x), step(plain, x))
    assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()))
    assert len(folds) == 3


@pytest.mark.parametrize("kind", EACH)
def test_checkpoints_go_both_ways(kind, tmp_path):
    plain, fresh = unfolded(kind), built(kind)
    torch.save(plain.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    x = input_for(kind)
    assert_close(step(fresh, x), step(plain, x))
    other = unfolded(kind)
    set_raw(other, wx.raw(other) + 1)
    other.load_state_dict(fresh.state_dict())
    assert_close(step(fresh.eval(), x), step(other.eval(), x))


def test_a_checkpoint_of_torchs_parametrization_loads():
    torch.manual_seed(0)
    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30, dtype=torch.float64))
    layer = linear()
    layer.load_state_dict(theirs.state_dict())
    x = input_for("rides")
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))


def test_tied_layers_advance_once(folds):
    first, second = linear(), wx.nn.SpectralLinear(20, 30, dtype=torch.float64)
    wx.bake(second)
    wx.tie(second, first)
    assert folding.fold_layer(second)
    before = state_of(first)
    x = input_for("rides")
    (first(x).sum() + second(x).sum()).backward()
    assert iterations(before, state_of(first), wx.raw(first)) == 1
    assert len(folds) == 2


def test_assign_and_invalidate(folds):
    layer = linear()
    x = input_for("rides")
    layer(x)
    value = randn(30, 20, seed=9)
    wx.assign(layer, "weight", value)
    expected = value / torch.linalg.matrix_norm(value, 2)
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, expected, layer.bias), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        layer._parameters["weight"].data[0] += 1  # unseen
    stale, fresh = layer(x), wx.invalidate(layer)(x)
    assert relative_error(stale, fresh) > 1e-2
    torch.testing.assert_close(fresh, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-10, atol=1e-12)
    assert len(folds) == 4


# where it runs unfolded, and with the same numbers


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_more_activations_than_weights_run_unfolded(kind, folds):
    folded, plain = pair(kind, torch.bfloat16)
    shape = (40, *KINDS[kind][3][1:])
    x = randn(*shape, dtype=torch.bfloat16)
    actual, expected = step(folded, x), step(plain, x)
    assert folds == []
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    folded(input_for(kind, torch.bfloat16))  # few: the same state
    assert len(folds) == 1
    assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()), 1e-6)


def test_folded_twins_share_nothing():
    layer = unfolded("rides")
    twin = folded_twin(layer)
    assert not is_folded(layer) and is_folded(twin)
    assert wx.raw(layer) is not wx.raw(twin)
