"""torch.func over modules with computed weights: functional_call, vmap, stack_module_state, grad, jvp."""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import (
    iterated,
    iterations,
    linear,
    normalized,
    randn,
    set_raw,
    state_of,
    transform_of,
    unsettle,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import weightxform as wx

# torch's own, at the first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def functional(layer: nn.Linear):
    bias = layer.bias.detach()
    return lambda w, x: functional_call(layer, {"weight": w, "bias": bias}, (x,))


def oracle(layer: nn.Linear):
    """The same function in plain torch, from the state that the layer has now."""
    before, bias, training = state_of(layer), layer.bias.detach(), layer.training

    def f(w: Tensor, x: Tensor) -> Tensor:
        if training:  # the iteration is no part of the derivative
            with torch.no_grad():
                u = w.detach() @ before[1]
                u = u / u.norm()
                v = w.detach().T @ u
                v = v / v.norm()
        else:
            u, v = before
        return nn.functional.linear(x, w / (u @ w @ v), bias)

    return f


@MODES
def test_functional_call_with_another_raw_weight(training):
    layer = linear().train(training)
    kept = layer.weight.detach().clone()
    before = state_of(layer)
    other = randn(4, 6, seed=5).requires_grad_()
    x, g = randn(3, 6), randn(3, 4, seed=1)
    y = functional(layer)(other, x)
    y.backward(g)
    w = other.detach().clone().requires_grad_()
    expected = nn.functional.linear(x, normalized(w, iterated(w, before, int(training))), layer.bias.detach())
    expected.backward(g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(other.grad, w.grad)
    assert wx.raw(layer).grad is None
    if not training:
        assert iterations(before, state_of(layer), other) == 0
        torch.testing.assert_close(layer.weight, kept)
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


def test_functional_call_takes_and_updates_the_state_it_is_given():
    layer = linear()
    own = state_of(layer)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    buffers = {k: v.clone() for k, v in layer.named_buffers()}
    name = next(k for k in buffers if k.endswith("u")), next(k for k in buffers if k.endswith("v"))
    given = tuple(torch.nn.functional.normalize(randn(*buffers[n].shape, seed=40), dim=0) for n in name)
    buffers.update(zip(name, (t.clone() for t in given), strict=True))
    x = randn(3, 6)
    y = functional_call(layer, {**parameters, **buffers}, (x,))
    w = parameters["weight"]
    after = iterated(w, given)
    torch.testing.assert_close(y, nn.functional.linear(x, normalized(w, after), parameters["bias"]))
    assert iterations(own, state_of(layer), w) == 0, "the module's own state is untouched"


@MODES
def test_functional_call_on_a_meta_base(training):
    layer = linear().train(training)
    base = copy.deepcopy(layer).to("meta")
    before = state_of(layer)
    values = {**dict(layer.named_parameters()), **{k: v.clone() for k, v in layer.named_buffers()}}
    x, g = randn(3, 6), randn(3, 4, seed=1)
    y = functional_call(base, values, (x,))
    y.backward(g)
    w = wx.raw(layer).detach().clone().requires_grad_()
    expected = nn.functional.linear(x, normalized(w, iterated(w, before, int(training))), layer.bias)
    torch.testing.assert_close(y, expected)
    expected.backward(g, inputs=[w])
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    assert wx.raw(base).is_meta and base.weight.is_meta


@MODES
def test_grad_jvp_hessian_and_their_mixes(training):
    layer = linear(3, 2).train(training)
    _ = layer.weight
    f, plain = functional(layer), oracle(layer)
    before = state_of(layer)
    w, x, t = randn(2, 3, seed=5), randn(4, 3), randn(2, 3, seed=6)
    g = randn(4, 2, seed=1)

    def loss(h):
        return lambda w: (h(w, x).tanh() * g).sum()

    torch.testing.assert_close(grad(loss(f))(w), grad(loss(plain))(w))
    torch.testing.assert_close(jvp(lambda w: f(w, x), (w,), (t,)), jvp(lambda w: plain(w, x), (w,), (t,)))
    torch.testing.assert_close(vjp(lambda w: f(w, x), w)[1](g), vjp(lambda w: plain(w, x), w)[1](g))
    torch.testing.assert_close(jacrev(f)(w, x), jacrev(plain)(w, x))
    torch.testing.assert_close(jacfwd(f)(w, x), jacfwd(plain)(w, x))
    torch.testing.assert_close(hessian(loss(f))(w), hessian(loss(plain))(w))
    torch.testing.assert_close(jacrev(grad(loss(f)))(w), jacrev(grad(loss(plain)))(w))
    assert iterations(before, state_of(layer), w) == 0, "a transform of torch.func reads the state and writes nothing"
    layer.eval()
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), before))


@MODES
def test_gradients_are_those_of_the_eager_training_step(training):
    layer = linear().train(training)
    before = state_of(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    f = functional(layer)
    pure = grad(lambda w: (f(w, x) * g).sum())(wx.raw(layer).detach())
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0
    layer(x).backward(g)
    torch.testing.assert_close(pure, wx.raw(layer).grad)
    assert iterations(before, state_of(layer), wx.raw(layer)) == int(training)


@MODES
def test_vmap_over_raw_weights(training):
    layer = linear().train(training)
    _ = layer.weight
    f, plain = functional(layer), oracle(layer)
    before = state_of(layer)
    ws, xs, g = randn(5, 4, 6, seed=5), randn(5, 3, 6, seed=6), randn(3, 4, seed=1)
    for in_dims in ((0, 0), (0, None), (2, 0)):
        a = ws.movedim(0, in_dims[0])
        b = xs if in_dims[1] == 0 else xs[0]
        torch.testing.assert_close(vmap(f, in_dims)(a, b), vmap(plain, in_dims)(a, b))
        expected = vmap(grad(lambda w, x: (plain(w, x).tanh() * g).sum()), in_dims)(a, b)
        torch.testing.assert_close(vmap(grad(lambda w, x: (f(w, x).tanh() * g).sum()), in_dims)(a, b), expected)
    stacked = ws.clone().requires_grad_()
    y = vmap(f)(stacked, xs)
    y.backward(randn(*y.shape, seed=2))
    leaf = ws.clone().requires_grad_()
    vmap(plain)(leaf, xs).backward(randn(*y.shape, seed=2))
    torch.testing.assert_close(stacked.grad, leaf.grad)
    assert iterations(before, state_of(layer), ws[0]) == 0
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), before))


def test_per_sample_gradients():
    layer = linear()
    _ = layer.weight
    before = state_of(layer)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x, g = randn(5, 6), randn(5, 4, seed=1)

    def loss(p: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        return (functional_call(layer, p, (x[None],))[0].tanh() * g).sum()

    per_sample = vmap(grad(loss), (None, 0, 0))(parameters, x, g)
    f = oracle(layer)
    for i in range(5):
        expected = grad(lambda w, i=i: (f(w, x[i : i + 1])[0].tanh() * g[i]).sum())(parameters["weight"])
        torch.testing.assert_close(per_sample["weight"][i], expected)
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0


@MODES
def test_stack_module_state_and_vmap(training):
    models = [nn.Sequential(linear(seed=i), nn.Tanh(), linear(4, 3, seed=10 + i)).train(training) for i in range(3)]
    for i, model in enumerate(models):
        unsettle(model, seed=20 + i)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = randn(5, 6)
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    upstream = randn(*y.shape, seed=4)
    y.backward(upstream)
    for i, model in enumerate(models):
        before = [state_of(model[j]) for j in (0, 2)]
        expected = model(x)
        expected.backward(upstream[i])
        torch.testing.assert_close(y[i], expected)
        for name, p in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], p.grad, msg=lambda m, n=name: f"{n}: {m}")
        for j, state in zip((0, 2), before, strict=True):
            assert iterations(state, state_of(model[j]), wx.raw(model[j])) == int(training)


def test_reads_inside_a_transform_leave_the_cache_alone():
    layer = linear()
    weight = layer.weight
    f = functional(layer)
    vmap(f, (0, None))(randn(2, 4, 6, seed=5), randn(3, 6))
    grad(lambda x: layer(x).sum())(randn(3, 6))
    assert layer.weight is weight
    set_raw(layer, randn(4, 6, seed=8))
    before = state_of(layer)
    grad(lambda x: layer(x).sum())(randn(3, 6))
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0
    _ = layer.weight
    assert iterations(before, state_of(layer), wx.raw(layer)) == 1
    assert not torch._C._functorch.is_functorch_wrapped_tensor(layer.weight)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(transform_of(layer).u)


def test_forward_mode_through_the_module():
    layer = linear()
    _ = layer.weight
    state = state_of(layer)
    x, tx, tw = randn(3, 6), randn(3, 6, seed=1), randn(4, 6, seed=2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(wx.raw(layer).detach().clone(), tw)
        y = functional_call(layer.eval(), {"weight": dual}, (torch.autograd.forward_ad.make_dual(x, tx),))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    w = wx.raw(layer).detach()
    plain = jvp(lambda w, x: x @ normalized(w, state).T, (w, x), (tw, tx))[1]
    torch.testing.assert_close(tangent, plain)
