"""Folded layers as modules: how they are made, copied, saved and undone, and where they run unfolded."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of
from folded_layers import (
    FOLDED,
    KINDS,
    assert_close,
    folded_twin,
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


def built(kind: str, **options) -> nn.Module:
    cls, args, kwargs, _ = KINDS[kind]
    torch.manual_seed(0)
    return FOLDED[cls](*args, **kwargs, dtype=torch.float64, **options)


def is_folded(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(FOLDED.values()))


# making one


@pytest.mark.parametrize("kind", EACH)
def test_a_constructor_does_what_the_two_lines_do(kind, folds):
    cls, args, kwargs, _ = KINDS[kind]
    options = {"n_power_iterations": 2, "eps": 1e-8, "order": "v_first", "bound": 0.5, "gain": 1.5, "learn_gain": True}
    layer = built(kind, **options)
    torch.manual_seed(0)
    plain = cls(*args, **kwargs, dtype=torch.float64)
    plain.weight = wx.ComputedParameter(plain.weight, wx.SpectralNorm(**options))
    assert isinstance(layer, FOLDED[cls]) and isinstance(layer, cls) and wx.is_computed(layer, "weight")
    assert repr(layer.weight_transform) == repr(plain.weight_transform)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    x = input_for(kind)
    assert_close(step(layer, x), step(plain, x))
    assert len(folds) == 1


@pytest.mark.parametrize("cls", FOLDED.values())
def test_the_signature_is_torchs_and_keyword_only_options(cls):
    own = inspect.signature(cls)
    theirs = inspect.signature(cls.__wx_plain__)
    names = list(theirs.parameters)
    assert list(own.parameters)[: len(names)] == names
    assert {n: p.default for n, p in theirs.parameters.items()}.items() <= {
        n: p.default for n, p in own.parameters.items()
    }.items()
    rest = list(own.parameters.values())[len(names) :]
    assert [p.name for p in rest] == ["n_power_iterations", "eps", "order", "bound", "gain", "learn_gain"]
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    ours = inspect.signature(wx.SpectralNorm).parameters
    assert all(p.default == ours[p.name].default for p in rest)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_power_iterations": -1}, ValueError, "SpectralNorm: n_power_iterations"),
        ({"eps": 0.0}, ValueError, "SpectralNorm: eps"),
        ({"order": "w"}, ValueError, "SpectralNorm: order"),
        ({"bound": -1.0}, ValueError, "SpectralNorm: bound"),
        ({"gain": "1"}, TypeError, "SpectralNorm: gain"),
        ({"learn_gain": 1}, TypeError, "SpectralNorm: learn_gain"),
        ({"dtype": torch.complex64}, TypeError, "SpectralNorm: the weight"),
        ({"dim": 1}, TypeError, "dim"),
    ],
)
def test_errors_of_a_constructor(options, error, message):
    with pytest.raises(error, match=message):
        wx.nn.SpectralLinear(3, 4, **options)


def test_a_layer_on_meta_then_materialized(folds):
    layer = wx.nn.SpectralLinear(6, 5, device="meta")
    assert layer(torch.empty(1, 6, device="meta")).shape == (1, 5)
    layer.to_empty(device="cpu").reset_parameters()
    layer(torch.randn(2, 6)).sum().backward()
    assert wx.raw(layer).grad.isfinite().all()
    assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 1) < 0.1
    assert folds == ["tensors", "numbers"]


def test_layers_of_one_kind_share_a_class():
    assert type(linear()) is type(linear(5, 4))


# turning a computed layer into one


@pytest.mark.parametrize("kind", KINDS)
def test_fold_layer_and_bake(kind):
    layer = unfolded(kind)
    cls = KINDS[kind][0]
    keys = list(layer.state_dict())
    assert folding.fold_layer(layer) is True and folding.fold_layer(layer) is True
    assert isinstance(layer, FOLDED[cls]) and list(layer.state_dict()) == keys
    expected = layer.eval().weight.detach().clone()
    wx.bake(layer)
    assert type(layer) is cls
    assert torch.equal(layer.weight, expected)
    assert folding.fold_layer(layer) is False and type(layer) is cls


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def squared(module):
    module.weight = wx.ComputedParameter(module.weight, nn.Sequential(wx.SpectralNorm(), wx.WeightNorm()))
    return module


def normalized(module, **options):
    module.weight = wx.ComputedParameter(module.weight, wx.SpectralNorm(**options))
    return module


def patched(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 4),
        lambda: normalized(OwnForward(3, 4)),
        lambda: normalized(nn.ConvTranspose2d(3, 4, 3)),
        lambda: normalized(nn.Embedding(3, 4)),
        lambda: normalized(nn.Bilinear(3, 4, 5)),
        lambda: normalized(nn.Conv2d(3, 4, 3), operator="conv", input_size=(5, 5)),
        lambda: squared(nn.Linear(3, 4)),
        lambda: patched(normalized(nn.Linear(3, 4))),
        lambda: nn.ReLU(),
    ],
    ids=[
        "plain",
        "subclass",
        "transposed",
        "embedding",
        "bilinear",
        "conv_operator",
        "stacked",
        "patched",
        "no_weight",
    ],
)
def test_what_does_not_fold_is_left_alone(make):
    module = make()
    before = type(module)
    assert folding.fold_layer(module) is False
    assert type(module) is before


def test_a_computed_bias_beside_it(folds):
    layer = unfolded("rides")
    layer.bias = wx.ComputedParameter(layer.bias, wx.SpectralNorm())
    plain = copy.deepcopy(layer)
    assert folding.fold_layer(layer)
    x = input_for("rides")
    assert_close(step(layer, x), step(plain, x))
    assert len(folds) == 1
    wx.bake(layer, "bias")
    assert is_folded(layer)
    wx.bake(layer)
    assert type(layer) is nn.Linear


def test_a_subclass_of_a_folded_layer(folds):
    class Twice(wx.nn.SpectralLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Twice(20, 30, dtype=torch.float64)
    x = input_for("rides")
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    assert len(folds) == 1
    assert type(wx.bake(layer)) is Twice
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    assert len(folds) == 1


def test_another_transform_on_top_runs_unfolded(folds):
    layer = linear()
    layer.weight = wx.ComputedParameter(layer.weight, wx.WeightNorm())
    x = input_for("rides")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert folds == []


# copies and checkpoints


def _pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", EACH)
def test_copies_are_independent(kind, copied, folds):
    layer, plain = pair(kind, learn_gain=True)
    x = input_for(kind)
    step(layer, x), step(plain, x)
    twin, plain = copied(layer), copied(plain)
    assert type(twin) is type(layer)
    set_raw(layer, wx.raw(layer) + 1)
    assert_close(step(twin, x), step(plain, x))
    set_raw(twin, wx.raw(twin) + 0.1), set_raw(plain, wx.raw(plain) + 0.1)
    assert_close(step(twin, x), step(plain, x))
    assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()))
    assert len(folds) == 3


@pytest.mark.parametrize("kind", EACH)
def test_checkpoints_go_both_ways(kind, tmp_path):
    plain, fresh = unfolded(kind), built(kind)
    torch.save(plain.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    x = input_for(kind)
    assert_close(step(fresh, x), step(plain, x))
    other = unfolded(kind)
    set_raw(other, wx.raw(other) + 1)
    other.load_state_dict(fresh.state_dict())
    assert_close(step(fresh.eval(), x), step(other.eval(), x))


def test_a_checkpoint_of_torchs_parametrization_loads():
    torch.manual_seed(0)
    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30, dtype=torch.float64))
    layer = linear()
    layer.load_state_dict(theirs.state_dict())
    x = input_for("rides")
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))


def test_tied_layers_advance_once(folds):
    first, second = linear(), wx.nn.SpectralLinear(20, 30, dtype=torch.float64)
    wx.bake(second)
    wx.tie(second, first)
    assert folding.fold_layer(second)
    before = state_of(first)
    x = input_for("rides")
    (first(x).sum() + second(x).sum()).backward()
    assert iterations(before, state_of(first), wx.raw(first)) == 1
    assert len(folds) == 2


def test_assign_and_invalidate(folds):
    layer = linear()
    x = input_for("rides")
    layer(x)
    value = randn(30, 20, seed=9)
    wx.assign(layer, "weight", value)
    expected = value / torch.linalg.matrix_norm(value, 2)
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, expected, layer.bias), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        layer._parameters["weight"].data[0] += 1  # unseen
    stale, fresh = layer(x), wx.invalidate(layer)(x)
    assert relative_error(stale, fresh) > 1e-2
    torch.testing.assert_close(fresh, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-10, atol=1e-12)
    assert len(folds) == 4


# where it runs unfolded, and with the same numbers


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_more_activations_than_weights_run_unfolded(kind, folds):
    folded, plain = pair(kind, torch.bfloat16)
    shape = (40, *KINDS[kind][3][1:])
    x = randn(*shape, dtype=torch.bfloat16)
    actual, expected = step(folded, x), step(plain, x)
    assert folds == []
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    folded(input_for(kind, torch.bfloat16))  # few: the same state
    assert len(folds) == 1
    assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()), 1e-6)


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


def test_folded_twins_share_nothing():
    layer = unfolded("rides")
    twin = folded_twin(layer)
    assert not is_folded(layer) and is_folded(twin)
    assert wx.raw(layer) is not wx.raw(twin)


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
