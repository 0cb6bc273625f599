"""Weights that were computed again: their backward passes, failures, memory and threads."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from computed_oracle import linear, randn, unit
from repeated_models import LAYERS, Count, FromScratch, batch, pair, run, same, write
from torch import nn

import weightxform as wx
from weightxform.spectral_norm import repeated


@pytest.fixture
def count(monkeypatch) -> Count:
    return Count(monkeypatch)


# backward


def test_a_write_between_forward_and_backward_raises():
    model, _ = pair()
    run(model, 0), write(model, 1)
    y = model(batch(1)[0])
    write(model, 2)
    with pytest.raises(RuntimeError, match="written between"):
        y.backward(batch(1)[1])


def test_members_that_nobody_used_may_be_written():
    models = pair()
    for m in models:
        run(m, 0), write(m, 1)
        weights = [m[i].weight for i in LAYERS]
        with torch.no_grad():
            wx.raw(m[6]).add_(1)
        weights[2].backward(randn(6, 10, seed=8))
    same(*models)


def test_second_derivatives_and_gradients_by_name():
    models = pair(learn_gain=True)
    results = []
    for m in models:
        run(m, 0), write(m, 1)
        x, g = batch(1)
        raws = [wx.raw(m[i]) for i in LAYERS]
        first = torch.autograd.grad(m(x), raws, g, create_graph=True)
        second = torch.autograd.grad(sum((f**2).sum() for f in first), [*raws, m[4].weight_transform.gain])
        m(x).backward(g, inputs=[raws[1]])
        results.append((*first, *second, raws[1].grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_many_backwards_and_sparse_gradients(count):
    def model(transform: type) -> nn.ModuleList:
        torch.manual_seed(0)
        m = nn.ModuleList([nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)]).double()
        for layer in m:
            layer.weight = wx.ComputedParameter(layer.weight, transform())
        return m

    torch.manual_seed(0)
    together = wx.constrain(nn.ModuleList([nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)]).double(), wx.SpectralNorm)
    alone = model(FromScratch)
    for a, b in zip(together.buffers(), alone.buffers(), strict=True):
        a.copy_(unit(randn(*a.shape, seed=a.numel()))), b.copy_(a)
    for step in range(3):
        for m in (together, alone):
            write(m, step)
            for i in range(2):
                y = m[1](m[0](torch.tensor([1, 3, 3])))
                y.backward(randn(3, 4, seed=i), retain_graph=True)
                y.backward(randn(3, 4, seed=5 + i))
        same(together, alone)
    assert count.forwards == [2, 2]


def test_channels_last_and_transposed_weights(count):
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 16))
        m = m.to(memory_format=torch.channels_last)
        m[3].weight = nn.Parameter(m[3].weight.detach().t().contiguous().t())
        return m

    together, alone = wx.constrain(model(), wx.SpectralNorm), model()
    for i in (0, 1, 3):
        alone[i].weight = wx.ComputedParameter(alone[i].weight, FromScratch())
        for name in ("u", "v"):
            ours, theirs = (getattr(m[i].weight_transform, name) for m in (together, alone))
            ours.copy_(unit(randn(*ours.shape, seed=i, dtype=torch.float32))), theirs.copy_(ours)
    for step in range(3):
        for m in (together, alone):
            write(m, step)
            m(randn(2, 3, 5, 5, seed=step, dtype=torch.float32)).backward(randn(2, 16, seed=9, dtype=torch.float32))
        same(together, alone)
    assert count.forwards == [3, 3]


def test_the_numbers_do_not_depend_on_threads():
    results = []
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = wx.constrain(nn.Sequential(*(nn.Linear(300, 300) for _ in range(6))), wx.SpectralNorm)
        for step in range(3):
            write(model, step)
            model.zero_grad()
            for layer in model:
                layer.weight.backward(randn(300, 300, seed=step, dtype=torch.float32))
            torch.autograd.backward([m.weight for m in model], [randn(300, 300, dtype=torch.float32)] * 6)
        results.append([*(wx.raw(m).grad for m in model), *model.buffers()])
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


# failures, memory, threads


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("single", [False, True], ids=["group", "alone"])
def test_an_exception_in_the_computation_leaves_nothing_behind(error, single, monkeypatch):
    models = pair()
    if single:
        models = (nn.Sequential(*[nn.Identity()] * 4, linear(), nn.Identity(), nn.Identity()), models[1])
    ours = models[0]
    _ = ours[4].weight
    write(ours, 1)
    before = [b.clone() for b in ours.buffers()]

    def broken(self):
        raise error("broken")

    with monkeypatch.context() as m:
        m.setattr(repeated.Prepared, "forward", broken)
        with pytest.raises(error, match="broken"):
            _ = ours[4].weight
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), before, strict=True))
    raw, t = wx.raw(ours[4]).detach(), ours[4].weight_transform
    u = unit(raw @ t.v)
    v = unit(raw.T @ u)
    torch.testing.assert_close(ours[4].weight.detach(), raw / (u @ raw @ v))


def test_old_values_are_freed_before_new_ones_are_computed(monkeypatch):
    model, _ = pair()
    run(model, 0), write(model, 1)
    alive: list[int] = []
    forward = repeated.Prepared.forward
    old = [weakref.ref(model[i].weight) for i in LAYERS]

    def watching(self):
        alive.append(sum(r() is not None for r in old))
        return forward(self)

    write(model, 2)
    monkeypatch.setattr(repeated.Prepared, "forward", watching)
    run(model, 2)
    assert alive == [0]


def test_a_deleted_model_is_collected():
    model, _ = pair(learn_gain=True)
    run(model, 0), write(model, 1), run(model, 1)
    refs = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters()), weakref.ref(model[4].weight)]
    del model
    gc.collect()
    assert [r() is None for r in refs] == [True] * len(refs)


def test_threads_that_read_one_model_get_its_weights():
    torch.manual_seed(0)
    model = wx.constrain(nn.Sequential(*(nn.Linear(40, 40) for _ in range(8))), wx.SpectralNorm)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for layer in model:
                torch.testing.assert_close(layer.weight.detach() * sigma[layer], wx.raw(layer).detach(), msg="stale")
        except BaseException as e:
            errors.append(e)

    for training in (True, False):
        model.train(training)
        for step in range(10):
            write(model, step)
            if training:
                _ = model[0].weight
            sigma = {m: m.weight_transform.u @ wx.raw(m).detach() @ m.weight_transform.v for m in model}
            threads = [threading.Thread(target=read) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not errors, errors[0]


def test_a_transform_that_sets_its_state_is_compiled_once():
    class Growing(wx.Transform):
        def attach(self, raw, module=None, name="weight"):
            self.register_buffer("u", torch.ones(raw.shape[0], dtype=raw.dtype))

        def compute(self, raw, advance):
            if advance:
                self.u = (self.u + 1).detach()
            return raw * self.u[:, None]

    layer = nn.Linear(3, 4)
    layer.weight = wx.ComputedParameter(layer.weight, Growing())
    graphs: list[object] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(3):
        compiled(torch.randn(2, 3))
    assert len(graphs) == 1 and layer.weight_transform.u[0] == 4


def test_train_once_more_is_no_change(count):
    model, _ = pair()
    for step in range(3):
        model.train()
        run(model, step), write(model, step)
    assert count.forwards == [4, 4]


@pytest.mark.parametrize("alive", [False, True], ids=["", "graph alive"])
@pytest.mark.parametrize(
    "convert", [lambda m: m.float(), lambda m: m.load_state_dict(m.state_dict())], ids=["cast", "load"]
)
def test_swapping_parameters_on_conversion(convert, alive):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (pair()[0], nn.Sequential(linear())):
            for step in range(3):
                write(model, step)
                y = model[-1].weight
                y.backward(randn(*y.shape), retain_graph=True)
            y = y if alive else None
            convert(model)
            assert torch.isfinite(model[-1].weight).all()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
