"""Backward through folded layers: many passes, overwritten outputs, writes in between, derivatives of higher order."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import randn, set_raw
from folded_layers import assert_close, folds, form, input_for, linear, pair, small_ones_fold, step
from torch import nn

import weightxform as wx

__all__ = ["folds", "form", "small_ones_fold"]  # fixtures


@pytest.mark.parametrize("kind", ["rides", "batch_above_weight", "conv2d"])
def test_many_forwards_and_backwards_of_one_value(kind, form, folds):
    """A discriminator on real and fake images, with a second backward through the first."""
    folded, plain = pair(kind)
    real, fake = input_for(kind, seed=1), input_for(kind, seed=2)
    results = []
    for layer in (folded, plain):
        x = fake.clone().requires_grad_()
        a, b = layer(real), layer(x)
        a.backward(randn(*a.shape, seed=5), retain_graph=True)
        b.backward(randn(*b.shape, seed=6))
        a.backward(randn(*a.shape, seed=7))
        results.append({"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert_close(*results)
    assert len(folds) == 2


@pytest.mark.parametrize("kind", ["rides", "batch_above_weight", "conv2d"])
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), lambda y: y.mul_(0).add_(1)], ids=["relu", "overwritten"])
def test_the_output_may_be_overwritten(kind, after, form, folds):
    folded, plain = pair(kind)
    x = input_for(kind)
    assert_close(
        step(folded, x, call=lambda x: after(folded(x))), step(plain, x, call=lambda x: after(plain(x)))
    )  # fmt: skip
    assert len(folds) == 1


def test_what_is_saved_is_what_a_plain_layer_saves():
    layer = linear(dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(randn(3, 20, dtype=torch.float32))
        wx.raw(layer).requires_grad_(False)
        layer(randn(3, 20, dtype=torch.float32).requires_grad_())
    assert saved == [(3, 20)]


@pytest.mark.parametrize("write", ["in_place", "fused_step", "gain"])
@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_a_write_between_forward_and_backward_raises(kind, write):
    layer, _ = pair(kind, learn_gain=True)
    y = layer(input_for(kind))
    raw, gain = wx.raw(layer), layer.weight_transform.gain
    if write == "in_place":
        set_raw(layer, raw + 1)
    elif write == "gain":
        with torch.no_grad():
            gain.add_(1)
    else:
        raw.grad = torch.ones_like(raw)
        torch.optim.SGD([raw], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="written between forward and backward"):
        y.sum().backward()


def test_an_input_written_between_forward_and_backward_raises():
    layer = linear()
    x = input_for("rides")
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "batch_above_weight", "conv2d", "conv_groups"])
@pytest.mark.parametrize("options", [{}, {"bound": 0.3, "gain": 1.3, "learn_gain": True}, {"dim": 1, "gain": -2.0}])
def test_gradcheck(kind, options, form, folds):
    layer, _ = pair(kind, **options)
    layer.eval()  # u and v are constants
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = [input_for(kind).requires_grad_(), *(p.detach().clone().requires_grad_() for p in values)]

    def function(x, *parameters):  # gradcheck writes behind the version counters; another's tensors are never cached
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert folds


@pytest.mark.parametrize("kind", ["rides", "batch_above_weight", "conv2d"])
def test_gradient_penalty(kind, form, folds):
    """A penalty on the gradient by the input, as in WGAN-GP, trains the raw weight."""
    folded, plain = pair(kind, learn_gain=True)
    results = []
    for layer in (folded, plain):
        x = input_for(kind).requires_grad_()
        y = layer(x)
        (g,) = torch.autograd.grad(y, x, randn(*y.shape, seed=5), create_graph=True)
        ((g.square().sum() - 1) ** 2 + y.square().sum()).backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert_close(*results)
    assert len(folds) == 1


@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "batch_above_weight", "conv2d"])
def test_batched_gradients(kind, folds):
    folded, plain = pair(kind)
    results = []
    for layer in (folded, plain):
        x = input_for(kind).requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, wx.raw(layer)], randn(3, *y.shape, seed=5), is_grads_batched=True)
        results.append(dict(zip(("x", "weight"), grads, strict=True)))
    assert_close(*results)
    assert len(folds) == 1
