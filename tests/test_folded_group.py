"""``wx.constrain(fold=True)``: the states of a model's layers in one call, and the numbers of the unfolded model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of, unsettle
from folded_layers import FOLDED as LAYERS
from folded_layers import assert_close, folds, small_ones_fold, step, update
from torch import nn

import weightxform as wx
from weightxform.spectral_norm import module as room

__all__ = ["folds", "small_ones_fold"]  # fixtures

FOLDED = (2, 5, 7)


def model(fold: bool, **options) -> nn.Sequential:
    """A convolution with more activations than weights, one with fewer, a transposed one, and two matrices."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 14, 3), nn.ConvTranspose2d(14, 5, 2), nn.Flatten(),
        nn.Linear(45, 30), nn.ReLU(inplace=True), nn.Linear(30, 20),
    )  # fmt: skip
    return unsettle(wx.constrain(layers.double(), wx.SpectralNorm, fold=fold, **options))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many weights each call for states served."""
    sizes: list[int] = []
    op = room.spectral_norm_state_list

    def counted(weights, *rest):
        sizes.append(len(weights))
        return op(weights, *rest)

    monkeypatch.setattr(room, "spectral_norm_state_list", counted)
    return sizes


X = randn(2, 3, 6, 6)


@pytest.mark.parametrize(
    "options", [{}, {"gain": 0.6, "learn_gain": True, "bound": 0.3}, {"bucket_bytes": 1}, {"accumulate_grad": True}]
)
def test_training_is_that_of_the_unfolded_model(options, folds):
    folded, plain = model(True, **options), model(False, **options)
    assert [isinstance(m, tuple(LAYERS.values())) for m in folded] == [i in (0, *FOLDED) for i in range(8)]
    assert list(folded.state_dict()) == list(plain.state_dict())
    for i in range(4):
        x = randn(2, 3, 6, 6, seed=i)
        assert_close(step(folded, x, seed=i), step(plain, x, seed=i))
        assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))
        update(folded), update(plain)
    assert folds == ["tensors", "numbers", "numbers"] * 4


def test_one_call_a_step(calls):
    layers = model(True)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for i in range(3):
        calls.clear()
        before = [state_of(layers[k]) for k in (0, 3, *FOLDED)]
        values = [wx.raw(layers[k]).detach().clone() for k in (0, 3, *FOLDED)]
        for _ in range(2):
            layers(X).square().sum().backward()
        for k, state, value in zip((0, 3, *FOLDED), before, values, strict=True):
            assert iterations(state, state_of(layers[k]), value, dim=int(k == 3)) == 1
        if i:  # in the first step each layer finds out that it folds
            assert calls == [3]
        optimizer.step()


def test_a_layer_that_was_not_written_is_not_computed_again(calls):
    layers = model(True)
    for k in FOLDED:
        layers(X)
        set_raw(layers[k], wx.raw(layers[k]) + 0.1)
        calls.clear()
        layers(X)
        assert calls == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    folded, plain = model(True), model(False)
    step(folded, X), step(plain, X)
    for layers in (folded, plain):
        with torch.no_grad():
            for p in layers.parameters():
                p.add_(0.1)
    twin = copied(folded)
    assert_close(step(twin, X), step(plain, X))
    assert_close(step(folded, X), step(plain, X))


def test_tied_layers_fold_together(folds):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)).double()
    layers[2].weight = layers[0].weight
    plain = unsettle(wx.constrain(copy.deepcopy(layers), wx.SpectralNorm))
    folded = unsettle(wx.constrain(layers, wx.SpectralNorm, fold=True))
    x = randn(3, 20)
    for i in range(2):
        assert_close(step(folded, x, seed=i), step(plain, x, seed=i))
        update(folded), update(plain)
    assert len(folds) == 4


def test_bake_gives_plain_layers():
    layers, plain = model(True), model(False)
    expected = plain.eval()(X)
    wx.bake(layers)
    kinds = nn.Conv2d, nn.Tanh, nn.Conv2d, nn.ConvTranspose2d, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear
    assert tuple(map(type, layers)) == kinds
    torch.testing.assert_close(layers(X), expected, rtol=1e-12, atol=1e-13)
