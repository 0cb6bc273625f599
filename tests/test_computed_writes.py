"""Every write to what a computed weight depends on is seen: to the raw tensor, to the state, by optimizers."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import (
    is_normalized_raw,
    iterated,
    iterations,
    linear,
    normalized,
    randn,
    set_raw,
    state_of,
    transform_of,
    unit,
)
from torch import nn
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

import weightxform as wx


def _wide(layer: nn.Module, value: torch.Tensor) -> None:
    vector_to_parameters(torch.cat([value.flatten(), parameters_to_vector([layer.bias]).detach()]), layer.parameters())


def _numpy(layer: nn.Module, value: torch.Tensor) -> None:
    wx.raw(layer).detach().numpy()[:] = value.numpy()
    wx.invalidate(layer)


def _data_in_place(layer: nn.Module, value: torch.Tensor) -> None:
    wx.raw(layer).data.copy_(value)
    wx.invalidate(layer)


def _inference(layer: nn.Module, value: torch.Tensor) -> None:
    with torch.inference_mode():
        wx.raw(layer).copy_(value)


def _data(layer: nn.Module, value: torch.Tensor) -> None:
    wx.raw(layer).data = value


def _detach(layer: nn.Module, value: torch.Tensor) -> None:
    wx.raw(layer).detach().copy_(value)


def _load(layer: nn.Module, value: torch.Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": value})


def _step(layer: nn.Module, value: torch.Tensor) -> None:
    """A write that no counter sees, then an optimizer's step (of learning rate 0)."""
    wx.raw(layer).data.copy_(value)
    wx.raw(layer).grad = torch.zeros_like(value)
    torch.optim.SGD(layer.parameters(), lr=0.0, fused=True).step()


def _foreach(layer: nn.Module, value: torch.Tensor) -> None:
    with torch.no_grad():
        torch._foreach_copy_([wx.raw(layer)], [value])


WRITES = [set_raw, _detach, _load, _data, _wide, _inference, _foreach, _step, _data_in_place, _numpy]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_every_write_is_seen(write, training):
    layer = linear().train(training)
    stale = layer.weight.detach().clone()
    before = state_of(layer)
    value = randn(4, 6, seed=21)
    write(layer, value)
    weight = layer.weight
    torch.testing.assert_close(wx.raw(layer).detach(), value)
    assert not torch.allclose(weight, stale)
    is_normalized_raw(layer)
    assert iterations(before, state_of(layer), value) == int(training)
    _ = layer.weight
    assert iterations(before, state_of(layer), value) == int(training)


def test_a_write_to_the_state_is_seen_and_costs_no_iteration():
    for training in (True, False):
        layer = linear().train(training)
        _ = layer.weight
        with torch.no_grad():
            transform_of(layer).u.copy_(unit(randn(4, seed=31)))
        before = state_of(layer)
        torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), before))
        assert iterations(before, state_of(layer), wx.raw(layer)) == 0


def test_a_learned_gain_is_a_tensor_that_the_weight_depends_on():
    layer = linear(learn_gain=True)
    _ = layer.weight
    before = state_of(layer)
    with torch.no_grad():
        transform_of(layer).gain.fill_(3.0)
    torch.testing.assert_close(layer.weight.detach(), 3 * normalized(wx.raw(layer).detach(), before))
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0
    x, g = randn(2, 6), randn(2, 4, seed=1)
    layer(x).backward(g)
    expected = (g.T @ x * normalized(wx.raw(layer).detach(), before)).sum()
    torch.testing.assert_close(transform_of(layer).gain.grad, expected.to(transform_of(layer).gain.dtype))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_over_several_steps(name):
    """Against a hand-written loop with the same optimizer on a plain leaf."""
    layer = linear()
    raw, state = wx.raw(layer), state_of(layer)
    leaf, bias = (p.detach().clone().requires_grad_() for p in (raw, layer.bias))
    ours, theirs = OPTIMIZERS[name]([raw, layer.bias]), OPTIMIZERS[name]([leaf, bias])
    for step in range(5):
        x, g = randn(3, 6, seed=step), randn(3, 4, seed=50 + step)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        y = layer(x)
        y.backward(g)
        state = iterated(leaf, state)
        expected = nn.functional.linear(x, normalized(leaf, state), bias)
        expected.backward(g)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(raw.grad, leaf.grad)
        torch.testing.assert_close(state_of(layer), state)
        ours.step(), theirs.step()
    torch.testing.assert_close(raw, leaf)


def test_invalidate_and_refresh():
    model = nn.Sequential(linear(), linear(4, 5, seed=1))
    model.eval()
    before = model[0].weight
    wx.invalidate(model)
    assert model[0].weight is not before
    torch.testing.assert_close(model[0].weight, before)

    for layer in model:  # values that the state knows nothing of
        set_raw(layer, randn(*wx.raw(layer).shape, seed=8) * torch.linspace(0.1, 3, wx.raw(layer).shape[1]).double())
    wx.refresh(model)
    for layer in model:
        top = torch.linalg.svdvals(layer.weight.detach())[0]
        torch.testing.assert_close(top, torch.ones_like(top), rtol=1e-2, atol=1e-2)
        assert not layer.training
