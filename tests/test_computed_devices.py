"""Computed weights through dtype and device conversions: half types, double, meta, to_empty, strides."""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import (
    computed,
    iterated,
    iterations,
    linear,
    normalized,
    randn,
    set_raw,
    state_of,
    transform_of,
    unit,
    unsettle,
)
from torch import nn

import weightxform as wx
from weightxform.numerics import relative_error

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to_half": (lambda m: m.to(torch.float16), torch.float16),
    "to_tensor": (lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "type": (lambda m: m.type(torch.float64), torch.float64),
}


def double(state):
    return tuple(x.double() for x in state)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_after_a_read(name, training):
    convert, dtype = CONVERSIONS[name]
    layer = linear(33, 17, dtype=torch.float32).train(training)
    _ = layer.weight
    before = state_of(layer)
    convert(layer)
    raw = wx.raw(layer)
    assert raw.dtype == dtype and layer._parameters["weight"] is raw
    assert transform_of(layer).u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(double(state_of(layer)), double(before), rtol=1e-6, atol=1e-6)
    assert layer.weight.dtype == dtype
    set_raw(layer, randn(17, 33, seed=3))
    before = tuple(map(unit, double(state_of(layer))))  # float32 rounded it
    x, g = randn(5, 33), randn(5, 17, seed=1)
    y = layer(x.to(dtype))
    y.backward(g.to(dtype))
    w = raw.detach().double().requires_grad_()
    after = iterated(w, before, int(training))
    weight = normalized(w, after)
    assert y.dtype == raw.grad.dtype == dtype
    assert relative_error(layer.weight, weight) < ROUNDING[dtype]
    assert max(map(relative_error, state_of(layer), after)) < 3e-6, "the state is at least float32"
    nn.functional.linear(x.to(dtype).double(), weight).backward(g.to(dtype).double())
    assert relative_error(raw.grad, w.grad) < 2 * ROUNDING[dtype]


def test_training_in_half_precision_keeps_a_float32_state_over_steps():
    layer = linear(33, 17, dtype=torch.bfloat16)
    assert transform_of(layer).u.dtype == torch.float32
    state = double(state_of(layer))
    for step in range(4):
        set_raw(layer, randn(17, 33, seed=step))
        state = iterated(wx.raw(layer).double(), state)
        assert relative_error(layer.weight, normalized(wx.raw(layer).double(), state)) < ROUNDING[torch.bfloat16]
    assert max(map(relative_error, state_of(layer), state)) < 1e-5


def test_a_half_checkpoint_into_a_float_model_and_back():
    half, full = linear(dtype=torch.float16), linear(seed=2, dtype=torch.float32).eval()
    full.load_state_dict(half.state_dict())
    assert wx.raw(full).dtype == torch.float32
    torch.testing.assert_close(full.weight, normalized(wx.raw(full), state_of(full)))
    half.eval().load_state_dict(full.state_dict())
    assert wx.raw(half).dtype == torch.float16
    assert relative_error(half.weight, normalized(wx.raw(half).double(), double(state_of(half)))) < 8e-4


# meta


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Conv1d(5, 4, 3), nn.ConvTranspose1d(4, 3, 2))


def check_materialised(model: nn.Sequential) -> None:
    assert all(not t.is_meta and torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))
    for i, dim in ((0, 0), (2, 0), (3, 1)):
        u, v = state_of(model[i])
        torch.testing.assert_close(u.norm(), torch.ones(()))
        torch.testing.assert_close(v.norm(), torch.ones(()))
        top = torch.linalg.svdvals(model[i].weight.detach().movedim(dim, 0).flatten(1))[0]
        torch.testing.assert_close(top, torch.ones(()), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("built_on", ["meta", "cpu"])
@pytest.mark.parametrize("attach", ["each", "constrain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_meta_to_empty_reset_parameters(built_on, attach, training):
    torch.manual_seed(0)
    with torch.device(built_on):
        model = build().train(training)
        if attach == "constrain":
            wx.constrain(model, wx.SpectralNorm)
        else:
            for i in (0, 2, 3):
                model[i].weight = wx.ComputedParameter(model[i].weight, wx.SpectralNorm())
    if built_on == "cpu":
        model(torch.randn(2, 5, 6))
        model.to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model[0].weight.is_meta and model(torch.empty(2, 5, 6, device="meta")).shape == (2, 3, 4)

    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(float("nan"))  # whatever to_empty finds in memory
    for i in (0, 2, 3):
        model[i].reset_parameters()
    check_materialised(model)

    x, g = torch.randn(2, 5, 6), torch.randn(2, 3, 4)
    model(x).backward(g)
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "transform" not in k})
    w = {i: wx.raw(model[i]).detach().clone().requires_grad_() for i in (0, 2, 3)}
    values = {f"{i}.weight": normalized(w[i], state_of(model[i]), int(i == 3)) for i in w}
    torch.func.functional_call(plain, values, (x,)).backward(g)
    for i, leaf in w.items():
        torch.testing.assert_close(wx.raw(model[i]).grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_meta_then_a_checkpoint():
    torch.manual_seed(0)
    source = build()
    wx.constrain(source, wx.SpectralNorm)
    unsettle(source)
    saved = source.state_dict()
    for assign in (True, False):
        checkpoint = copy.deepcopy(saved)  # torch marks the metadata of one that it assigned from
        with torch.device("meta"):
            model = build()
            wx.constrain(model, wx.SpectralNorm)
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(checkpoint, assign=assign)
        x = torch.randn(2, 5, 6)
        torch.testing.assert_close(model.eval()(x), source.eval()(x))
        for m in (model, source):
            m.train()
            with torch.no_grad():
                for i in (0, 2, 3):
                    wx.raw(m[i]).mul_(2)
        torch.testing.assert_close(model(x), source(x))
        for i in (0, 2, 3):
            torch.testing.assert_close(state_of(model[i]), state_of(source[i]))


# layouts and shapes


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "slice"])
def test_layouts(layout):
    torch.manual_seed(0)
    if layout == "channels_last":
        layer = nn.Conv2d(4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        x = randn(2, 4, 5, 5)
    else:
        layer = nn.Linear(6, 4, dtype=torch.float64)
        strided = randn(6, 4).T if layout == "transposed" else randn(4, 12)[:, ::2]
        layer.weight = nn.Parameter(strided)
        x = randn(2, 6)
    plain = copy.deepcopy(layer)
    computed(layer)
    before, w = state_of(layer), wx.raw(layer).detach().clone().requires_grad_()
    y = layer(x)
    g = randn(*y.shape, seed=1)
    y.backward(g)
    torch.func.functional_call(plain, {"weight": normalized(w, iterated(w, before))}, (x,)).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    assert iterations(before, state_of(layer), w) == 1
    if layout != "slice":
        assert layer.weight.stride() == wx.raw(layer).stride()


def test_memory_format_conversion_after_a_read():
    torch.manual_seed(0)
    layer = computed(nn.Conv2d(4, 3, 3, dtype=torch.float64)).eval()
    before = layer.weight.detach().clone()
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer.weight, before)


def test_vectors_zero_weights_and_nan():
    layer = nn.LayerNorm(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(5))
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    w = wx.raw(layer).detach().clone().requires_grad_()
    g = randn(5, seed=1)
    layer.weight.backward(g)
    (w / w.norm()).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)

    layer = linear()
    before = state_of(layer)
    set_raw(layer, torch.zeros(4, 6))
    x, g = randn(3, 6), randn(3, 4, seed=1)
    layer(x).backward(g)
    assert not layer.weight.count_nonzero()
    torch.testing.assert_close(wx.raw(layer).grad, g.T @ x, msg="the gradient passes")
    torch.testing.assert_close(state_of(layer), before)

    set_raw(layer, torch.full((4, 6), float("nan")))
    assert layer.weight.isnan().any()
    torch.testing.assert_close(state_of(layer), before)
    set_raw(layer, randn(4, 6, seed=2))
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), iterated(wx.raw(layer), before)))
