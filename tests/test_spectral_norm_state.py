"""u and v in checkpointing, copies, writes, degenerate weights, averages: what torch gets silently wrong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spectral_norm_layers import (
    EXACT,
    HALVES,
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
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import weightxform as wx

# activation checkpointing: torch iterates again in the recomputation, and its gradient is off


@each_style
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradient_and_one_iteration(style, use_reentrant):
    results = []
    for checkpointed in (False, True):
        module = put(make("linear"), style)
        write(module, 2.0)
        x = input_for(module).requires_grad_()
        out = checkpoint(module, x, use_reentrant=use_reentrant) if checkpointed else module(x)
        after_forward = [t.clone() for t in vectors(module)]
        out.backward(like(out))
        assert all(torch.equal(a, b) for a, b in zip(after_forward, vectors(module), strict=True))
        results.append((out.detach(), raw(module).grad, x.grad, *after_forward))
    assert_close(results[0], results[1], **EXACT)


# copies


@each_style
def test_deepcopy_is_independent(style):
    module = put(make("linear"), style)
    module(input_for(module))
    twin = copy.deepcopy(module)
    before, value = state_of(module), module.eval().weight.detach().clone()
    with torch.no_grad():
        raw(twin).copy_(3 * torch.eye(7, 5))
    twin.train()
    twin(input_for(twin))
    assert_same_state(module, before)
    assert torch.equal(module.weight, value)
    assert not torch.equal(vectors(twin)[0], vectors(module)[0])
    if style == "computed":
        wx.bake(twin, "weight")
        assert torch.equal(module.weight, value)


def test_pickle_keeps_the_state():
    module = put(make("linear"), "computed")
    twin = pickle.loads(pickle.dumps(module))
    assert_same_state(twin, state_of(module))
    assert_close(twin(input_for(twin)), module(input_for(module)), **EXACT)


def test_parametrize_removal_leaves_a_copy_alone():
    module = put(make("linear"), "parametrize")
    twin = copy.deepcopy(module)
    transform_before = transform(twin)
    value = module.eval().weight.detach().clone()
    assert transform_before is not transform(module)
    twin.eval()
    assert parametrize.is_parametrized(twin) and torch.equal(twin.weight, value)


# writes that leave u and v behind


@each_style
def test_an_assigned_weight_is_normalized_in_eval(style):
    """torch keeps the old vectors: a norm of 1.47 instead of 1 after ``m.weight = 3 * eye``."""
    module = put(make("linear"), style).eval()
    value = torch.zeros(7, 5, dtype=torch.float64)
    value[2, 3], value[0, 1] = 5.0, 3.0
    if style == "computed":
        wx.assign(module, "weight", value)
    else:
        module.weight = value
    assert torch.equal(raw(module), value)
    assert norm_of(module.weight) == pytest.approx(1, abs=1e-3)


def test_a_replaced_parameter_is_normalized_in_eval():
    module = put(make("linear"), "computed").eval()
    module(input_for(module))
    module.weight = nn.Parameter(torch.diag(torch.tensor([5.0, 3, 1, 1, 1])).double())
    assert norm_of(module.weight) == pytest.approx(1, abs=1e-3)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reset_makes_the_vectors_fit(layer, dtype):
    module = make(layer, dtype).eval().requires_grad_(False)
    norm = wx.SpectralNorm()
    norm.attach(module.weight, module)
    rank_one = torch.zeros_like(module.weight)
    rank_one[0, 1].fill_(2.0)
    norm.reset(rank_one)
    assert norm_of(norm.compute(rank_one, False), axis(module)) == pytest.approx(1, abs=1e-2)
    norm.u.fill_(float("nan"))
    norm.reset(module.weight)
    value = norm.compute(module.weight, False)
    assert 0.99 <= norm_of(value, axis(module)) <= 1.3
    other = torch.randn(4, 3, 2, 2).to(dtype)
    norm.dim = 0
    norm.reset(other)
    assert (norm.u.shape, norm.v.shape) == ((4,), (12,))


def test_reset_writes_in_place_where_the_vectors_fit():
    """DDP and CUDA graphs hold the buffers."""
    module = make("linear")
    norm = wx.SpectralNorm()
    norm.attach(module.weight, module)
    u, v = norm.u, norm.v
    norm.reset(module.weight)
    norm.compute(module.weight, True)
    u.fill_(0)
    norm.reset(module.weight)
    assert norm.u is u and norm.v is v and float(u.norm()) == pytest.approx(1)


# degenerate weights


@each_style
@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_zero_weights_give_zeros_and_pass_gradients(layer, style, dtype):
    module = make(layer, dtype)
    put(module, style)
    with torch.no_grad():
        raw(module).zero_()
    before = [x.clone() for x in vectors(module)]
    for training in (True, False):
        module.train(training)
        out = module.weight
        g = like(out)
        out.backward(g)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(raw(module).grad, g)
        raw(module).grad = None
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(module), strict=True))
    write(module)  # and it comes back to life
    module.train()
    assert torch.isfinite(module.weight).all() and module.weight.abs().max() > 0


def test_a_module_born_with_zero_weights():
    module = nn.Linear(5, 7)
    nn.init.zeros_(module.weight)
    put(module, "computed")
    assert_unit(module)
    assert torch.equal(module.weight, torch.zeros(7, 5))


@each_style
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_that_is_not_finite_leaves_the_state_alone(style, bad, dtype):
    module = put(make("linear", dtype), style)
    good = raw(module).detach().clone()
    with torch.no_grad():
        raw(module)[2, 3] = bad
    before = [x.clone() for x in vectors(module)]
    for training in (True, False):
        module.train(training)
        assert not torch.isfinite(module.weight).all()
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(module), strict=True))
    with torch.no_grad():
        raw(module).copy_(good)
    assert torch.isfinite(module.train().weight).all()


def test_attaching_to_a_weight_that_is_not_finite():
    module = nn.Linear(5, 7)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    put(module, "computed")
    assert_unit(module)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 2, 2)])
def test_empty_weights(shape):
    raw = torch.empty(shape, requires_grad=True)
    norm = wx.SpectralNorm()
    norm.attach(raw)
    out = norm(raw)
    out.backward(torch.empty(shape))
    assert out.shape == raw.grad.shape == shape
    norm.reset(raw)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    raw = make("linear", torch.float32).weight.detach() * scale
    norm = wx.SpectralNorm(eps=1e-38)
    norm.attach(raw)
    for _ in range(50):
        out = norm(raw)
    if scale < 1:  # the square of the norm is no float32: the smallest weights count as small, never as NaN
        assert torch.isfinite(out).all()
    else:
        assert norm_of(out) == pytest.approx(1, abs=1e-2) or not torch.isfinite(out).all()


# torch.func


@each_style
@pytest.mark.parametrize("training", [True, False])
def test_vmap_over_raw_weights(style, training):
    """torch raises in training mode. Inside vmap every member iterates from the stored v, and nothing is written."""
    module = put(make("linear"), style).train(training)
    module(input_for(module))
    key = "weight" if style == "computed" else "parametrizations.weight.original"
    raws = torch.stack([raw(module).detach() + 0.1 * i for i in range(3)])
    x = input_for(module)
    before = state_of(module)
    g = like(torch.empty(4, 7, dtype=torch.float64))

    def loss(raw):
        return (torch.func.functional_call(module, {key: raw}, (x,)) * g).sum()

    batched = torch.func.vmap(torch.func.grad(loss))(raws)
    assert_same_state(module, before)
    for member, grad in zip(raws, batched, strict=True):
        assert_close(torch.func.grad(loss)(member), grad, **EXACT)
        twin = copy.deepcopy(module)
        with torch.no_grad():
            raw(twin).copy_(member)
        twin(x).backward(g)
        assert_close(raw(twin).grad, grad, **EXACT)


# averages


@each_style
def test_averaged_vectors_are_normalized_where_they_are_read(style):
    """An average of u, v is shorter than 1: torch underestimates sigma, and the norm of the weight explodes."""
    module = put(make("linear"), style)
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    for step in range(4):
        write(module, 1.0, seed=step)
        module(input_for(module))
        average.update_parameters(module)
    with torch.no_grad():
        for x in vectors(average.module):
            x.mul_(0.8)
    average.eval()
    u, v = (x / x.norm() for x in vectors(average.module))
    sigma = u @ raw(average.module) @ v
    assert_close(average.module.weight, raw(average.module) / sigma, **EXACT)


# the transform and its module


@each_style
@pytest.mark.parametrize("training", [True, False])
def test_the_transform_follows_the_mode_of_its_module(style, training):
    module = put(make("linear").train(training), style)
    assert transform(module).training == training
    module.train(not training)
    assert transform(module).training != training


def test_not_attached():
    with pytest.raises(RuntimeError, match="not attached to a weight yet"):
        wx.SpectralNorm().compute(torch.ones(3, 3), True)
    lazily = wx.SpectralNorm()
    assert_close(lazily(torch.eye(3)), torch.eye(3))  # called like torch's, it attaches itself
