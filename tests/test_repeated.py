"""Weights that are computed again by what was prepared are those computed from scratch, whatever happened since."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from computed_oracle import Squashed, randn, unit
from repeated_models import LAYERS, Count, batch, pair, run, same, train, write
from torch import nn

import weightxform as wx
from weightxform import backends


@pytest.fixture
def count(monkeypatch) -> Count:
    return Count(monkeypatch)


def transform(model: nn.Module) -> nn.Module:
    return model[4].weight_transform


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bound": 0.7}, {"order": "v_first"}, {"gain": 2.0}, {"learn_gain": True}], ids=str
)
def test_steps_are_those_from_scratch(dtype, options, count):
    train(pair(dtype, **options), lambda m: None)
    assert count.forwards == [4] * 4


# events between steps; afterwards numbers must be those of weights computed from scratch


def option(name: str, value: object):
    def event(m: nn.Module) -> None:
        setattr(transform(m), name, value)

    event.__name__ = f"{name}={value}"
    return event


def u_in_place(m):
    with torch.no_grad():
        transform(m).u.copy_(unit(randn(6, seed=77)))


def u_set(m):
    transform(m).u = unit(randn(6, seed=77))


def u_registered(m):
    transform(m).register_buffer("u", unit(randn(6, seed=77)))


def u_put_in_the_dict(m):
    transform(m)._buffers["u"] = unit(randn(6, seed=77))


def u_data(m):
    transform(m).u.data = unit(randn(6, seed=77))


def u_data_not_contiguous(m):
    transform(m).u.data = unit(randn(12, seed=77))[::2]


def another_transform(m):
    other = copy.deepcopy(transform(m))
    other.u.copy_(unit(randn(6, seed=77)))
    m[4].weight_transform = other


def raw_data(m):
    wx.raw(m[4]).data = randn(6, 10, seed=5)


def raw_data_everywhere(m):
    for i in LAYERS:
        wx.raw(m[i]).data = randn(*wx.raw(m[i]).shape, seed=5)


def raw_data_turned_in_place(m):
    wx.raw(m[6]).data = wx.raw(m[6]).data.t()
    wx.raw(m[6]).grad = None


def raw_replaced(m):
    m[4].weight = nn.Parameter(randn(6, 10, seed=5))


def unseen_write(m):
    wx.raw(m[4]).data.add_(1)
    wx.invalidate(m)


def unseen_write_of_one(m):
    wx.raw(m[4]).data.add_(1)
    wx.invalidate(m[4])


def frozen(m):
    wx.raw(m[4]).requires_grad_(False)


def baked(m):
    wx.bake(m[4])


def refreshed(m):
    wx.refresh(m)


def reset(m):
    transform(m).reset(wx.raw(m[4]))


def eval_and_train(m):
    m.eval()
    m.train()


def evaluating(m):
    m.eval()


def one_evaluating(m):
    m[4].eval()


def loaded(m):
    m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()})


def loaded_by_assignment(m):
    m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}, assign=True)


def loaded_without_states(m):
    m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items() if "transform" not in k}, strict=False)


def transform_loaded(m):
    transform(m).load_state_dict({k: 1.1 * v for k, v in transform(m).state_dict().items()})


def stacked(m):
    m[4].weight = wx.ComputedParameter(m[4].weight, Squashed())


def cast_and_back(m):
    m.float()
    m.double()


def transform_cast_and_back(m):
    transform(m).float()
    transform(m).double()


def assigned(m):
    wx.assign(m[4], "weight", randn(6, 10, seed=9))


def read_one_first(m):
    assert m[6].weight.shape == (6, 6)


def read_without_grad(m):
    with torch.no_grad():
        m(randn(1, 3, 6))


def read_in_inference_mode(m):
    with torch.inference_mode():
        m(randn(1, 3, 6))


def read_in_autocast(m):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m(randn(1, 3, 6))


def called_with_another_raw(m):
    torch.func.functional_call(m, {"4.weight": randn(6, 10, seed=3)}, (randn(1, 3, 6),))


def reference_forced(m):
    with wx.backend("reference"):
        m(randn(1, 3, 6))


def layer_copied(m):
    m[4] = copy.deepcopy(m[4])


def hooked(m):
    wx.raw(m[4]).register_hook(lambda g: 2 * g)


def read_in_a_backward(m):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda g: m[4].weight.detach().sum() * g)
    y.backward()


EVENTS = [
    option("n_power_iterations", 3), option("n_power_iterations", 0), option("eps", 0.3), option("bound", 0.5),
    option("fixed_gain", 2.0), option("order", "v_first"), option("cache", False),
    u_in_place, u_set, u_registered, u_put_in_the_dict, u_data, u_data_not_contiguous, another_transform, raw_data,
    raw_data_everywhere, raw_data_turned_in_place, raw_replaced, unseen_write, unseen_write_of_one, frozen, baked,
    refreshed, reset, eval_and_train, evaluating, one_evaluating, loaded, loaded_by_assignment, loaded_without_states,
    transform_loaded, stacked, cast_and_back, transform_cast_and_back, assigned, read_one_first, read_without_grad,
    read_in_inference_mode, read_in_autocast, called_with_another_raw, reference_forced, layer_copied, hooked,
    read_in_a_backward,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
def test_what_may_happen_between_steps(event, count):
    train(pair(), event)
    assert 4 in count.forwards[:2], "the steps before were computed again"


def gain_written(m):
    with torch.no_grad():
        transform(m).gain.fill_(2.5)


def gain_frozen(m):
    transform(m).gain.requires_grad_(False)


def gain_replaced(m):
    transform(m).gain = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))


def gain_registered(m):
    transform(m).register_parameter("gain", nn.Parameter(torch.tensor(1.7, dtype=torch.float64)))


def gain_data(m):
    transform(m).gain.data = torch.tensor(1.7, dtype=torch.float32)


def gain_taken_away(m):
    transform(m).gain = None


GAINS = [gain_written, gain_frozen, gain_replaced, gain_registered, gain_data, gain_taken_away, u_registered]


@pytest.mark.parametrize("event", GAINS, ids=lambda f: f.__name__)
def test_what_may_happen_to_a_learned_gain(event, count):
    train(pair(learn_gain=True), event)
    assert count.forwards[:2] == [4, 4]


@pytest.mark.parametrize("written", [True, False], ids=["stale", "fresh"])
def test_buffers_handed_in_are_those_that_are_read_and_advanced(written, count):
    models = pair()
    for step in range(3):
        for m in models:
            write(m, step)
            run(m, step)
    results = []
    for m in models:
        if written:
            write(m, 9)
        buffers = {k: unit(randn(*v.shape, seed=4)) for k, v in m.named_buffers()}
        y = torch.func.functional_call(m, buffers, (randn(1, 3, 6),))
        results.append((y.detach(), *buffers.values()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    same(*models)


def test_a_forced_reference_computes_and_the_kernel_afterwards(count):
    together, alone = pair()
    train((together, alone), lambda m: None)
    del count.forwards[:]
    with wx.backend("reference"):
        write(together, 7), write(alone, 7)
        assert torch.equal(run(together, 7), run(alone, 7))
        assert count.forwards == []
    together.zero_grad(), alone.zero_grad()
    train((together, alone), lambda m: None)
    assert count.forwards[-4:] == [4] * 4


def test_a_backend_forced_between_forward_and_backward():
    together, alone = pair()
    run(together, 0), run(alone, 0), write(together, 1), write(alone, 1)
    x, g = batch(1)
    outs = [m(x) for m in (together, alone)]
    with wx.backend("reference"):
        assert backends.forced == "reference"
        for y in outs:
            y.backward(g)
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_midst_of_training_and_its_original_both_train(how, count):
    models = pair()
    train(models, lambda m: None)
    copies = tuple(how(m) for m in models)
    del count.forwards[:]
    for several in (models, copies, models):
        train(several, lambda m: None)
    assert 4 in count.forwards


def test_weights_and_states_of_folded_layers_take_one_step_between_them():
    def model(fold: bool) -> nn.Sequential:
        torch.manual_seed(0)
        m = wx.constrain(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double(), wx.SpectralNorm, fold=fold)
        with torch.no_grad():
            for i, layer in enumerate(m):
                layer.weight_transform.u.copy_(unit(randn(8, seed=i)))
        return m

    for order in ("weights first", "weights before", "weights after"):
        folded, plain = model(True), model(False)
        for step in range(5):
            for m in (folded, plain):
                write(m, step)
                if order == "weights before" or (order == "weights first" and step == 0):
                    _ = [layer.weight for layer in m]
                m(randn(2, 8, seed=step)).backward(randn(2, 8, seed=70 + step))
                if order == "weights after":
                    _ = [layer.weight for layer in m]
            for a, b in zip(folded.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, s=step, o=order: f"{o}, step {s}: {text}")


def test_a_tie_left_by_the_layer_that_the_group_knows():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
    model[1].weight = model[0].weight
    wx.constrain(model, wx.SpectralNorm)
    for step in range(4):
        if step == 2:
            model[0].weight = nn.Parameter(randn(4, 4, seed=3))
        write(model, step)
        model(randn(2, 4)).backward(randn(2, 4, seed=step))
    for layer in model:
        raw, t = wx.raw(layer).detach(), layer.weight_transform
        torch.testing.assert_close(layer.weight.detach(), raw / (t.u @ raw @ t.v))
