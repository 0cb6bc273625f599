"""torch's autograd around a computed weight: hooks, saved tensors, higher derivatives, what takes no gradient."""

from __future__ import annotations

import gc

import pytest
import torch
from computed_oracle import check_grads, iterated, leaves, linear, normalized, plain_loss, randn, set_raw, state_of
from torch import Tensor, nn

import weightxform as wx

# hooks


def test_hooks_on_raw_run_once_a_backward():
    layer = linear()
    raw, seen, accumulated = wx.raw(layer), [], []
    raw.register_hook(lambda grad: seen.append(grad.clone()))
    raw.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    x = randn(3, 6)
    (layer(x) + layer(2 * x)).backward(randn(3, 4, seed=1))
    assert len(seen) == len(accumulated) == 1
    torch.testing.assert_close(seen[0], accumulated[0])
    first = seen[0]
    layer(x).backward(randn(3, 4, seed=2))
    assert len(seen) == len(accumulated) == 2
    torch.testing.assert_close(first + seen[1], accumulated[1])
    set_raw(layer, randn(4, 6, seed=3))
    layer(x).backward(randn(3, 4, seed=2))
    assert len(seen) == len(accumulated) == 3, "they outlive the value"


def test_an_optimizer_in_the_backward():
    """A step in a post-accumulate hook (after the transform's backward has run)."""
    layer = linear()
    state = state_of(layer)
    w, b = leaves(layer)
    optimizers = {p: torch.optim.SGD([p], lr=0.2) for p in layer.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(step)
    plain = torch.optim.SGD([w, b], lr=0.2)
    for i in range(3):
        x, g = randn(3, 6, seed=i), randn(3, 4, seed=10 + i)
        layer(x).backward(g)
        state = iterated(w, state)
        plain.zero_grad()
        plain_loss(w, b, state, x).backward(g)
        plain.step()
        torch.testing.assert_close(wx.raw(layer), w)
        torch.testing.assert_close(layer.bias, b)


def test_hooks_on_the_computed_tensor_live_as_long_as_its_value():
    layer = linear()
    seen = []
    weight = layer.weight
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    weight.retain_grad()
    x, g = randn(3, 6), randn(3, 4, seed=1)
    layer(x).backward(g)
    torch.testing.assert_close(seen[0], g.T @ x)
    torch.testing.assert_close(weight.grad, g.T @ x)
    torch.testing.assert_close(layer.weight.grad, g.T @ x)
    set_raw(layer, randn(4, 6, seed=3))
    layer(x).backward(g)
    assert len(seen) == 1


def test_autograd_grad_with_respect_to_raw_and_to_the_computed_tensor():
    layer = linear()
    before = state_of(layer)
    w, b = leaves(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    (dcomputed,) = torch.autograd.grad(layer(x), layer.weight, g)
    torch.testing.assert_close(dcomputed, g.T @ x)
    (draw,) = torch.autograd.grad(layer(x), wx.raw(layer), g)
    (expected,) = torch.autograd.grad(plain_loss(w, b, iterated(w, before), x), w, g)
    torch.testing.assert_close(draw, expected)
    assert wx.raw(layer).grad is None


def test_clipping_and_the_gradient_scaler():
    layer = linear(dtype=torch.float32)
    w, b = (p.double().detach().requires_grad_() for p in leaves(layer))
    state = iterated(w, tuple(s.double() for s in state_of(layer)))
    x, g = randn(3, 6), randn(3, 4, seed=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale((layer(x.float()) * g.float()).sum()).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    plain_loss(w, b, state, x).backward(g)
    expected = torch.nn.utils.clip_grad_norm_((w, b), 0.5)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p, q in ((wx.raw(layer), w), (layer.bias, b)):
            torch.testing.assert_close(p.double(), q - 0.1 * q.grad, rtol=1e-5, atol=1e-5)


# saved tensors, anomaly mode


def test_save_on_cpu_and_anomaly_mode():
    for context in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        torch.autograd.set_detect_anomaly(True),
    ):
        layer = linear()
        before = state_of(layer)
        w, b = leaves(layer)
        x, g = randn(3, 6), randn(3, 4, seed=1)
        with context:
            layer(x).backward(g)
            layer(2 * x).backward(g)
        after = iterated(w, before)
        plain_loss(w, b, after, 3 * x).backward(g, inputs=[w])
        b.grad = 2 * g.sum(0)
        check_grads(layer, w, b)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_detect_anomaly_finds_no_anomaly():
    layer = linear()
    with torch.autograd.detect_anomaly():
        layer(randn(3, 6)).backward(randn(3, 4, seed=1))
    assert torch.isfinite(wx.raw(layer).grad).all()


# higher order


def test_double_backward_hvp_and_third_order():
    layer = linear()
    before = state_of(layer)
    w, b = leaves(layer)
    x, g, d = randn(3, 6), randn(3, 4, seed=1), randn(4, 6, seed=2)
    after = iterated(w, before)

    def derivatives(raw: Tensor, y: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad((y.sigmoid() * g).sum(), raw, create_graph=True)
        (second,) = torch.autograd.grad((first * d).sum(), raw, create_graph=True)
        (third,) = torch.autograd.grad((second * d.flip(0)).sum(), raw)
        return [first, second, third]

    for _ in range(2):  # through the cached weight as well
        ours = derivatives(wx.raw(layer), layer(x))
        plain = derivatives(w, plain_loss(w, b, after, x))
        for a, e in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, e)


def test_a_gradient_penalty():
    """WGAN-GP: a gradient with respect to the input, differentiated with respect to the weights."""
    layers = linear(), linear(4, 1, seed=1)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    pairs = [leaves(layer) for layer in layers]
    states = [iterated(w, state_of(layer)) for (w, _), layer in zip(pairs, layers, strict=True)]

    def plain(x: Tensor) -> Tensor:
        return plain_loss(*pairs[1], states[1], plain_loss(*pairs[0], states[0], x).tanh())

    def penalty(f) -> Tensor:
        x = randn(5, 6).requires_grad_()
        (dx,) = torch.autograd.grad(f(x), x, randn(5, 1, seed=1), create_graph=True)
        return ((dx.norm(dim=1) - 1) ** 2 * randn(5, seed=2)).sum() + (f(x) * randn(5, 1, seed=3)).sum()

    penalty(model).backward()
    penalty(plain).backward()
    for layer, pair in zip(layers, pairs, strict=True):
        check_grads(layer, *pair)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_gradcheck_through_the_module():
    layer = linear().eval()
    bias = layer.bias.detach()

    def f(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w, "bias": bias}, (x,))

    inputs = randn(4, 6).requires_grad_(), randn(2, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


# what is and is not used


def test_layers_that_were_not_used_have_no_gradient():
    model = nn.ModuleList([linear(), linear(seed=1)])
    model[0](randn(2, 6)).backward(randn(2, 4, seed=1))
    assert wx.raw(model[0]).grad is not None and wx.raw(model[1]).grad is None


def test_frozen_weights_and_inputs_that_need_gradients():
    layer = linear()
    wx.raw(layer).requires_grad_(False)
    before = state_of(layer)
    x, g = randn(3, 6).requires_grad_(), randn(3, 4, seed=1)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ normalized(wx.raw(layer), iterated(wx.raw(layer), before)))
    assert wx.raw(layer).grad is None


def test_sparse_gradients_of_an_embedding():
    layer = nn.Embedding(7, 5, sparse=True, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    before = state_of(layer)
    index, g = torch.tensor([0, 3, 3, 6]), randn(4, 5)
    layer(index).backward(g)
    w = wx.raw(layer).detach().clone().requires_grad_()
    normalized(w, iterated(w, before))[index].backward(g)
    assert wx.raw(layer).grad.layout == torch.strided
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)


def test_memory_does_not_grow_over_backwards():
    layer = linear()
    x, g = randn(3, 6), randn(3, 4, seed=1)
    for _ in range(3):
        layer(x).backward(g)
    gc.collect()
    count = len([o for o in gc.get_objects() if issubclass(type(o), Tensor)])
    for i in range(20):
        layer(x).backward(g)
        set_raw(layer, randn(4, 6, seed=i))
    gc.collect()
    assert len([o for o in gc.get_objects() if issubclass(type(o), Tensor)]) <= count + 2
