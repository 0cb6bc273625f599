"""wx.SpectralNorm in its module: the raw parameter, keys, removal, other parametrizations; and wx.spectral_norm."""

from __future__ import annotations

import pytest
import torch
from spectral_norm_layers import (
    EXACT,
    assert_same_state,
    assert_same_vectors,
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
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import weightxform as wx

# the module


@each_style
@each_layer
def test_the_module_keeps_its_raw_parameter(layer, style):
    module = make(layer)
    parameter = module.weight
    size, stride = parameter.size(), parameter.stride()
    put(module, style)
    assert raw(module) is parameter
    assert isinstance(module, type(make(layer)))
    assert any(p is parameter for p in module.parameters())
    assert "weight" not in module._buffers
    assert not isinstance(module.weight, nn.Parameter)
    assert (module.weight.size(), module.weight.stride()) == (size, stride)
    u, v = vectors(module)
    assert u.shape == (size[axis(module)],) and v.shape == (parameter.numel() // size[axis(module)],)
    assert {id(u), id(v)} <= {id(b) for b in module.buffers()}


def test_state_dict_keys():
    ours = put(make("linear"), "computed")
    assert set(ours.state_dict()) == {"weight", "bias", "weight_transform.u", "weight_transform.v"}
    assert set(put(make("linear"), "parametrize").state_dict()) == {
        "bias", "parametrizations.weight.original", "parametrizations.weight.0.u", "parametrizations.weight.0.v"
    }  # fmt: skip


@each_style
@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_kept(style, requires_grad):
    module = make("linear")
    module.weight.requires_grad_(requires_grad)
    put(module, style)
    assert raw(module).requires_grad == requires_grad
    assert module.weight.requires_grad == requires_grad
    x = input_for(module).requires_grad_()
    out = module(x)
    out.backward(like(out))
    assert x.grad is not None
    assert (raw(module).grad is not None) == requires_grad


@each_style
def test_weight_and_bias_and_taking_one_away(style):
    module = put(make("linear"), style)
    put(module, style, name="bias")
    assert norm_of(module.bias.reshape(1, -1)) == pytest.approx(1)
    bias = module.bias.detach().clone()
    if style == "computed":
        wx.bake(module, "bias")
    else:
        parametrize.remove_parametrizations(module, "bias")
    assert type(module.bias) is nn.Parameter
    assert torch.equal(module.bias, bias)
    before = raw(module)
    assert module.weight is not before and norm_of(module.weight) == pytest.approx(1, abs=0.1)


@each_style
def test_baking_in_eval_keeps_the_output(style):
    module = put(make("conv2d"), style)
    for step in range(3):
        write(module, seed=step)
        module(input_for(module))
    module.eval()
    expected = module(input_for(module)).detach()
    if style == "computed":
        wx.bake(module, "weight")
    else:
        parametrize.remove_parametrizations(module, "weight")
    assert type(module.weight) is nn.Parameter
    assert_close(module(torch.clone(input_for(make("conv2d")))), expected, **EXACT)
    assert "weight" in module._parameters and len(module.state_dict()) == 2


def test_stacked_under_parametrize():
    """Ours on ours, ours on torch's, torch's on ours: each iterates as torch's on torch's."""
    results = []
    for first, second in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        module = make("linear")
        torch.manual_seed(1)
        for theirs in (first, second):
            if theirs:
                parametrizations.spectral_norm(module)
            else:
                parametrize.register_parametrization(module, "weight", wx.SpectralNorm())
        for step in range(3):
            write(module, seed=step)
            out = module.weight
        out.backward(like(out))
        results.append((out.detach(), raw(module).grad))
    for out, grad in results[:-1]:
        assert_close(out, results[-1][0], **EXACT)
        assert_close(grad, results[-1][1], **EXACT)


def test_other_parametrizations_beside_ours():
    module = make("linear")
    parametrize.register_parametrization(module, "weight", wx.SpectralNorm())
    parametrizations.weight_norm(module, "bias", dim=None)
    assert norm_of(module.weight) == pytest.approx(1, abs=0.1)
    parametrize.remove_parametrizations(module, "weight")
    assert parametrize.is_parametrized(module, "bias")


# the function wx.spectral_norm


@each_layer
def test_the_drop_in_has_the_arguments_of_torch(layer):
    ours, theirs = make(layer), make(layer)
    torch.manual_seed(1)
    assert wx.spectral_norm(ours, "weight", 2, 1e-6, 0) is ours
    torch.manual_seed(1)
    parametrizations.spectral_norm(theirs, "weight", 2, 1e-6, 0)
    assert_close(ours.weight, theirs.weight, **EXACT)
    assert_same_vectors(ours, theirs)
    assert transform(ours).dim == 0


@pytest.mark.parametrize("dim", [-1, -4, 2, 3])
def test_any_axis(dim):
    ours, theirs = make("conv2d"), make("conv2d")
    torch.manual_seed(1)
    wx.spectral_norm(ours, dim=dim)
    torch.manual_seed(1)
    parametrizations.spectral_norm(theirs, dim=dim)
    assert_close(ours.weight, theirs.weight, **EXACT)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "wight"}, ValueError, "name must be that of a Parameter.*'wight'"),
        ({"name": "in_features"}, ValueError, "name must be"),
        ({"name": 3}, TypeError, "name must be a str, got 3"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations must be at least 1, got 0"),
        ({"n_power_iterations": -2}, ValueError, "n_power_iterations must be at least 1, got -2"),
        ({"n_power_iterations": 1.0}, TypeError, "n_power_iterations must be an int, got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": "1e-12"}, TypeError, "eps must be a number"),
        ({"dim": 2}, IndexError, r"dim must be in \[-2, 1\].*got 2"),
        ({"dim": -3}, IndexError, r"dim must be in \[-2, 1\].*got -3"),
        ({"dim": 0.0}, TypeError, "dim must be an int"),
    ],
)
def test_errors_leave_the_module_alone(arguments, error, message):
    module = make("linear")
    before, kind, parameter = state_of(module), type(module), module.weight
    with pytest.raises(error, match=message):
        wx.spectral_norm(module, **arguments)
    assert type(module) is kind and module.weight is parameter and not list(module.children())
    assert_same_state(module, before)


def test_weights_that_cannot_be_normalized():
    complex_layer = nn.Linear(3, 4, dtype=torch.cfloat)
    with pytest.raises(TypeError, match=r"must be float64, float32, bfloat16 or float16, got complex64\[4, 3\]"):
        wx.spectral_norm(complex_layer)
    scalar = nn.PReLU()
    scalar.weight = nn.Parameter(torch.tensor(0.25))
    with pytest.raises(ValueError, match="at least one axis"):
        wx.spectral_norm(scalar)
    integers = nn.Module()
    integers.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="int64"):
        wx.spectral_norm(integers)
    with pytest.raises(ValueError, match="must be that of a Parameter"):  # a buffer, unlike torch
        wx.spectral_norm(nn.BatchNorm1d(3), "running_mean")
    with pytest.raises(ValueError, match="must be that of a Parameter"):
        wx.spectral_norm(nn.Linear(3, 4, bias=False), "bias")
    with pytest.raises(TypeError, match="module must be an nn"):
        wx.spectral_norm(torch.ones(3, 3))
    for module in (complex_layer, scalar, integers):
        assert not list(module.children()) and type(module.weight) is nn.Parameter


def test_one_instance_serves_one_weight():
    norm = wx.SpectralNorm()
    first, second = make("linear"), make("linear")
    first.weight = wx.ComputedParameter(first.weight, norm)
    with pytest.raises(ValueError, match="serves another weight already"):
        second.weight = wx.ComputedParameter(second.weight, norm)
    assert type(second) is nn.Linear and not list(second.children())
