"""wx.SpectralNorm behaves as torch.nn.utils.parametrizations.spectral_norm, except where it says otherwise."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from spectral_norm_layers import (
    LAYERS,
    STYLES,
    assert_same_state,
    axis,
    input_for,
    like,
    make,
    norm_of,
    pair,
    put,
    put_torch,
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

style = pytest.mark.parametrize("style", STYLES)
layer = pytest.mark.parametrize("layer", LAYERS)
forward_ad = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def assert_same_vectors(ours: nn.Module, theirs: nn.Module, **tolerance) -> None:
    for a, b in zip(vectors(ours), vectors(theirs), strict=True):
        assert_close(a, b, **(tolerance or EXACT))


# the iterates


@style
@layer
@pytest.mark.parametrize("training", [True, False])
def test_registration_draws_and_iterates_as_torch(layer, style, training):
    module = make(layer).train(training)
    ours = put(copy.deepcopy(module), style)
    after_ours = torch.get_rng_state()
    theirs = put_torch(module)
    assert torch.equal(after_ours, torch.get_rng_state())
    assert_same_vectors(ours, theirs)


@style
@layer
@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_training_steps_as_torch(layer, style, n_power_iterations):
    """Values, gradients and vectors over five optimizer steps, then eval; one read a step on both sides."""
    ours, theirs = pair(layer, style, n_power_iterations=n_power_iterations)
    if style == "computed":  # what torch's registration reads once more
        assert_same_vectors(ours, theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    x = input_for(ours)
    for step in range(5):
        write(ours, seed=step)
        write(theirs, seed=step)
        outs = [m(x) for m in (ours, theirs)]
        assert_close(*outs, **EXACT)
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.backward(like(out, step))
            optimizer.step()
        assert_close(raw(ours).grad, raw(theirs).grad, **EXACT)
        assert_same_vectors(ours, theirs)
    ours.eval(), theirs.eval()
    assert_close(ours.weight, theirs.weight, **EXACT)
    assert_close(ours(x), theirs(x), **EXACT)


@style
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_other_dtypes_as_torch(style, dtype, tolerance):
    """torch iterates in half precision, we in float32: equal within what half precision can say."""
    ours, theirs = pair("linear", style, dtype)
    assert ours.weight.dtype == dtype
    assert_close(ours.weight, theirs.weight, rtol=tolerance, atol=tolerance)
    out = ours.weight
    out.backward(like(out))
    theirs.weight.backward(like(out))
    assert raw(ours).grad.dtype == dtype
    assert_close(raw(ours).grad, raw(theirs).grad, rtol=tolerance, atol=tolerance)


def test_once_per_value_of_the_weight_not_once_per_read():
    """The one deliberate difference; see the next test for torch's way."""
    ours = put(make("linear"), "computed")
    first = ours.weight
    before = state_of(ours)
    assert ours.weight is first
    assert_same_state(ours, before)
    write(ours)
    second = ours.weight
    once = [x.clone() for x in vectors(ours)]
    assert not torch.equal(once[0], before["weight_transform.u"])
    with torch.no_grad():
        assert torch.equal(ours.weight, second)
    raw(ours).requires_grad_(False)  # computed again, and from the same vectors
    assert_close(ours.weight, second.detach(), **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(once, vectors(ours), strict=True))


@pytest.mark.parametrize("style", ["computed, cache=False", "parametrize"])
def test_once_per_read_as_torch(style):
    module = make("linear")
    ours = put(copy.deepcopy(module), style.split(",")[0], **({"cache": False} if "cache" in style else {}))
    theirs = put_torch(module)
    for _ in range(4):
        before = vectors(ours)[0].clone()
        assert_close(ours.weight, theirs.weight, **EXACT)
        assert not torch.equal(before, vectors(ours)[0])
        assert_same_vectors(ours, theirs)
    with torch.no_grad():
        assert_close(ours.weight, theirs.weight, **EXACT)
    assert_same_vectors(ours, theirs)


@style
@layer
def test_norm_is_one_by_svd(layer, style):
    ours = put(make(layer), style)
    for step in range(60):
        write(ours, 1e-9, seed=step)
        weight = ours.weight
    assert norm_of(weight, axis(ours)) == pytest.approx(1, abs=2e-3)
    assert norm_of(ours.eval().weight, axis(ours)) == pytest.approx(1, abs=2e-3)


@style
def test_value_on_a_diagonal(style):
    module = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.diag(torch.tensor([1.0, -4.0, 2.0])))
    put(module, style, n_power_iterations=20)
    assert_close(module.weight, torch.diag(torch.tensor([0.25, -1.0, 0.5]).double()), rtol=0, atol=1e-9)


# the module


@style
@layer
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


@style
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


@style
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


@style
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


# eval, and several forwards


@style
@layer
def test_eval_is_the_last_training_output(layer, style):
    module = put(make(layer), style)
    x = input_for(module)
    for step in range(3):
        write(module, seed=step)
        last = module(x)
    before = [t.clone() for t in vectors(module)]
    module.eval()
    assert_close(module(x), last, **EXACT)
    assert torch.equal(module(x), module(x))
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(module), strict=True))


@style
def test_two_forwards_one_backward(style):
    """The pattern of a GAN, also where the vectors move between the forwards."""
    module = make("linear")
    options = {"cache": False} if style == "computed" else {}
    ours, theirs = put(copy.deepcopy(module), style, **options), put_torch(module)
    x, y = input_for(ours, 5), input_for(ours, 6)
    for m in (ours, theirs):
        real, fake = m(x), m(y)
        torch.autograd.backward([real, fake], [like(real, 7), like(fake, 8)])
    assert_close(raw(ours).grad, raw(theirs).grad, **EXACT)
    assert_close(ours.bias.grad, theirs.bias.grad, **EXACT)


def test_one_weight_serves_two_forwards_and_two_backwards():
    ours = put(make("linear"), "computed")
    weight = ours.weight
    real, fake = ours(input_for(ours, 5)), ours(input_for(ours, 6))
    real.backward(like(real))
    fake.backward(like(fake))
    assert ours.weight is weight
    grad = raw(ours).grad
    both = put(make("linear"), "computed")
    real, fake = both(input_for(ours, 5)), both(input_for(ours, 6))
    torch.autograd.backward([real, fake], [like(real), like(fake)])
    assert_close(grad, raw(both).grad, **EXACT)


@style
def test_mixed_train_and_eval_forwards_gradcheck(style):
    module = put(make("linear"), style)
    first = [x.clone() for x in vectors(module)]

    def run(x):
        module.train()
        with torch.no_grad():
            for vector, start in zip(vectors(module), first, strict=True):
                vector.copy_(start)
        one = module(x)
        module.eval()
        two = module(x)
        module.train()
        return one + module(x) * two

    torch.autograd.gradcheck(run, (input_for(module).requires_grad_(),))


@forward_ad
@layer
def test_derivatives_in_the_raw_weight(layer):
    """First and second, reverse and forward, in eval mode (u and v constant)."""
    module = make(layer)
    norm = wx.SpectralNorm().eval()
    norm.attach(module.weight, module)

    def weight(raw):
        return norm.compute(raw, advance=False)

    x = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(weight, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(weight, (x,))


def test_a_training_step_moves_vectors_and_weight():
    for style in STYLES:
        module = put(make("conv2d"), style)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        before = state_of(module)
        for _ in range(2):
            out = module(input_for(module))
            optimizer.zero_grad()
            out.backward(like(out))
            optimizer.step()
        after = module.state_dict()
        assert all(not torch.equal(after[key], value) for key, value in before.items())


def test_no_cycle_keeps_a_computed_weight_alive():
    module = put(make("linear"), "parametrize")
    gc.disable()
    try:
        weight = module.weight
        alive = weakref.ref(weight)
        del weight
        assert alive() is None
    finally:
        gc.enable()


# vectors


@style
@pytest.mark.parametrize("training", [True, False])
def test_a_vector_is_divided_by_its_norm(style, training):
    module = make("linear").train(training)
    ours, theirs = put(copy.deepcopy(module), style, name="bias"), put_torch(module, "bias")
    assert_close(ours.bias, theirs.bias, **EXACT)
    assert transform(ours, "bias").u is None and not list(ours.buffers())
    grads = []
    for m in (ours, theirs):
        (first,) = torch.autograd.grad(m.bias, raw(m, "bias"), like(m.bias), create_graph=True)
        (second,) = torch.autograd.grad(first, raw(m, "bias"), like(first, 5))
        grads.append((first, second))
    assert_close(grads[0], grads[1], **EXACT)


@forward_ad
@pytest.mark.parametrize("bound", [None, 0.5, 1e3])
@pytest.mark.parametrize("gain", [None, 1.7])
def test_derivatives_of_a_vector(bound, gain):
    raw = make("linear").bias.detach().requires_grad_()
    norm = wx.SpectralNorm(bound=bound, gain=gain or 1.0, learn_gain=gain is not None)
    norm.attach(raw)

    def weight(raw, *gain):
        return torch.func.functional_call(norm, {"gain": gain[0]} if gain else {}, (raw,))

    inputs = (raw,) if gain is None else (raw, norm.gain)
    assert torch.autograd.gradcheck(weight, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weight, inputs)


def test_a_zero_vector_passes_its_gradient():
    raw = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    norm = wx.SpectralNorm()
    norm.attach(raw)
    out = norm(raw)
    g = like(out)
    out.backward(g)
    assert torch.equal(out, torch.zeros(4).double()) and torch.equal(raw.grad, g)


def test_a_vector_under_vmap_jvp_and_repeated_backwards():
    norm = wx.SpectralNorm()
    raws = torch.randn(3, 4, dtype=torch.float64)
    norm.attach(raws[0])
    assert_close(torch.func.vmap(norm)(raws), nn.functional.normalize(raws, dim=1), **EXACT)
    raw = raws[0].clone().requires_grad_()
    out = norm(raw)
    first = torch.autograd.grad(out, raw, like(out))
    assert torch.equal(first[0], torch.autograd.grad(out, raw, like(out))[0])
    with torch.no_grad():
        raw.mul_(2)
    with pytest.raises(RuntimeError, match="written between"):
        torch.autograd.grad(out, raw, like(out))


# the function wx.spectral_norm


@layer
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
