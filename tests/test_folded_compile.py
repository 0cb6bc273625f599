"""Folded layers under torch.compile and torch.export: the numbers of the unfolded eager form, over several steps.

u and v have not converged, as in test_computed_compile.py, which says why.
"""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import iterations, randn, set_raw, state_of, unsettle
from folded_layers import assert_close, input_for, linear, pair, small_ones_fold, step, update
from torch import nn
from torch.utils.checkpoint import checkpoint

import weightxform as wx
from weightxform import nn as folding
from weightxform.numerics import relative_error

__all__ = ["small_ones_fold"]  # a fixture

# torch's own, while it imports and traces
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_with(function, *args) -> set[str]:
    """The names of the ops in the graph of a compiled ``function``."""
    names: set[str] = set()

    def backend(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    return names


@pytest.mark.parametrize("options", [{}, {"gain": 0.6, "learn_gain": True, "bound": 0.3}], ids=["plain", "learned"])
@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "batch_above_weight", "conv2d"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_is_that_of_the_unfolded_eager_layer(kind, options, backend):
    folded, plain = pair(kind, **options)
    compiled = torch.compile(folded, fullgraph=True, backend=backend)
    for i in range(3):
        x = input_for(kind, seed=i)
        assert_close(step(folded, x, seed=i, call=compiled), step(plain, x, seed=i))
        assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))
        update(folded), update(plain)


def test_the_graph_has_the_state_and_no_weight():
    names = graphs_with(linear(), input_for("rides"))
    assert any("spectral_norm_state_list" in name for name in names)
    assert not any("spectral_norm_fwd" in name for name in names)


@pytest.mark.parametrize("kind", ["rides", "conv2d"])
def test_autocast(kind):
    folded, plain = pair(kind, torch.float32)
    exact = copy.deepcopy(plain).double()

    def cast(layer):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return call

    compiled = torch.compile(cast(folded), fullgraph=True, backend="inductor")
    x = input_for(kind, torch.float32)
    oracle = step(exact, x.double())
    actual, usual = step(folded, x, call=compiled), step(plain, x, call=cast(plain))
    for name, value in oracle.items():
        bound = 2 * relative_error(usual[name], value) + 2 * torch.finfo(torch.bfloat16).eps
        assert relative_error(actual[name], value) <= bound, name


def test_half_advances_once():
    """It runs unfolded."""
    folded, _ = pair("rides", torch.float32)

    def call(x):
        with torch.autocast("cpu", torch.float16):
            return folded(x)

    x = input_for("rides", torch.float32)
    folded(x)  # folded once
    set_raw(folded, wx.raw(folded) + 0.1)
    before = state_of(folded)
    torch.compile(call, fullgraph=True, backend="aot_eager")(x).sum().backward()
    after = torch.cat(state_of(folded))
    twin = copy.deepcopy(folded)
    for buffer, value in zip((twin.weight_transform.u, twin.weight_transform.v), before, strict=True):
        buffer.copy_(value)
    twin(x)
    torch.testing.assert_close(after, torch.cat(state_of(twin)))


@pytest.mark.parametrize("dynamic", [True, None])
def test_batches_of_many_sizes(dynamic):
    folded, plain = pair("rides")
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for i, rows in enumerate((3, 5, 40, 600, 4)):
        x = randn(rows, 20, seed=i)
        assert_close(step(folded, x, seed=i, call=compiled), step(plain, x, seed=i))
        update(folded), update(plain)


def test_without_gradients():
    folded, plain = pair("rides")
    compiled = torch.compile(folded, fullgraph=True, backend="inductor")
    x = input_for("rides")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("first", ["read", "forward"])
def test_a_read_of_the_weight_does_not_advance(first):
    folded, plain = pair("rides")
    folded(input_for("rides")), plain(input_for("rides"))  # it knows that it folds
    for layer in (folded, plain):
        set_raw(layer, wx.raw(layer) + 0.1)

    def loss(x):
        if first == "read":
            w = folded.weight.square().sum()
            return folded(x).square().sum() + w
        return folded(x).square().sum() + folded.weight.square().sum()

    before, x = state_of(folded), input_for("rides")
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    assert iterations(before, state_of(folded), wx.raw(folded)) == 1
    if first == "forward":  # else it is the weight before the step
        (plain(x).square().sum() + plain.weight.square().sum()).backward()
        torch.testing.assert_close(wx.raw(folded).grad, wx.raw(plain).grad, rtol=1e-10, atol=1e-12)


def test_torch_func_inside_compile():
    folded, plain = pair("rides")
    parameters = {n: p.detach() for n, p in folded.named_parameters()}

    def gradient(layer):
        def loss(p, x):
            return torch.func.functional_call(layer, p, (x,)).square().sum()

        return lambda p, x: torch.func.grad(loss)(p, x)

    x = input_for("rides")
    actual = torch.compile(gradient(folded.eval()), fullgraph=True, backend="aot_eager")(parameters, x)
    assert_close(actual, gradient(plain.eval())(parameters, x))


def model(fold: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv1d(12, 14, 3), nn.Tanh(), nn.Flatten(), nn.Linear(28, 30), nn.Tanh(), nn.Linear(30, 20)
    )
    layers = unsettle(wx.constrain(layers.double(), wx.SpectralNorm))
    if fold:
        assert [folding.fold_layer(m) for m in layers] == [True, False, False, True, False, True]
    return layers


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_group_of_folded_layers(backend, warm):
    folded, plain = model(True), model(False)
    x = randn(2, 12, 4)
    if warm:
        folded(x), plain(x)
        for layers in (folded, plain):
            for i in (0, 3, 5):
                set_raw(layers[i], wx.raw(layers[i]) + 0.1)
    compiled = folded if backend == "eager" else torch.compile(folded, fullgraph=True, backend=backend)
    for i in range(3):
        assert_close(step(folded, x, seed=i, call=compiled), step(plain, x, seed=i))
        assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))
        update(folded), update(plain)


def test_a_checkpoint_inside_compile_advances_once():
    folded, plain = pair("rides")
    x = input_for("rides")
    compiled = torch.compile(lambda x: checkpoint(folded, x, use_reentrant=False), backend="aot_eager")
    assert_close(step(folded, x, call=compiled), step(plain, x))
    assert_close(dict(folded.named_buffers()), dict(plain.named_buffers()))


def test_a_checkpoint_in_a_full_graph_is_refused():
    """As for every computed weight in training: its recomputation would begin from the state after the step."""
    folded = linear()
    compiled = torch.compile(lambda x: checkpoint(folded, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(input_for("rides").requires_grad_())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("kind", ["rides", "conv2d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(kind, strict, training):
    """An exported program may be trained without the Function around the op: it has the weight in it."""
    folded, plain = pair(kind)
    for layer in (folded, plain):
        layer.train(training)(input_for(kind))
        set_raw(layer, wx.raw(layer) + 0.1)
    before, eager = state_of(folded), copy.deepcopy(plain)
    programs = [torch.export.export(layer, (input_for(kind),), strict=strict).module() for layer in (folded, plain)]
    torch.testing.assert_close(state_of(folded), before, rtol=0, atol=0)
    for i in range(2):
        actual, expected = (step(program, input_for(kind, seed=i)) for program in programs)
        assert_close(actual, expected)
        assert_close(dict(programs[0].named_buffers()), dict(plain.named_buffers()))
        if not strict:  # torch drops the gradient of a Function in a strict export
            assert "d weight" in actual
        if i == 0:
            assert relative_error(actual["y"], eager(input_for(kind, seed=i))) < 1e-10
