"""u and v that come from elsewhere: from the meta device, from another dtype, from a state dict."""

from __future__ import annotations

import pytest
import torch
from spectral_norm_layers import (
    EXACT,
    HALVES,
    LAYERS,
    STYLES,
    assert_same_state,
    assert_unit,
    axis,
    each_layer,
    each_style,
    input_for,
    like,
    make,
    norm_of,
    put,
    raw,
    state_of,
    transform,
    vectors,
    write,
)
from torch import nn
from torch.testing import assert_close

import weightxform as wx

# meta device


@each_layer
def test_meta_then_to_empty_then_reset_parameters(layer):
    """torch's gives NaN: its vectors are what lay in memory."""
    with torch.device("meta"):
        module = LAYERS[layer]()
        put(module, "computed")
    assert all(x.is_meta for x in vectors(module))
    module.to_empty(device="cpu")
    assert_unit(module)
    for x in vectors(module):
        x.fill_(float("nan"))
    module.reset_parameters()
    assert_unit(module)
    module.eval()
    assert norm_of(module.weight, axis(module)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 0.0, 1e-40, 1e30])
def test_reset_after_to_empty_trusts_no_garbage(garbage):
    module = put(nn.Linear(5, 7), "computed")
    with torch.no_grad():
        for x in vectors(module):
            x.fill_(garbage)
    module.reset_parameters()
    assert_unit(module)
    assert norm_of(module.eval().weight) == pytest.approx(1, abs=0.2)


def test_meta_then_load():
    source = put(make("linear"), "computed")
    with torch.device("meta"):
        module = put(nn.Linear(5, 7, dtype=torch.float64), "computed")
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same_state(module, state_of(source))
    assert torch.equal(module.eval().weight, source.eval().weight)


def test_meta_then_load_by_assignment():
    source = put(make("linear"), "computed")
    with torch.device("meta"):
        module = put(nn.Linear(5, 7, dtype=torch.float64), "computed")
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module.eval().weight, source.eval().weight)


def test_a_learned_gain_survives_meta():
    norm = wx.SpectralNorm(gain=2.5, learn_gain=True).to("meta")
    norm.to_empty(device="cpu")
    assert norm.gain.item() == 2.5
    norm.gain.data.fill_(7)
    norm.reset_parameters()
    assert norm.gain.item() == 2.5


def test_a_learned_gain_of_a_meta_module():
    with torch.device("meta"):
        layer = nn.Linear(5, 7)
    norm = wx.SpectralNorm(gain=2.5, learn_gain=True)
    layer.weight = wx.ComputedParameter(layer.weight, norm)
    assert norm.gain.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert norm.gain.item() == 2.5
    assert norm_of(layer.eval().weight) == pytest.approx(2.5, abs=0.5)


# dtypes


@pytest.mark.parametrize("dtype", HALVES)
def test_half_weights_have_float32_state(dtype):
    for style in STYLES:
        module = put(make("linear", dtype), style)
        assert [x.dtype for x in vectors(module)] == [torch.float32] * 2
        write(module)
        out = module.weight
        assert out.dtype == dtype
        assert norm_of(out) == pytest.approx(1, abs=0.1)
        assert [x.dtype for x in vectors(module)] == [torch.float32] * 2


@each_style
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.half().bfloat16(),
    ],
)
def test_conversion_to_half_keeps_float32_state_unrounded(style, convert):
    module = put(make("linear", torch.float32), style)
    before = [x.clone() for x in vectors(module)]
    convert(module)
    for now, then in zip(vectors(module), before, strict=True):
        assert now.dtype == torch.float32 and torch.equal(now, then)
    out = module(input_for(module))
    out.backward(like(out))
    assert raw(module).grad.dtype == raw(module).dtype == out.dtype
    module.float()
    assert raw(module).dtype == torch.float32 and vectors(module)[0].dtype == torch.float32
    module(input_for(module))


@each_style
def test_conversion_to_double_and_back(style):
    module = put(make("linear", torch.float32), style)
    module.double()
    assert [x.dtype for x in vectors(module)] == [torch.float64] * 2
    out = module(input_for(module))
    assert out.dtype == torch.float64
    module.half()
    assert [x.dtype for x in vectors(module)] == [torch.float32] * 2
    assert module(input_for(module)).dtype == torch.float16


def test_a_half_weight_whose_eps_is_zero_in_half():
    """1e-12 is 0 in float16; torch divides 0 by 0 there."""
    module = put(nn.Linear(5, 7).half(), "computed")
    with torch.no_grad():
        raw(module).fill_(6e-8)  # the least float16
    assert torch.isfinite(module.weight).all()
    assert norm_of(module.weight) == pytest.approx(1, abs=1e-2)


@each_style
def test_conversion_by_swapping_parameters(style):
    module = put(make("linear", torch.float32), style)
    module(input_for(module))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert {t.dtype for t in (raw(module), *vectors(module))} == {torch.float64}
    out = module(input_for(module))
    out.backward(like(out))
    assert raw(module).grad.dtype == torch.float64


# loading


def test_state_loads_before_the_transform_is_attached():
    source = put(make("linear"), "computed")
    alone, norm = wx.SpectralNorm(), wx.SpectralNorm()
    for each in (alone, norm):
        each.load_state_dict(transform(source).state_dict())
    assert torch.equal(norm.u, vectors(source)[0])
    assert_close(alone.eval()(raw(source).detach()), source.eval().weight, **EXACT)
    other = make("linear")
    other.weight = wx.ComputedParameter(other.weight, norm)  # and attaching keeps what was loaded
    assert torch.equal(vectors(other)[0], vectors(source)[0])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_vectors_load_into_float32(assign, dtype):
    module = put(make("linear", torch.float32), "computed")
    checkpoint = {k: v.to(dtype) if "transform" in k else v for k, v in module.state_dict().items()}
    module.load_state_dict(checkpoint, assign=assign)
    assert [x.dtype for x in vectors(module)] == [torch.float32] * 2
    assert norm_of(module.eval().weight) == pytest.approx(1, abs=0.05)


def test_a_double_checkpoint_assigned_to_a_float_module():
    source = put(make("linear"), "computed")
    module = put(make("linear", torch.float32, seed=5), "computed")
    module.load_state_dict(source.state_dict(), assign=True)
    assert {t.dtype for t in (raw(module), *vectors(module))} == {torch.float64}
    assert_close(module.eval().weight, source.eval().weight, **EXACT)


def test_loaded_vectors_follow_the_weight_they_are_attached_to():
    source = put(make("linear"), "computed")
    norm = wx.SpectralNorm()
    norm.load_state_dict(transform(source).state_dict())
    norm.attach(make("linear", torch.bfloat16).weight)
    assert [x.dtype for x in (norm.u, norm.v)] == [torch.float32] * 2
    assert_close(norm.u.double(), vectors(source)[0], rtol=1e-6, atol=1e-6)


def test_a_vector_of_the_wrong_size_is_reported():
    module = put(make("linear"), "computed")
    checkpoint = dict(module.state_dict(), **{"weight_transform.u": torch.ones(3)})
    before = [x.clone() for x in vectors(module)]
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_transform\.u"):
        module.load_state_dict(checkpoint)
    assert torch.equal(vectors(module)[0], before[0])


@each_style
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_a_loaded_module_goes_on_as_the_saved_one(style, order):
    """Train, eval, train, eval after loading into a module that was wrapped anew."""
    module = put(make("conv2d"), style, order=order)
    x = input_for(module)
    for step in range(3):
        write(module, seed=step)
        module(x)
    twin = put(make("conv2d", seed=5), style, seed=6, order=order)
    twin.load_state_dict(module.state_dict(), strict=True)
    for step, training in enumerate((True, False, True, False)):
        outs = []
        for m in (module, twin):
            write(m, seed=step)
            outs.append(m.train(training)(x))
        assert_close(*outs, **EXACT)


@each_style
def test_strict_loading_reports_each_key(style):
    module = put(make("linear"), style)
    for key in module.state_dict():
        rest = {k: v for k, v in module.state_dict().items() if k != key}
        result = put(make("linear"), style).load_state_dict(rest, strict=False)
        assert not result.unexpected_keys and set(result.missing_keys) <= {key}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        module.load_state_dict({**module.state_dict(), "nonsense": torch.ones(1)})
