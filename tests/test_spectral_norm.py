"""wx.SpectralNorm behaves as torch.nn.utils.parametrizations.spectral_norm, except where it says otherwise."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from spectral_norm_layers import (
    EXACT,
    STYLES,
    assert_same_state,
    assert_same_vectors,
    axis,
    each_layer,
    each_style,
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
from torch.testing import assert_close

import weightxform as wx

forward_ad = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp


# the iterates


@each_style
@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_registration_draws_and_iterates_as_torch(layer, style, training):
    module = make(layer).train(training)
    ours = put(copy.deepcopy(module), style)
    after_ours = torch.get_rng_state()
    theirs = put_torch(module)
    assert torch.equal(after_ours, torch.get_rng_state())
    assert_same_vectors(ours, theirs)


@each_style
@each_layer
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


@each_style
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


@each_style
@each_layer
def test_norm_is_one_by_svd(layer, style):
    ours = put(make(layer), style)
    for step in range(60):
        write(ours, 1e-9, seed=step)
        weight = ours.weight
    assert norm_of(weight, axis(ours)) == pytest.approx(1, abs=2e-3)
    assert norm_of(ours.eval().weight, axis(ours)) == pytest.approx(1, abs=2e-3)


@each_style
def test_value_on_a_diagonal(style):
    module = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.diag(torch.tensor([1.0, -4.0, 2.0])))
    put(module, style, n_power_iterations=20)
    assert_close(module.weight, torch.diag(torch.tensor([0.25, -1.0, 0.5]).double()), rtol=0, atol=1e-9)


# eval, and several forwards


@each_style
@each_layer
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


@each_style
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


@each_style
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
@each_layer
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


@each_style
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
