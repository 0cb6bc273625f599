"""Folded layers: where they run unfolded; autocast, torch.func, checkpoints and traces."""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of
from folded_layers import (
    KINDS,
    assert_close,
    folds,
    input_for,
    linear,
    pair,
    small_ones_fold,
    step,
    unfolded,
)  # fmt: skip
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import weightxform as wx
from weightxform import nn as folding
from weightxform.numerics import relative_error
from weightxform.swap import base_of

__all__ = ["folds", "small_ones_fold"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

EACH = ("rides", "conv1d", "conv2d", "conv3d")


@pytest.mark.parametrize("kind", [k for k in KINDS if "conv" in k])
def test_the_size_of_an_output_is_known_before_it_is_computed(kind):
    folded, plain = pair(kind)
    x = input_for(kind)
    batched = "unbatched" not in kind
    assert folded._outputs(x, folded._reversed_padding_repeated_twice, batched) == plain(x).numel()


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_half_runs_unfolded(kind, folds):
    folded, plain = pair(kind, torch.float16)
    x = input_for(kind, torch.float16)
    actual, expected = step(folded, x), step(plain, x)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert folds == []


@pytest.mark.parametrize("kind", ["rides", "conv2d", "no_bias"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(kind, low, folds):
    folded, plain = pair(kind, torch.float32, learn_gain=True, gain=1.3)
    exact = copy.deepcopy(plain).double()
    x = input_for(kind, torch.float32)

    def cast(layer):
        def call(x):
            with torch.autocast("cpu", low):
                return layer(x)

        return call

    oracle = step(exact, x.double())
    actual, usual = step(folded, x, call=cast(folded)), step(plain, x, call=cast(plain))
    assert actual.keys() == usual.keys() == oracle.keys()
    for name, value in oracle.items():
        assert actual[name].dtype == usual[name].dtype, name
        bound = 2 * relative_error(usual[name], value) + 2 * torch.finfo(low).eps
        assert relative_error(actual[name], value) <= bound, name
    assert folds == (["tensors"] if low == torch.bfloat16 else [])


def test_autocast_casts_the_weight_once_for_each_value(folds):
    layer = linear(dtype=torch.float32)
    x = randn(3, 20, dtype=torch.float32)
    casts = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        for _ in range(2):
            casts.append(layer(x).grad_fn.w)
        set_raw(layer, 2 * wx.raw(layer))
        casts.append(layer(x).grad_fn.w)
    assert casts[0] is casts[1] and torch.equal(casts[2], 2 * casts[0])
    assert len(folds) == 3


def test_backward_inside_autocast_keeps_the_precision_of_the_forward():
    folded, plain = pair("rides", torch.float32)
    x = input_for("rides", torch.float32).requires_grad_()
    y = folded(x)
    dy = randn(*y.shape, seed=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
    expected = step(plain, x, dy=dy)
    assert relative_error(wx.raw(folded).grad, expected["d weight"]) < 1e-6
    assert relative_error(x.grad, expected["dx"]) < 1e-6


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.zeros(3, 19, dtype=torch.float64), "rides"),
        (torch.zeros(3, 20, dtype=torch.float32), "rides"),
        (torch.zeros((), dtype=torch.float64), "rides"),
        (torch.zeros(3, 20, dtype=torch.int64), "rides"),
        (torch.zeros(2, 11, 3, 3, dtype=torch.float64), "conv2d"),
        (torch.zeros(12, 3, dtype=torch.float64), "conv2d"),
        (torch.zeros(2, 12, 3, 3, 3, dtype=torch.float64), "conv2d"),
        (torch.zeros(1, 12, 1, 1, dtype=torch.float64), "conv_valid"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{tuple(v.shape)}-{v.dtype}",
)
def test_a_wrong_input_raises_what_a_plain_layer_raises(x, kind):
    folded, plain = pair(kind)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as actual:
        folded(x)
    assert str(actual.value) == str(expected.value)


def test_an_empty_weight_runs_unfolded(folds):
    with pytest.warns(UserWarning, match="zero-element"):
        layer = wx.nn.SpectralLinear(0, 4)
    y = layer(torch.empty(3, 0))
    assert torch.equal(y, layer.bias.expand(3, 4))
    assert folds == []


def test_a_nested_input_runs_unfolded(folds):
    layer = linear()
    rows = [randn(2, 20), randn(3, 20)]
    y = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    torch.testing.assert_close(torch.cat(y.unbind()), layer(torch.cat(rows)))
    assert folds == ["numbers"]


# torch.func, forward-mode AD, activation checkpoints


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_torch_func(kind):
    folded, plain = pair(kind)
    x, before = input_for(kind), state_of(folded)
    parameters = {n: p.detach() for n, p in folded.named_parameters()}

    def gradient(layer):
        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        return torch.func.grad(loss)(parameters, x), torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    for actual, expected in zip(gradient(folded), gradient(plain), strict=True):
        assert_close(actual, expected)
    assert iterations(before, state_of(folded), wx.raw(folded)) == 0
    tangents = {n: randn(*p.shape, seed=8) for n, p in parameters.items()}
    results = [
        torch.func.jvp(lambda p, layer=layer: torch.func.functional_call(layer, p, (x,)), (parameters,), (tangents,))
        for layer in (folded, plain)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_functional_call_outside_of_a_transform(folds):
    folded, plain = pair("rides")
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (folded, plain):
        w = wx.raw(layer).detach() + scale * randn(30, 20, seed=9)
        y = torch.func.functional_call(layer, {"weight": w}, (input_for("rides"),))
        results.append((y, *torch.autograd.grad(y, scale, randn(*y.shape, seed=4))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert len(folds) == 1


def test_stacked_layers_under_vmap():
    layers = [linear() for _ in range(3)]
    for i, layer in enumerate(layers):
        set_raw(layer, randn(30, 20, seed=i))
    parameters, buffers = torch.func.stack_module_state(layers)
    x = input_for("rides")

    def call(parameters, buffers):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    y = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_forward_mode(kind):
    folded, plain = pair(kind)
    x = input_for(kind)
    tangents = []
    for layer in (folded, plain):
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, randn(*x.shape, seed=8)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_activation_checkpoints_do_not_advance_twice(kind, reentrant, cache, folds):
    folded, plain = pair(kind, cache=cache)
    x = input_for(kind)
    before = state_of(folded)
    actual = step(folded, x, call=lambda x: checkpoint(lambda x: folded(x).tanh(), x, use_reentrant=reentrant))
    assert_close(actual, step(plain, x, call=lambda x: plain(x).tanh()))
    assert iterations(before, state_of(folded), wx.raw(folded)) == 1
    assert len(folds) == 2


def test_a_weight_read_before_the_recomputation_changes_nothing():
    folded, plain = pair("rides")
    x = input_for("rides").requires_grad_()
    y = checkpoint(folded, x, use_reentrant=False)
    assert folded.weight.requires_grad
    dy = randn(*y.shape, seed=4)
    y.backward(dy)
    torch.testing.assert_close(wx.raw(folded).grad, step(plain, x, dy=dy)["d weight"], rtol=1e-10, atol=1e-12)


def test_traces_that_would_keep_the_weight_raise():
    with pytest.raises(RuntimeError, match="constant of the trace"), pytest.warns(DeprecationWarning):
        torch.jit.trace(linear(), input_for("rides"))


def test_a_leaf_to_fx(folds):
    model = nn.Sequential(linear(), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = input_for("rides")
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    assert len(folds) == 2


def test_the_class_without_computed_weights():
    assert base_of(type(linear())) is wx.nn.SpectralLinear


# together


def test_states_of_a_group_are_those_of_its_members():
    layers = [unfolded(kind) for kind in ("rides", "conv2d", "one_row", "conv3d")]
    layers[1].weight_transform.n_power_iterations = 2
    twins = copy.deepcopy(layers)
    transforms, raws = [x.weight_transform for x in layers], [wx.raw(x) for x in layers]
    advance = [True, True, False, True]
    together = wx.SpectralNorm.compute_state_group(transforms, raws, advance)
    for twin, layer, state, flag in zip(twins, layers, together, advance, strict=True):
        before = state_of(twin)
        alone = twin.weight_transform.compute_state(wx.raw(twin), flag)
        torch.testing.assert_close(state, alone, rtol=1e-12, atol=0)
        assert not state.requires_grad
        u, v = state_of(layer)
        assert torch.equal(torch.cat([u, v]), torch.cat(state_of(twin)))
        assert iterations(before, (u, v), wx.raw(layer)) == (
            0 if not flag else layer.weight_transform.n_power_iterations
        )
        torch.testing.assert_close(torch.cat([u, v]), state[:-1], rtol=1e-12, atol=1e-14)


def test_a_small_weight_is_computed_on_a_cpu(folds, monkeypatch):
    layer, x = linear(dtype=torch.float32), torch.randn(3, 20)
    expected = layer(x)
    assert len(folds) == 1
    monkeypatch.setattr(folding, "SMALLEST", 20 * 30 * 4 + 1)
    torch.testing.assert_close(layer(x), expected)
    monkeypatch.setattr(folding, "SMALLEST", 20 * 30 * 4)
    assert len(folds) == 1
    layer(x)
    assert len(folds) == 2


def test_the_first_layer_makes_no_pass_over_the_weight_in_its_backward(folds, monkeypatch):
    layer, twin = pair("few_rows")
    x = input_for("few_rows")
    twin(x).square().sum().backward()
    monkeypatch.setattr(folding.folded, "spectral_norm_bwd", None)
    layer(x).square().sum().backward()
    assert folds == ["numbers"]
    torch.testing.assert_close(wx.raw(layer).grad, wx.raw(twin).grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-10, atol=1e-10)
