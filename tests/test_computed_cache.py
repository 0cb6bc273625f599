"""When a computed weight is computed again, how often its state advances, and where nothing may be kept."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import torch
from computed_oracle import (
    Recorder,
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

import weightxform as wx


def recorded(rows: int = 4, columns: int = 6) -> tuple[nn.Linear, Recorder]:
    layer, recorder = nn.Linear(columns, rows, dtype=torch.float64), Recorder()
    layer.weight = wx.ComputedParameter(layer.weight, recorder)
    return layer, recorder


# once per version


def test_one_computation_and_one_iteration_per_value_of_the_raw_tensor():
    layer = linear()
    before, raw = state_of(layer), wx.raw(layer)
    first = layer.weight
    assert layer.weight is first, "a second read is the same tensor"
    layer(randn(2, 6)), layer(randn(3, 6))
    assert iterations(before, state_of(layer), raw) == 1
    for step in range(3):
        set_raw(layer, randn(4, 6, seed=step))
        before = state_of(layer)
        assert layer.weight is layer.weight
        assert iterations(before, state_of(layer), raw) == 1
        is_normalized_raw(layer)


def test_eval_never_iterates():
    layer = linear().eval()
    before = state_of(layer)
    for step in range(3):
        set_raw(layer, randn(4, 6, seed=step))
        torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), before))
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0


def test_switching_between_train_and_eval():
    layer = linear()
    before, raw = state_of(layer), wx.raw(layer)
    trained = layer.weight.detach()
    for mode in (False, True, False, True):
        layer.train(mode)
        torch.testing.assert_close(layer.weight.detach(), trained)
    assert iterations(before, state_of(layer), raw) == 1, "no second iteration for the same value"
    layer.eval()
    set_raw(layer, randn(4, 6, seed=1))
    before = state_of(layer)
    _ = layer.weight
    layer.train()
    _ = layer.weight, layer.weight
    assert iterations(before, state_of(layer), raw) == 1, "eval did not count as the iteration of this value"


def test_cache_false_is_torch():
    torch.manual_seed(3)
    ours = nn.Linear(9, 7, dtype=torch.float64)
    ours.weight = wx.ComputedParameter(ours.weight, wx.SpectralNorm(cache=False))
    torch.manual_seed(3)
    theirs = parametrizations.spectral_norm(nn.Linear(9, 7, dtype=torch.float64))
    peer = theirs.parametrizations.weight[0]
    with torch.no_grad():
        for a, b in zip((transform_of(ours).u, transform_of(ours).v), (peer._u, peer._v), strict=True):
            b.copy_(unit(randn(*b.shape, seed=b.shape[0])))
            a.copy_(b)
    for step in range(3):
        x, g = randn(5, 9, seed=step), randn(5, 7, seed=10 + step)
        results = []
        for layer, raw in ((ours, wx.raw(ours)), (theirs, theirs.parametrizations.weight.original)):
            layer.train(step != 1)
            y = layer(x) + layer(2 * x)  # two iterations in training
            y.backward(g)
            results.append((y, raw.grad.clone()))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(state_of(ours), (peer._u, peer._v))


def test_the_cached_training_loop_is_torch_with_one_read_a_step():
    """Many steps, one forward each: torch's iterates and ours are the same, cached or not."""
    torch.manual_seed(3)
    ours = wx.spectral_norm(nn.Linear(9, 7, dtype=torch.float64))
    torch.manual_seed(3)
    theirs = parametrizations.spectral_norm(nn.Linear(9, 7, dtype=torch.float64))
    peer = theirs.parametrizations.weight[0]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (ours, theirs)]
    for step in range(6):
        x, g = randn(5, 9, seed=step), randn(5, 7, seed=10 + step)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).backward(g)
            optimizer.step()
        torch.testing.assert_close(wx.raw(ours).grad, theirs.parametrizations.weight.original.grad)
        torch.testing.assert_close(state_of(ours), (peer._u, peer._v))


# flags alone: the value stays, and so does the state


def test_no_grad_then_grad():
    layer = linear()
    before = state_of(layer)
    with torch.no_grad():
        quiet = layer.weight
    x, g = randn(2, 6), randn(2, 4, seed=1)
    layer(x).backward(g)
    assert layer.weight is quiet, "one entry serves both"
    assert iterations(before, state_of(layer), wx.raw(layer)) == 1
    w = wx.raw(layer).detach().clone().requires_grad_()
    (x @ normalized(w, iterated(w, before)).T).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)


def test_inference_mode_then_grad():
    layer = linear()
    before = state_of(layer)
    x, g = randn(2, 6), randn(2, 4, seed=1)
    with torch.inference_mode():
        quiet = layer(x)
        assert layer.weight is layer.weight
    assert iterations(before, state_of(layer), wx.raw(layer)) == 1
    y = layer(x)
    y.backward(g)
    torch.testing.assert_close(y.detach(), quiet.clone())
    assert iterations(before, state_of(layer), wx.raw(layer)) == 1
    w = wx.raw(layer).detach().clone().requires_grad_()
    (x @ normalized(w, iterated(w, before)).T).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).clone(), quiet.clone())


def test_inference_parameters_are_never_stale():
    with torch.inference_mode():
        layer = nn.Linear(6, 4, dtype=torch.float64)
        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
        layer.eval()
        for step in range(3):
            wx.raw(layer).copy_(randn(4, 6, seed=step))
            torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


def test_requires_grad_toggled():
    layer = linear()
    before, raw = state_of(layer), wx.raw(layer)
    assert layer.weight.requires_grad
    raw.requires_grad_(False)
    assert not layer.weight.requires_grad
    frozen = layer.weight
    raw.requires_grad_(True)
    assert layer.weight.requires_grad
    assert iterations(before, state_of(layer), raw) == 1
    torch.testing.assert_close(layer.weight.detach(), frozen)
    x, g = randn(2, 6), randn(2, 4, seed=1)
    layer(x).backward(g)
    w = raw.detach().clone().requires_grad_()
    (x @ normalized(w, iterated(w, before)).T).backward(g)
    torch.testing.assert_close(raw.grad, w.grad)


def test_autocast_inside_and_outside():
    torch.manual_seed(0)
    layer = linear(dtype=torch.float32)
    before = state_of(layer)
    x, g = randn(3, 6, dtype=torch.float32), randn(3, 4, seed=1, dtype=torch.float32)
    outside = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
        inside.backward(g.bfloat16())
        assert layer.weight is layer.weight
    assert inside.dtype == torch.bfloat16 and outside.dtype == torch.float32
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight, outside)
    double = tuple(s.double() for s in before)
    w = wx.raw(layer).detach().double().requires_grad_()
    after = iterated(w, double)
    torch.testing.assert_close(tuple(s.double() for s in state_of(layer)), after, rtol=1e-5, atol=1e-5)
    (x.double() @ normalized(w, after).T).backward(g.double())
    assert wx.raw(layer).grad.dtype == torch.float32
    torch.testing.assert_close(wx.raw(layer).grad.double(), w.grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, outside, layer.bias))


# where nothing may be kept


def test_fake_tensors_leave_nothing_behind():
    for training in (True, False):
        layer = linear().train(training)
        before = state_of(layer)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer.weight
            assert fake.shape == (4, 6) and mode is not None
        assert iterations(before, state_of(layer), wx.raw(layer)) == 0
        real = layer.weight
        assert type(real) is torch.Tensor
        torch.testing.assert_close(real, normalized(wx.raw(layer), state_of(layer)))
        assert iterations(before, state_of(layer), wx.raw(layer)) == int(training)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer.weight is not real
        assert layer.weight is real


def test_make_fx_traces_the_computation():
    layer = linear().eval()
    _ = layer.weight  # a cached weight must not become a constant
    x = randn(2, 6)

    def f(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    w = wx.raw(layer).detach().clone()
    graph = make_fx(f)(w, x)
    other = randn(4, 6, seed=3)
    torch.testing.assert_close(graph(other, x), x @ normalized(other, state_of(layer)).T + layer.bias)
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


def test_shared_memory_is_never_cached():
    layer = linear().eval()
    layer.share_memory()
    _ = layer.weight
    wx.raw(layer).detach().numpy()[:] = randn(4, 6, seed=3).numpy()  # what another process does: no counter moves
    torch.testing.assert_close(layer.weight, normalized(randn(4, 6, seed=3), state_of(layer)))


def test_threads_in_eval():
    layer = linear(64, 64).eval()
    expected = normalized(wx.raw(layer), state_of(layer)).detach()
    wrong = []

    def read() -> None:
        for _ in range(50):
            wx.invalidate(layer)
            if not torch.allclose(layer.weight.detach(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_cached_weight_does_not_keep_the_module_alive():
    gc.collect()
    gc.disable()
    try:
        for create_graph in (False, True):
            layer = linear()
            raw, weight = wx.raw(layer), layer.weight
            (grad,) = torch.autograd.grad(layer(randn(2, 6)), raw, randn(2, 4, seed=1), create_graph=create_graph)
            references = [weakref.ref(x) for x in (layer, raw, weight)]
            del layer, raw, weight, grad
            assert [r() for r in references] == [None] * 3, "freed at once, with no help of the cycle collector"
    finally:
        gc.enable()


def test_dataparallel_replicas(monkeypatch):
    """The code of torch.nn.parallel.replicate, with its broadcast to GPUs replaced by copies on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    model = nn.Sequential(linear(), nn.Tanh(), linear(4, 3, seed=1))
    model(randn(1, 6)).backward(randn(1, 3))  # a weight is cached now
    model.zero_grad()
    set_raw(model[0], randn(4, 6, seed=4))
    before = [state_of(layer) for layer in (model[0], model[2])]
    x, g = randn(4, 6), randn(4, 3, seed=1)
    replicas = module.replicate(model, [0, 1])
    y = torch.cat([replica(part) for replica, part in zip(replicas, x.chunk(2), strict=True)])
    y.backward(g)
    raws = [wx.raw(layer).detach().clone().requires_grad_() for layer in (model[0], model[2])]
    # every replica iterates from the same state and writes nothing
    weights = [normalized(w, iterated(w, state)) for w, state in zip(raws, before, strict=True)]
    expected = nn.functional.linear((x @ weights[0].T + model[0].bias).tanh(), weights[1], model[2].bias)
    torch.testing.assert_close(y, expected)
    expected.backward(g)
    for layer, w, state in zip((model[0], model[2]), raws, before, strict=True):
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)
        assert iterations(state, state_of(layer), w) == 0


def test_the_recorder_sees_each_reason_once():
    layer, recorder = recorded()
    assert layer.weight is layer.weight
    assert recorder.calls == [True]
    set_raw(layer, torch.ones(4, 6))
    assert layer.weight is layer.weight
    assert recorder.calls == [True, True]
    wx.raw(layer).requires_grad_(False)
    assert layer.weight is layer.weight
    assert recorder.calls == [True, True, False]
    layer.eval()
    assert layer.weight is layer.weight
    assert recorder.calls == [True, True, False, False]
