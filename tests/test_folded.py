"""Folded layers give the numbers of the unfolded form: outputs, gradients and state."""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of
from folded_layers import (
    KINDS,
    assert_close,
    folded_twin,
    folds,
    form,
    input_for,
    linear,
    pair,
    small_ones_fold,
    step,
    unfolded,
    update,
    upstream,
)
from torch import nn

import weightxform as wx
from weightxform import nn as folding
from weightxform.numerics import relative_error

__all__ = ["folds", "form", "small_ones_fold"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

OPTIONS = {
    "plain": {},
    "bound_active": {"bound": 0.5},
    "bound_inactive": {"bound": 1e3},
    "gain": {"gain": -1.7},
    "learned_gain": {"gain": -0.7, "learn_gain": True, "bound": 0.3},
    "three_v_first": {"n_power_iterations": 3, "order": "v_first"},
    "dim": {"dim": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_unfolded_layer(kind, options, form, folds):
    folded, plain = pair(kind, **options)
    for i in range(3):
        x = input_for(kind, seed=i)
        assert_close(step(folded, x, seed=i), step(plain, x, seed=i))
        assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))
        update(folded), update(plain)
    used = "tensors" if "conv" in kind else form
    assert folds == [used] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["learned_gain"]], ids=["plain", "learned_gain"])
@pytest.mark.parametrize("kind", [k for k in KINDS if "empty" not in k])
def test_is_as_accurate_as_the_unfolded_layer(kind, options, dtype, form, monkeypatch, folds):
    monkeypatch.setattr(folding, "_worth", lambda *_: True)
    folded, plain = pair(kind, dtype, **options)
    exact = copy.deepcopy(plain).double()
    x = input_for(kind, dtype)
    dy = upstream(plain.eval()(x))
    plain.train()
    actual, usual, oracle = step(folded, x, dy=dy), step(plain, x, dy=dy), step(exact, x.double(), dy=dy.double())
    assert len(folds) == 1
    assert actual.keys() == oracle.keys()
    for name, value in oracle.items():
        assert actual[name].dtype == usual[name].dtype
        bound = 2 * relative_error(usual[name], value) + 2 * torch.finfo(dtype).eps
        assert relative_error(actual[name], value) <= bound, name


@pytest.mark.parametrize("rows", [64, 4096])
def test_the_inner_product_is_accurate_over_many_terms(rows):
    """A sum of a quarter of a million products, all of one sign."""
    layer = linear(64, 48, torch.float32)
    exact = copy.deepcopy(layer).double()
    x = randn(rows, 64, dtype=torch.float32)
    results = []
    for twin in (layer, exact):
        own = x.to(wx.raw(twin).dtype).requires_grad_()
        y = twin(own)
        (y - twin.bias.detach()).square().sum().backward()
        results.append(wx.raw(twin).grad)
    assert relative_error(*results) < 4e-7


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "batch_above_weight", "conv2d"])
@pytest.mark.parametrize("options", [{}, {"gain": 0.6, "learn_gain": True, "bound": 0.3}], ids=["plain", "learned"])
def test_only_what_is_needed(kind, options, x_grad, form, folds):
    for frozen in [(), ("weight",), ("bias",), ("weight_transform.gain",), ("weight", "bias", "weight_transform.gain")]:
        folded, plain = pair(kind, **options)
        results = []
        for layer in (folded, plain):
            for name, p in layer.named_parameters():
                p.requires_grad_(name not in frozen)
            if not x_grad and not any(p.requires_grad for p in layer.parameters()):
                continue
            x = input_for(kind).requires_grad_(x_grad)
            y = layer(x)
            y.backward(randn(*y.shape, seed=5))
            results.append({n: p.grad for n, p in [("x", x), *layer.named_parameters()] if p.grad is not None})
        if results:
            assert_close(*results)
            assert ("x" in results[0]) == x_grad and not set(frozen) & results[0].keys()
    assert len(folds) == 5 - (not x_grad)


@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "batch_above_weight", "conv2d"])
@pytest.mark.parametrize("x_grad", [True, False])
def test_a_gain_of_zero_gets_its_gradient(kind, x_grad, form):
    folded, plain = pair(kind, gain=0.0, learn_gain=True)
    results = []
    for layer in (folded, plain):
        x = input_for(kind).requires_grad_(x_grad)
        y = layer(x)
        y.backward(randn(*y.shape, seed=5))
        assert torch.equal(y, layer.bias.view(-1, *(1,) * (y.ndim - 2)).expand_as(y))
        assert not wx.raw(layer).grad.any() and (not x_grad or not x.grad.any())
        results.append(layer.weight_transform.gain.grad)
    assert results[1].abs() > 0.1
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "conv2d"])
def test_weights_of_any_scale(kind, scale, form):
    folded, plain = pair(kind, torch.float32)
    for layer in (folded, plain):
        set_raw(layer, wx.raw(layer) * scale)
    exact = copy.deepcopy(plain).double()
    x = input_for(kind, torch.float32)
    actual, usual, oracle = step(folded, x), step(plain, x), step(exact, x.double())
    for name, value in oracle.items():
        if torch.isfinite(usual[name]).all():
            assert relative_error(actual[name], value) <= 2 * relative_error(usual[name], value) + 3e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rides", "batch_above_weight", "conv2d"])
def test_a_zero_weight_gives_zeros_and_passes_gradients(kind, dtype, form):
    folded, plain = pair(kind, dtype)
    for layer in (folded, plain):
        set_raw(layer, torch.zeros_like(wx.raw(layer)))
    before = state_of(folded)
    x = input_for(kind, dtype)
    actual, expected = step(folded, x), step(plain, x)
    assert_close(actual, expected, 2 * torch.finfo(dtype).eps)
    assert actual["d weight"].abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(state_of(folded), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_a_weight_that_is_not_finite_is_not_hidden(kind, bad, form):
    for layer in pair(kind):
        before = state_of(layer)
        value = wx.raw(layer).detach().clone()
        value.view(-1)[5] = bad
        set_raw(layer, value)
        y = layer(input_for(kind))
        assert y.isnan().any()
        assert all(torch.equal(a, b) for a, b in zip(state_of(layer), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_not_hidden(bad, form):
    for gain in (1.0, 0.0):
        folded, plain = pair("rides", gain=gain)
        x = input_for("rides")
        x[1, 2] = bad
        assert torch.equal(folded(x).isfinite(), plain(x).isfinite())


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "many_axes", "conv2d", "conv_groups"])
def test_memory_layouts(kind, weights, layout, form, folds):
    plain = unfolded(kind)
    if weights == "channels_last":
        plain = plain.to(memory_format=torch.channels_last)
    elif weights == "transposed":
        value = plain._parameters["weight"].data
        plain._parameters["weight"].data = value.transpose(0, 1).contiguous().transpose(0, 1)
    folded = folded_twin(plain)
    results = []
    for layer in (folded, plain):
        x = LAYOUTS[layout](input_for(kind)).detach().requires_grad_()
        y = layer(x)
        y.backward(randn(*y.shape[::-1], seed=5).permute(*range(y.ndim - 1, -1, -1)))
        results.append({"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert_close(*results)
    assert results[0]["weight"].stride() == wx.raw(folded).stride()
    assert len(folds) == 1


# the state, and the weight that others read


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_one_iteration_for_each_value_of_the_weight(kind, folds):
    layer, _ = pair(kind)
    x = input_for(kind)
    start, w = state_of(layer), wx.raw(layer)
    layer(x), layer(x)
    assert layer.weight.requires_grad
    with torch.no_grad():
        layer(x)
    once = state_of(layer)
    assert iterations(start, once, w) == 1
    set_raw(layer, wx.raw(layer) + 0.1)
    read = layer.weight
    layer(x)
    layer.eval()(x)
    assert iterations(once, state_of(layer), wx.raw(layer)) == 1
    torch.testing.assert_close(layer.weight, read, rtol=1e-12, atol=0)
    set_raw(layer, wx.raw(layer) + 0.1)
    before = state_of(layer)
    layer(x)
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0
    assert len(folds) == 6


@pytest.mark.parametrize("first", ["read", "forward"])
def test_a_reader_gets_the_computed_weight_of_the_same_value(first, folds):
    layer, plain = pair("rides")
    x = input_for("rides")
    if first == "read":
        w, y = layer.weight, layer(x)
    else:
        y, w = layer(x), layer.weight
    torch.testing.assert_close(w, plain.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(y, nn.functional.linear(x, w, layer.bias), rtol=1e-12, atol=1e-14)
    assert len(folds) == 1
    g = randn(*w.shape, seed=5)
    torch.testing.assert_close(
        torch.autograd.grad(w, wx.raw(layer), g),
        torch.autograd.grad(plain.weight, wx.raw(plain), g),
        rtol=1e-12,
        atol=0,
    )


def test_the_weight_is_no_part_of_the_graph_of_the_output():
    layer = linear()
    w, y = layer.weight, layer(input_for("rides"))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(y.sum(), w)


def test_a_pre_hook_that_reads_the_weight_does_not_advance_it_twice(folds):
    layer = linear()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    before = state_of(layer)
    layer(input_for("rides"))
    assert iterations(before, state_of(layer), wx.raw(layer)) == 1
    assert len(folds) == len(seen) == 1


def test_inference_mode_then_training(folds):
    folded, plain = pair("rides")
    x = input_for("rides")
    for layer in (folded, plain):
        with torch.inference_mode():
            assert layer(x).is_inference()
    assert_close(step(folded, x), step(plain, x))
    assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))
    assert len(folds) == 2


def test_cache_false_advances_at_every_forward(folds):
    layer, _ = pair("rides", cache=False)
    before = state_of(layer)
    x = input_for("rides")
    layer(x), layer(x)
    assert iterations(before, state_of(layer), wx.raw(layer)) == 2
    assert len(folds) == 2
