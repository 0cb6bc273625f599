"""``constrain(accumulate_grad=True)``: the kernel adds to gradients that are there, and nobody can tell."""

from __future__ import annotations

import warnings

import pytest
import torch
from computed_oracle import randn, unsettle
from repeated_models import LAYERS, batch, pair, run, same, write
from torch import nn

import weightxform as wx
from weightxform.spectral_norm.repeated import Prepared


@pytest.fixture
def added(monkeypatch) -> list[int]:
    """To how many gradients each call of the kernel added."""
    seen: list[int] = []
    backward = Prepared.backward

    def watched(self, douts, which, state, into):
        seen.append(len(into))
        return backward(self, douts, which, state, into)

    monkeypatch.setattr(Prepared, "backward", watched)
    return seen


def both(event, added, steps=3, **options):
    """``event(model, step)`` in every step of both models; the same bits."""
    models = pair(accumulate_grad=True, **options)
    for step in range(steps):
        for m in models:
            write(m, step)
            event(m, step)
        same(*models, f"step {step}")
    return added


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"learn_gain": True}], ids=["", "gain"])
def test_micro_batches(dtype, options, added):
    def event(m, step):
        for i in range(3):
            run(m, 10 * step + i, dtype)

    both(event, added, dtype=dtype, **options)
    assert added == [4] * 6, "in the first step the weights are computed from scratch"


def after_a_run(f):
    def event(m, step):
        run(m, step)
        f(m, step)

    event.__name__ = f.__name__
    return event


@after_a_run
def inputs(m, step):
    x, g = batch(step)
    m(x).backward(g, inputs=[wx.raw(m[4])])


@after_a_run
def inputs_elsewhere(m, step):
    x, g = batch(step)
    m(x).backward(g, inputs=[m[2].bias])


@after_a_run
def grad_of_one(m, step):
    x, g = batch(step)
    m.result = torch.autograd.grad(m(x), [wx.raw(m[4])], g)


@after_a_run
def grad_of_the_input(m, step):
    x, g = batch(step)
    torch.autograd.grad(m(x.requires_grad_()), [x], g)


@after_a_run
def grad_of_a_weight(m, step):
    x, g = batch(step)
    torch.autograd.grad(m(x), [m[4].weight], g)


@after_a_run
def some_members(m, step):
    m[4].weight.backward(randn(6, 10, seed=step))


@after_a_run
def hook(m, step):
    handle = wx.raw(m[4]).register_hook(lambda g: 2 * g)
    run(m, step + 5)
    handle.remove()
    run(m, step + 6)


@after_a_run
def post_accumulate_hook(m, step):
    seen = []
    handle = wx.raw(m[4]).register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    run(m, step + 5)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], wx.raw(m[4]).grad)


@after_a_run
def hook_of_several(m, step):
    seen = []
    raws = [wx.raw(m[i]) for i in LAYERS]
    handle = torch.autograd.graph.register_multi_grad_hook(raws, lambda gs: seen.append([g is None for g in gs]))
    run(m, step + 5)
    handle.remove()
    assert seen == [[False] * 4]


@after_a_run
def hook_after_the_accumulation(m, step):
    """Where DDP and FSDP1 have theirs."""
    node, seen = torch.autograd.graph.get_gradient_edge(wx.raw(m[4])).node, []
    handle = node.register_hook(lambda *_: seen.append(wx.raw(m[4]).grad.clone()))
    run(m, step + 5)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], wx.raw(m[4]).grad)


@after_a_run
def some_without_gradients(m, step):
    wx.raw(m[0]).grad = wx.raw(m[4]).grad = None
    run(m, step + 5)


@after_a_run
def other_dtype(m, step):
    raw = wx.raw(m[4])
    raw.grad_dtype = None
    raw.grad = raw.grad.float()
    run(m, step + 5)
    raw.grad = None


@after_a_run
def upstream_is_a_gradient(m, step):
    weights, raws = [m[i].weight for i in LAYERS], [wx.raw(m[i]) for i in LAYERS]
    torch.autograd.backward(weights, [r.grad for r in raws])


@after_a_run
def in_place(m, step):
    before = [wx.raw(m[i]).grad for i in LAYERS]
    run(m, step + 5)
    assert all(wx.raw(m[i]).grad is b for i, b in zip(LAYERS, before, strict=True))


@after_a_run
def scaled_as_by_a_grad_scaler(m, step):
    x, g = batch(step)
    m(x).backward(1024 * g)
    for p in m.parameters():
        p.grad.mul_(1 / 1024)
    run(m, step + 5)


@after_a_run
def backward_inside_a_backward(m, step):
    x, g = batch(step)
    y = m(x)

    def again(_):
        with torch.enable_grad():
            run(m, step + 5)

    y.register_hook(again)
    y.backward(g)


@after_a_run
def raw_used_beside_its_weight(m, step):
    (m[4].weight * randn(6, 10, seed=step) + wx.raw(m[4]) * 3).backward(randn(6, 10, seed=8))


EVENTS = [
    inputs, inputs_elsewhere, grad_of_one, grad_of_the_input, grad_of_a_weight, some_members, hook,
    post_accumulate_hook, hook_of_several, hook_after_the_accumulation, some_without_gradients, other_dtype,
    upstream_is_a_gradient, in_place, scaled_as_by_a_grad_scaler, backward_inside_a_backward,
    raw_used_beside_its_weight,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
def test_who_looks_sees_what_autograd_does(event, added):
    assert len(both(event, added)) >= 2


def test_a_frozen_member_keeps_its_gradient(added):
    def event(m, step):
        wx.raw(m[4]).requires_grad_(step == 0)
        run(m, step), run(m, step + 5)

    both(event, added, steps=4)
    assert 3 in added, "to the three others"


def test_a_gradient_of_another_layout_is_left_to_autograd(added):
    def event(m, step):
        run(m, step)
        wx.raw(m[4]).grad = wx.raw(m[4]).grad.t().contiguous().t()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the layout
            run(m, step + 5)

    both(event, added)
    assert 3 in added


def test_derivatives_of_gradients():
    models = pair(accumulate_grad=True)
    for m in models:
        run(m, 0), write(m, 1), run(m, 1)
        x, g = batch(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the cycle
            m(x).backward(g, create_graph=True)
        kept = [wx.raw(m[i]).grad for i in LAYERS]
        assert all(k.requires_grad for k in kept)
        run(m, 3)
        m.second = torch.autograd.grad(sum((k**2).sum() for k in kept), wx.raw(m[4]))[0]
    torch.testing.assert_close(models[0].second, models[1].second)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        p.grad = q.grad = None


def square(accumulate_grad: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, dtype=torch.float64) for _ in range(6)))
    unsettle(wx.constrain(model, wx.SpectralNorm, accumulate_grad=accumulate_grad))
    _ = model[0].weight
    write(model, 1)
    return model


@pytest.mark.parametrize("how", ["one", "slices"])
def test_gradients_that_share_memory_are_added_one_after_another(how):
    results = []
    torch.set_num_threads(4)
    for accumulate_grad in (True, False):
        model = square(accumulate_grad)
        memory = randn(40, 32, seed=5)
        for i, layer in enumerate(model):
            wx.raw(layer).grad = memory[:32] if how == "one" else memory[i : 32 + i]
        torch.autograd.backward([m.weight for m in model], [randn(32, 32, seed=i) for i in range(6)])
        results.append(memory)
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_slices_of_one_buffer_are_added_to(added):
    results = []
    for accumulate_grad in (True, False):
        model = square(accumulate_grad)
        memory = randn(6, 32, 32, seed=5)
        for layer, grad in zip(model, memory, strict=True):
            wx.raw(layer).grad = grad
        torch.autograd.backward([m.weight for m in model], [randn(32, 32, seed=i) for i in range(6)])
        results.append(memory)
    assert torch.equal(*results) and added == [6, 0]


def test_upstream_gradients_that_are_the_gradients_of_others():
    results = []
    for accumulate_grad in (True, False):
        model = square(accumulate_grad)
        grads = [randn(32, 32, seed=i) for i in range(6)]
        for layer, grad in zip(model, grads, strict=True):
            wx.raw(layer).grad = grad
        torch.autograd.backward([m.weight for m in model], grads[1:] + grads[:1])
        results.append(torch.stack(grads))
    assert torch.equal(*results)


def test_autograd_notices_that_a_gradient_was_written(added):
    model, _ = pair(accumulate_grad=True)
    run(model, 0), write(model, 1), run(model, 1)
    y = (wx.raw(model[4]).grad * randn(6, 10).requires_grad_()).sum()
    run(model, 2)
    assert added == [4, 4]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_optimizers_over_several_steps(added):
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    ):
        models = pair(accumulate_grad=True)
        optimizers = [make(m.parameters()) for m in models]
        for step in range(4):
            for m, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                run(m, step), run(m, 10 + step)
                optimizer.step()
            same(*models, f"step {step}")
    assert 4 in added
