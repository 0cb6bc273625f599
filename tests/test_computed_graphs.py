"""Computed weights in CUDA graphs, without a GPU: a recorder of torch's calls stands for the graph.

A replay makes the recorded calls again, on the same memory: it sees what was written to the raw weights since, and no
line of Python runs. tests/gpu/test_gpu_graphs.py does the same with real graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from computed_oracle import iterated, normalized, randn, set_raw, state_of, unsettle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weightxform as wx
from weightxform import jobs, kept, slot
from weightxform.spectral_norm.repeated import Prepared


class Recorder(TorchDispatchMode):
    """What was called, with which tensors, and which it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            again = func(*args, **kwargs)
            if not any(r.alias_info for r in func._schema.returns):  # a view, or written in place: done
                for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.data.copy_(new)

    def names(self) -> list[str]:
        return [func.__name__ for func, *_ in self.calls if func.namespace == "weightxform"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``with capture() as graph:``; then ``graph.replay()``."""
    number = [0, 0]  # of the capture that is going on, and of the last one
    for module in (jobs, kept, slot):
        monkeypatch.setattr(module, "capture_of", lambda kind: number[0])
    monkeypatch.setattr(Prepared, "of", lambda *args: None)  # for eager code on the CPU

    @contextmanager
    def capture():
        number[1] += 1
        number[0] = number[1]
        try:
            with Recorder() as graph:
                yield graph
        finally:
            number[0] = 0

    return capture


def build(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    if kind == "group":
        wx.constrain(model, wx.SpectralNorm)
    else:
        for layer in model[::2]:
            wx.spectral_norm(layer)
    return unsettle(model)


def write(model: nn.Sequential, seed: int) -> None:
    for i, layer in enumerate(model[::2]):
        set_raw(layer, randn(*wx.raw(layer).shape, seed=10 * seed + i))


def expected(model: nn.Sequential, x: Tensor, g: Tensor) -> tuple:
    raws = [wx.raw(layer).detach().clone().requires_grad_() for layer in model[::2]]
    states = [iterated(w, state_of(layer)) for w, layer in zip(raws, model[::2], strict=True)]
    y = x
    for i, (w, state, layer) in enumerate(zip(raws, states, model[::2], strict=True)):
        y = nn.functional.linear(y, normalized(w, state), layer.bias.detach())
        y = y.tanh() if i < 2 else y
    return y.detach(), torch.autograd.grad(y, raws, g), states


def found(model: nn.Sequential, y: Tensor) -> tuple:
    layers = list(model[::2])
    return y.detach(), tuple(wx.raw(layer).grad for layer in layers), [state_of(layer) for layer in layers]


@pytest.mark.parametrize("kind", ["alone", "group"])
@pytest.mark.parametrize("written", [False, True], ids=["as the warm-up left it", "written before"])
def test_a_replay_sees_new_weights_and_advances_once(capture, kind, written):
    model, x, g = build(kind), randn(7, 6), randn(7, 3, seed=1)
    for seed in range(2):
        write(model, seed)
        model(x).backward(g)
    if written:
        write(model, 5)
    model.zero_grad()
    with capture() as graph:
        y = model(x)
        y.backward(g)
    if kind == "group":
        assert graph.names() == ["spectral_norm_fwd_list.default", "spectral_norm_bwd_list.default"]
    for seed in range(10, 13):
        write(model, seed)
        answer = expected(model, x, g)
        graph.replay()
        torch.testing.assert_close(found(model, y), answer)


def test_reads_outside_of_the_capture_are_computed_anew(capture):
    model, x, g = build("group"), randn(7, 6), randn(7, 3, seed=1)
    model(x).backward(g)
    with capture() as graph:
        model(x)
    with capture() as other:
        assert other.names() == [] and model(x) is not None
    assert other.names() == graph.names() == ["spectral_norm_fwd_list.default"]
    for seed in range(3):
        write(model, seed)
        graph.replay()
        write(model, 20 + seed)
        model.zero_grad()
        answer = expected(model, x, g)
        y = model(x)
        y.backward(g)
        torch.testing.assert_close(found(model, y), answer)


def test_a_weight_that_is_read_twice_is_computed_once(capture):
    layer = build("alone")[0]
    with capture() as graph:
        first, second = layer.weight, layer.weight
    assert first is second and graph.names() == ["spectral_norm_fwd.default"]


def test_a_captured_optimizer_step_makes_the_next_read_another(capture):
    model, x, g = build("group"), randn(7, 6), randn(7, 3, seed=1)
    model(x).backward(g)
    with capture() as graph:
        for seed in range(2):
            model(x)
            write(model, seed)
    assert graph.names() == ["spectral_norm_fwd_list.default"] * 2
