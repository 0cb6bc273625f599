"""Computed weights under torch.compile and torch.export: outputs, gradients and buffers of eager, over several steps.

u and v have not converged: under inductor, state written in place beside inlined maths gives right values and wrong
gradients, and a converged state hides it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import iterated, iterations, linear, normalized, randn, set_raw, state_of, transform_of, unsettle
from torch import Tensor, nn

import weightxform as wx

# torch's own, while it traces
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def single() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    for i in (0, 3):
        model[i].weight = wx.ComputedParameter(model[i].weight, wx.SpectralNorm())
    return unsettle(model)


def grouped() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    wx.constrain(model, wx.SpectralNorm)
    return unsettle(model)


def uncached() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    for i in (0, 3):
        model[i].weight = wx.ComputedParameter(model[i].weight, wx.SpectralNorm(cache=False))
    return unsettle(model)


def oracle_step(model: nn.Sequential, states: list, x: Tensor, g: Tensor, iterate: bool) -> tuple[list, Tensor, list]:
    """(new states, output, gradients of the raw weights) in plain torch and double precision."""
    raws = [wx.raw(model[i]).detach().double().requires_grad_() for i in (0, 3)]
    states = [iterated(w, s, int(iterate)) for w, s in zip(raws, states, strict=True)]
    a, b = (normalized(w, s) for w, s in zip(raws, states, strict=True))
    hidden = nn.functional.conv1d(x.double(), a, model[0].bias.detach().double()).tanh().flatten(1)
    y = nn.functional.linear(hidden, b, model[3].bias.detach().double())
    return states, y, list(torch.autograd.grad(y, raws, g.double()))


@pytest.mark.parametrize("build", [single, grouped, uncached], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_steps_are_those_of_eager_and_of_the_oracle(build, backend):
    model = build()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    states = [tuple(s.double() for s in state_of(model[i])) for i in (0, 3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, twin)]
    for step in range(4):
        x = randn(2, 3, 6, seed=step, dtype=torch.float32).requires_grad_()
        z = x.detach().clone().requires_grad_()
        g = randn(2, 5, seed=10 + step, dtype=torch.float32)
        for optimizer in optimizers:
            optimizer.zero_grad()
        states, expected, raw_grads = oracle_step(model, states, x.detach(), g, iterate=True)
        y, e = compiled(x), twin(z)
        y.backward(g), e.backward(g)
        torch.testing.assert_close(y, e)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, z.grad)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}")
        for i, state, grad in zip((0, 3), states, raw_grads, strict=True):
            torch.testing.assert_close(wx.raw(model[i]).grad.double(), grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tuple(s.double() for s in state_of(model[i])), state, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state_of(model[i]), state_of(twin[i]))
        for optimizer in optimizers:
            optimizer.step()
    # eager reads after compiled calls see the state that those left
    for i in (0, 3):
        _ = model[i].weight
        torch.testing.assert_close(model[i].weight, normalized(wx.raw(model[i]), state_of(model[i])))
    # eval through the same compiled module
    model.eval()
    states = [tuple(s.double() for s in state_of(model[i])) for i in (0, 3)]
    x, g = randn(2, 3, 6, dtype=torch.float32), randn(2, 5, seed=1, dtype=torch.float32)
    model.zero_grad()
    _, expected, raw_grads = oracle_step(model, states, x, g, iterate=False)
    y = compiled(x)
    y.backward(g)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for i, grad, state in zip((0, 3), raw_grads, states, strict=True):
        torch.testing.assert_close(wx.raw(model[i]).grad.double(), grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tuple(s.double() for s in state_of(model[i])), state)


def test_each_compiled_call_advances_once():
    """Documented: under compile every call iterates, also when raw is unchanged; within a call, once."""
    layer = linear()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x: Tensor) -> Tensor:
        return layer(x)

    before = state_of(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    w = wx.raw(layer).detach().clone().requires_grad_()
    for n in (1, 2, 3):
        f(x).backward(g)
        assert iterations(before, state_of(layer), w) == n
        nn.functional.linear(x, normalized(w, iterated(w, before, n))).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)


def test_two_compiled_forwards_then_their_backwards():
    layer = linear()
    before = state_of(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, g = randn(3, 6), randn(3, 4, seed=1)
    first, second = compiled(x), compiled(2 * x)
    (first * second).backward(g)
    w, b = wx.raw(layer).detach().clone().requires_grad_(), layer.bias.detach()
    one, two = (normalized(w, iterated(w, before, n)) for n in (1, 2))
    (nn.functional.linear(x, one, b) * nn.functional.linear(2 * x, two, b)).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo asks
def test_a_weight_computed_in_eager_is_an_ordinary_input_of_a_compiled_region():
    layer = linear()
    before = state_of(layer)
    f = torch.compile(lambda x, w: (x @ w.T).tanh(), fullgraph=True, backend="aot_eager")
    w = wx.raw(layer).detach().clone().requires_grad_()
    for i in range(2):  # two forwards and two backwards through one computed weight
        x, g = randn(3, 6, seed=i), randn(3, 4, seed=10 + i)
        f(x, layer.weight).backward(g)
        (x @ normalized(w, iterated(w, before)).T).tanh().backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    assert iterations(before, state_of(layer), w) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo asks
def test_a_compiled_block_of_a_grouped_model():
    """A compiled sub-module has no open scope of the root: its weight is computed there, and only there."""
    model = grouped()
    block = torch.compile(model[3], fullgraph=True, backend="aot_eager")
    block(torch.zeros(2, 16))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, twin)]
    for step in range(3):
        x, g = randn(2, 3, 6, seed=step, dtype=torch.float32), randn(2, 5, seed=9 + step, dtype=torch.float32)
        for optimizer in optimizers:
            optimizer.zero_grad()
        block(model[2](model[1](model[0](x)))).backward(g)
        twin(x).backward(g)
        for i in (0, 3):
            torch.testing.assert_close(wx.raw(model[i]).grad, wx.raw(twin[i]).grad)
            torch.testing.assert_close(state_of(model[i]), state_of(twin[i]))
        for optimizer in optimizers:
            optimizer.step()


def test_a_compiled_optimizer_step_is_seen():
    layer = linear()
    state = state_of(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    step = torch.compile(optimizer.step, backend="aot_eager")
    w, b = wx.raw(layer).detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    plain = torch.optim.SGD([w, b], lr=0.2)
    for i in range(3):
        x, g = randn(3, 6, seed=i), randn(3, 4, seed=10 + i)
        state = iterated(w, state)
        optimizer.zero_grad(), plain.zero_grad()
        layer(x).backward(g)
        nn.functional.linear(x, normalized(w, state), b).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)
        torch.testing.assert_close(state_of(layer), state)
        step(), plain.step()


def test_autocast_inside_a_compiled_region():
    model, x = single(), randn(2, 3, 6, dtype=torch.float32)
    twin = copy.deepcopy(model)
    g = randn(2, 5, seed=1, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, e = compiled(x), twin(x)
    assert y.dtype == torch.bfloat16
    y.backward(g), e.backward(g)
    torch.testing.assert_close(y, e, rtol=2e-2, atol=2e-2)
    for i in (0, 3):
        torch.testing.assert_close(wx.raw(model[i]).grad, wx.raw(twin[i]).grad, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(state_of(model[i]), state_of(twin[i]))


# export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("build", [single, grouped], ids=lambda f: f.__name__)
def test_export_in_eval(build, strict):
    model = build().eval()
    x = randn(2, 3, 6, dtype=torch.float32)
    expected = model(x)
    before = [state_of(model[i]) for i in (0, 3)]
    program = torch.export.export(model, (x,), strict=strict)
    names = {spec.target for spec in program.graph_signature.input_specs if spec.target}
    assert names == set(model.state_dict()), "raw weights and state are inputs, no weight is a constant"
    module = program.module()
    torch.testing.assert_close(module(x), expected)
    lowered = program.run_decompositions()
    assert not lowered.graph_signature.buffers_to_mutate
    torch.testing.assert_close(lowered.module()(x), expected)
    with torch.no_grad():
        for p in module.parameters():  # they are those of the model
            p.mul_(1.5)
    torch.testing.assert_close(module(x), model(x))
    assert not torch.allclose(module(x), expected)
    for i, state in zip((0, 3), before, strict=True):
        torch.testing.assert_close(state_of(model[i]), state)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_in_train(strict):
    model = single()
    twin = copy.deepcopy(model)
    before = [state_of(model[i]) for i in (0, 3)]
    x = randn(2, 3, 6, dtype=torch.float32)
    program = torch.export.export(model, (x,), strict=strict)
    for i, state in zip((0, 3), before, strict=True):
        torch.testing.assert_close(state_of(model[i]), state, msg="tracing does not iterate")
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    assert mutated == {f"{i}.weight_transform.{x}" for i in (0, 3) for x in "uv"}
    module = program.module()
    for n in (1, 2):
        with torch.no_grad():
            wx.raw(twin[0]).mul_(1.0), wx.raw(twin[3]).mul_(1.0)  # a new version, the same value
        torch.testing.assert_close(module(x), twin(x))
        buffers = dict(module.named_buffers())
        for i in (0, 3):
            u, v = state_of(twin[i])
            torch.testing.assert_close(buffers[f"{i}.weight_transform.u"], u, msg=f"call {n}")
            torch.testing.assert_close(buffers[f"{i}.weight_transform.v"], v, msg=f"call {n}")


def test_reads_after_export_and_compile_are_real():
    layer = linear()
    x = randn(3, 6)
    torch.export.export(layer.eval(), (x,))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert type(layer.weight) is Tensor and type(transform_of(layer).u) is Tensor
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))
    set_raw(layer, randn(4, 6, seed=3))
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))
