"""What a compiled region may hold: torch.func, checkpointing, attention, an LSTM, transforms that are plain modules.

u and v have not converged, as in test_computed_compile.py, which says why.
"""

from __future__ import annotations

import copy

import pytest
import torch
from computed_oracle import iterations, linear, normalized, randn, set_raw, state_of, unsettle
from torch import Tensor, nn

import weightxform as wx

# torch's own, while it traces
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def test_compile_with_torch_func():
    layer = linear().eval()
    state, bias = state_of(layer), layer.bias.detach()
    x, g = randn(3, 6), randn(3, 4, seed=1)

    def loss(f, w: Tensor) -> Tensor:
        return (f(w).tanh() * g).sum()

    def ours(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w, "bias": bias}, (x,))

    def plain(w: Tensor) -> Tensor:
        return nn.functional.linear(x, normalized(w, state), bias)

    w, ws, t = randn(4, 6, seed=2), randn(2, 4, 6, seed=3), randn(4, 6, seed=4)
    compiled = torch.compile(lambda w: torch.func.grad(lambda w: loss(ours, w))(w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w), torch.func.grad(lambda w: loss(plain, w))(w))
    compiled = torch.compile(lambda ws: torch.vmap(ours)(ws), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ws), torch.vmap(plain)(ws))
    assert iterations(state, state_of(layer), w) == 0
    torch.testing.assert_close(torch.func.jvp(ours, (w,), (t,)), torch.func.jvp(plain, (w,), (t,)))


TRANSFORMS = {
    "matrix": lambda: wx.SpectralNorm(bound=0.5, gain=2.0),
    "conv": lambda: wx.SpectralNorm(operator="conv", input_size=(5, 5)),
    "weight_norm": lambda: wx.WeightNorm(),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_torch_func_is_that_of_eager_and_writes_nothing(name, training):
    """Dynamo drops the backward of a Function under torch.func.grad."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, dtype=torch.float64).train(training)
    layer.weight = wx.ComputedParameter(layer.weight, TRANSFORMS[name]())
    unsettle(layer)
    before = [b.clone() for b in layer.buffers()]
    x, g, w = randn(2, 3, 5, 5), randn(2, 4, 3, 3, seed=1), randn(4, 3, 3, 3, seed=2)

    def f(w: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, {"weight": w}, (x,)).tanh() * g).sum()

    compiled = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w), torch.func.grad(f)(w))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


class Checkpointed(nn.Module):
    def __init__(self, build: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6).double()
        self.rest = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)).double()
        self.everything = "whole" in build
        if "grouped" in build:
            wx.constrain(self, wx.SpectralNorm)
        else:
            for layer in self.layers():
                layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
        unsettle(self).train("eval" not in build)

    def layers(self) -> tuple[nn.Module, ...]:
        return self.first, self.rest[0], self.rest[2]

    def forward(self, x: Tensor) -> Tensor:
        if self.everything:
            return torch.utils.checkpoint.checkpoint(lambda x: self.rest(self.first(x)), x, use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(self.rest, self.first(x), use_reentrant=False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("build", ["grouped", "grouped_whole", "single_whole", "eval_whole"])
def test_checkpointing_inside_a_compiled_region(build, backend):
    """The recomputation must not see the state that the forward left.

    A group whose first read is outside is computed there; one in eval mode may be recomputed. Otherwise the graph
    breaks and the checkpoint is eager; with ``fullgraph`` it is refused.
    """
    model, twin = Checkpointed(build), Checkpointed(build)
    whole = build in ("grouped_whole", "single_whole")
    if whole:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, fullgraph=True, backend=backend)(randn(3, 6))
    compiled = torch.compile(model, fullgraph=not whole, backend=backend)
    for step in range(2):
        x, g = randn(3, 6, seed=step), randn(3, 6, seed=9 + step)
        before = [state_of(layer) for layer in model.layers()]
        for m in (model, twin):
            m.zero_grad()
        compiled(x).backward(g)
        twin(x).backward(g)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for layer, state in zip(model.layers(), before, strict=True):
            assert iterations(state, state_of(layer), wx.raw(layer)) == int(model.training)
        with torch.no_grad():
            for m in (model, twin):
                for p in m.parameters():
                    p.copy_(randn(*p.shape, seed=20 + step))


def test_attention_advances_once_a_compiled_forward():
    """It asks for its weight several times in one forward."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    layer.in_proj_weight = wx.ComputedParameter(layer.in_proj_weight, wx.SpectralNorm())
    twin = copy.deepcopy(unsettle(layer))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x, g = randn(2, 3, 6, seed=step), randn(2, 3, 6, seed=9 + step)
        before = state_of(layer, "in_proj_weight")
        for m in (layer, twin):
            m.zero_grad()
        compiled(x, x, x)[0].backward(g)
        twin(x, x, x)[0].backward(g)
        raw = wx.raw(layer, "in_proj_weight")
        assert iterations(before, state_of(layer, "in_proj_weight"), raw) == 1
        torch.testing.assert_close(raw.grad, wx.raw(twin, "in_proj_weight").grad)
        for m in (layer, twin):
            set_raw(m, randn(18, 6, seed=30 + step), "in_proj_weight")


def test_plain_transforms_and_recurrent_layers():
    """An LSTM compiles with graph breaks; a transform that is a plain module compiles into the graph."""

    class Tanh(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return raw.tanh()

    layer = nn.Linear(6, 4, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, Tanh())
    x, g = randn(3, 6), randn(3, 4, seed=1)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(g)
    w = wx.raw(layer).detach().clone().requires_grad_()
    nn.functional.linear(x, w.tanh()).backward(g)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)

    torch.manual_seed(0)
    lstm = nn.LSTM(6, 4, dtype=torch.float64)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        setattr(lstm, name, wx.ComputedParameter(getattr(lstm, name), wx.SpectralNorm()))
    unsettle(lstm)
    twin = copy.deepcopy(lstm)
    compiled = torch.compile(lstm, backend="aot_eager")
    for step in range(2):
        x, g = randn(5, 2, 6, seed=step), randn(5, 2, 4, seed=9 + step)
        for m in (lstm, twin):
            m.zero_grad()
        y, e = compiled(x)[0], twin(x)[0]
        y.backward(g), e.backward(g)
        torch.testing.assert_close(y, e)
        for p, q in zip(lstm.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        with torch.no_grad():
            for m in (lstm, twin):
                for p in m.parameters():
                    p.copy_(randn(*p.shape, seed=30 + step))
