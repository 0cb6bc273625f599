"""Backward through a computed weight: many passes through one value, writes between them, checkpointing."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import (
    Squashed,
    Symmetric,
    check_grads,
    iterated,
    iterations,
    leaves,
    linear,
    normalized,
    plain_loss,
    randn,
    randn_like,
    set_raw,
    state_of,
    transform_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weightxform as wx

# many forwards and backwards


@pytest.mark.parametrize("order", ["forward_backward", "all_forwards_first", "reversed"])
def test_many_forwards_and_backwards_through_one_weight(order):
    layer = linear()
    before = state_of(layer)
    w, b = leaves(layer)
    after = iterated(w, before)
    batches = [(randn(3, 6, seed=i), randn(3, 4, seed=10 + i)) for i in range(4)]
    if order == "forward_backward":
        for x, g in batches:
            layer(x).backward(g)
    else:
        outputs = [layer(x) for x, _ in batches]
        pairs = list(zip(outputs, batches, strict=True))
        for y, (_, g) in reversed(pairs) if order == "reversed" else pairs:
            y.backward(g)
    for x, g in batches:
        plain_loss(w, b, after, x).backward(g)
    check_grads(layer, w, b)
    assert iterations(before, state_of(layer), w) == 1


def test_a_discriminator_on_real_and_on_fake():
    """The two losses of a GAN step, and a generator's loss through the same cached weights."""
    discriminator = nn.Sequential(linear(), nn.LeakyReLU(0.2), linear(4, 1, seed=1))
    before = [state_of(layer) for layer in (discriminator[0], discriminator[2])]
    code = randn(5, 6, seed=3).requires_grad_()
    real = randn(5, 6, seed=4)
    g = [randn(5, 1, seed=5 + i) for i in range(3)]
    discriminator(real).backward(g[0])
    discriminator(code.tanh().detach()).backward(g[1])
    grads = {n: p.grad.clone() for n, p in discriminator.named_parameters()}
    discriminator(code.tanh()).backward(g[2])

    raws = [leaves(layer) for layer in (discriminator[0], discriminator[2])]
    states = [iterated(w, s) for (w, _), s in zip(raws, before, strict=True)]

    def plain(x: Tensor) -> Tensor:
        hidden = nn.functional.leaky_relu(plain_loss(*raws[0], states[0], x), 0.2)
        return plain_loss(*raws[1], states[1], hidden)

    flat = [p for pair in raws for p in pair]
    expected = torch.autograd.grad([plain(real), plain(code.tanh().detach())], flat, g[:2])
    for (name, grad), e in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, e, msg=name)
    torch.testing.assert_close(code.grad, torch.autograd.grad(plain(code.tanh()), code, g[2])[0])
    for layer, state, (w, _) in zip((discriminator[0], discriminator[2]), before, raws, strict=True):
        assert iterations(state, state_of(layer), w) == 1


def test_several_steps_with_accumulation():
    layer = linear()
    state = state_of(layer)
    w, b = leaves(layer)
    ours, theirs = (torch.optim.Adam(p, lr=0.1) for p in (layer.parameters(), (w, b)))
    for step in range(4):
        ours.zero_grad(), theirs.zero_grad()
        state = iterated(w, state)
        for i in range(3):
            x, g = randn(3, 6, seed=10 * step + i), randn(3, 4, seed=100 + 10 * step + i)
            layer(x).backward(g)
            plain_loss(w, b, state, x).backward(g)
        check_grads(layer, w, b)
        torch.testing.assert_close(state_of(layer), state)
        ours.step(), theirs.step()


def test_the_transforms_backward_runs_once_a_backward_pass():
    layer = linear()
    node = layer.weight.grad_fn
    seen = []
    handle = node.register_hook(lambda *grads: seen.append(1))
    x = randn(3, 6)
    (layer(x) + layer(2 * x) + layer(3 * x)).backward(randn(3, 4, seed=1))
    assert len(seen) == 1
    handle.remove()


def test_cache_false_two_forwards_one_backward():
    """Each forward keeps its own u and v (as torch), though the buffers have moved on."""
    layer = linear(cache=False)
    state = state_of(layer)
    w, b = leaves(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    first, second = layer(x), layer(2 * x)
    one, two = iterated(w, state), iterated(w, state, 2)
    (first * second).backward(g)
    (plain_loss(w, b, one, x) * plain_loss(w, b, two, 2 * x)).backward(g)
    check_grads(layer, w, b)
    assert iterations(state, state_of(layer), w) == 2


# a raw tensor written between forward and backward


def _loop_step(layer: nn.Linear) -> None:
    wx.raw(layer).grad = torch.ones_like(wx.raw(layer))
    torch.optim.SGD([wx.raw(layer)], lr=0.1, foreach=False).step()


def _fused_step(layer: nn.Linear) -> None:
    wx.raw(layer).grad = torch.ones_like(wx.raw(layer))
    torch.optim.SGD([wx.raw(layer)], lr=0.1, fused=True).step()


def _fused_adam(layer: nn.Linear) -> None:
    wx.raw(layer).grad = torch.ones_like(wx.raw(layer))
    torch.optim.Adam([wx.raw(layer)], lr=0.1, fused=True).step()


def _in_place(layer: nn.Linear) -> None:
    set_raw(layer, torch.ones(4, 6, dtype=torch.float64))


def _invalidated(layer: nn.Linear) -> None:
    wx.raw(layer).data.mul_(2)
    wx.invalidate(layer)


@pytest.mark.parametrize("write", [_in_place, _loop_step, _fused_step, _fused_adam, _invalidated])
@pytest.mark.parametrize("cache", [True, False])
def test_a_write_between_forward_and_backward_raises(write, cache):
    layer = linear(cache=cache)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    y = layer(x)
    write(layer)
    with pytest.raises(RuntimeError, match="written between"):
        y.backward(g)
    wx.raw(layer).grad = None
    before = state_of(layer)
    layer.bias.grad = None
    layer(x).backward(g)  # the next forward is right again
    w, b = leaves(layer)
    plain_loss(w, b, iterated(w, before), x).backward(g)
    check_grads(layer, w, b)


def test_an_older_output_keeps_its_own_state_when_only_the_state_moved():
    layer = linear()
    before = state_of(layer)
    w, b = leaves(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    y = layer(x)
    with torch.no_grad():
        for t in (transform_of(layer).u, transform_of(layer).v):
            t.copy_(torch.nn.functional.normalize(randn_like(t, seed=4), dim=0))
    y.backward(g)
    plain_loss(w, b, iterated(w, before), x).backward(g)
    check_grads(layer, w, b)


def test_double_backward_then_a_write_raises():
    layer = linear()
    y = layer(randn(3, 6)).tanh()
    (first,) = torch.autograd.grad(y, wx.raw(layer), randn(3, 4, seed=1), create_graph=True)
    _fused_step(layer)
    with pytest.raises(RuntimeError):
        first.backward(randn(4, 6, seed=2))


# transforms in plain autograd


@pytest.mark.parametrize("transform", [Symmetric, Squashed])
def test_a_plain_autograd_transform_serves_many_backwards(transform):
    layer = nn.Linear(5, 5, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, transform())
    w = wx.raw(layer).detach().clone().requires_grad_()
    for i in range(3):
        x, g = randn(3, 5, seed=i), randn(3, 5, seed=10 + i)
        layer(x).backward(g)
        (x @ transform()(w).T).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    x, g = randn(3, 5, seed=5), randn(3, 5, seed=6)
    (layer(x) * layer(2 * x)).backward(g)
    b = layer.bias.detach()
    ((x @ transform()(w).T + b) * (2 * x @ transform()(w).T + b)).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)


class Spectral(nn.Module):
    """A user's own stateful transform in plain torch: it rebinds its state."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, raw: Tensor) -> Tensor:
        if self.training:
            self.u, self.v = iterated(raw, (self.u, self.v))
        return normalized(raw, (self.u, self.v))


def test_a_users_own_stateful_transform():
    twin = linear()
    layer = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(wx.raw(twin)), layer.bias.copy_(twin.bias)
    layer.weight = wx.ComputedParameter(layer.weight, Spectral(*state_of(twin)))
    for step in range(3):
        x, g = randn(3, 6, seed=step), randn(3, 4, seed=10 + step)
        for m in (layer, twin):
            m.zero_grad()
            m(x).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, wx.raw(twin).grad)
        torch.testing.assert_close(state_of(layer), state_of(twin))
        for m in (layer, twin):
            set_raw(m, randn(4, 6, seed=20 + step))


# checkpointing


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("warm", [True, False], ids=["cached", "first_read"])
def test_checkpointing_gives_the_plain_gradient_and_one_iteration(use_reentrant, cache, warm):
    layers = [linear(cache=cache), linear(4, 6, seed=1, cache=cache)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    if warm and cache:
        model(randn(1, 6))
        before = None
    else:
        before = [state_of(layer) for layer in layers]
    states = [state_of(layer) if before is None else iterated(wx.raw(layer), state_of(layer)) for layer in layers]
    x, g = randn(3, 6).requires_grad_(), randn(3, 6, seed=1)
    for run in range(3):  # also a second and a third step
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        y.backward(g)
        for layer, state in zip(layers, states, strict=True):
            torch.testing.assert_close(state_of(layer), state)
        pairs = [leaves(layer) for layer in layers]
        z = x.detach().clone().requires_grad_()
        hidden = plain_loss(*pairs[0], states[0], z).tanh()
        expected = plain_loss(*pairs[1], states[1], hidden)
        expected.backward(g)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, z.grad)
        for layer, pair in zip(layers, pairs, strict=True):
            check_grads(layer, *pair)
            layer.zero_grad()
            set_raw(layer, randn_like(wx.raw(layer), seed=30 + run))
        x.grad = None
        states = [iterated(wx.raw(layer), state_of(layer)) for layer in layers]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_cache_false_two_forwards_before_a_backward(use_reentrant):
    """Documented: a weight that is recomputed sees the last state. The non-reentrant kind recomputes it for x only."""
    layer = linear(cache=False)
    before = state_of(layer)
    w, b = leaves(layer)
    x, g = randn(3, 6).requires_grad_(), randn(3, 4, seed=1)
    first, second = (checkpoint(layer, n * x, use_reentrant=use_reentrant) for n in (1, 2))
    one, last = iterated(w, before), iterated(w, before, 2)
    torch.testing.assert_close(first, plain_loss(w, b, one, x))
    torch.testing.assert_close(second, plain_loss(w, b, last, 2 * x))
    (first + second).backward(g)
    of_first = last if use_reentrant else one
    (plain_loss(w, b, of_first, x.detach()) + plain_loss(w, b, last, 2 * x.detach())).backward(g)
    check_grads(layer, w, b)
    torch.testing.assert_close(x.grad, 3 * g @ normalized(w, last))
    assert iterations(before, state_of(layer), w) == 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_a_plain_autograd_transform(use_reentrant):
    layer = nn.Linear(5, 5, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, Squashed())
    w = wx.raw(layer).detach().clone().requires_grad_()
    for i in range(2):
        x, g = randn(3, 5, seed=i).requires_grad_(), randn(3, 5, seed=10 + i)
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(g)
        (x @ Squashed()(w).T).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)
