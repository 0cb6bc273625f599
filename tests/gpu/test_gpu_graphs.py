"""CUDA graphs: a replay reads the raw weights as they are then, and advances the state as one eager step does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from computed_oracle import state_of
from on_gpu import (
    KINDS,
    answer,
    assert_near,
    batch,
    build,
    check_step,
    list_inputs,
    needs_gpu,
    oracle_step,
    run_list,
    same_bits,
    states_of,
    write_raws,
)
from torch import Tensor, nn

import weightxform as wx

pytestmark = needs_gpu


def capture(step: Callable[[], object], before: Callable[[], object] = lambda: None, warm_up: int = 3) -> tuple:
    """(graph of ``step``, what it returned). ``before`` runs ahead of each warm-up and of the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            before()
            step()
        before()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def forget_gradients(model: nn.Module) -> None:
    """So that the backward that is captured writes them and does not add to them."""
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [False, True], ids=["as the warm-up left it", "written before"])
def test_replays_see_new_weights_and_advance_once(kind, written):
    model = build(kind)
    x, g = batch()
    seeds = iter(range(100, 200))

    def before() -> None:
        forget_gradients(model)
        if written:
            write_raws(model, next(seeds))

    def step() -> Tensor:
        y = model(x)
        y.backward(g)
        return y.detach()  # the graph of autograd must not outlive the capture: it remembers the stream

    graph, y = capture(step, before)
    for seed in range(4):
        write_raws(model, seed)
        for source, target in zip(batch(seed), (x, g), strict=True):
            target.copy_(source)
        expected = oracle_step(model, states_of(model), x, g)
        graph.replay()
        torch.cuda.synchronize()
        check_step(model, y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_training_step_as_a_graph_is_the_eager_one(kind):
    model, twin = build(kind), build(kind)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, twin)]
    x, g = batch()

    def step(m: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        y = m(x)
        y.backward(g)
        optimizer.step()
        return y.detach()

    graph, y = capture(lambda: step(model, optimizers[0]))
    for _ in range(3):
        step(twin, optimizers[1])
    for seed in range(4):
        for source, target in zip(batch(seed), (x, g), strict=True):
            target.copy_(source)
        graph.replay()
        expected = step(twin, optimizers[1])
        torch.cuda.synchronize()
        assert_near(y, expected, torch.float32)
        for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            assert_near(mine, theirs, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_reads_after_a_capture(kind):
    model = build(kind)
    x, g = batch()

    def step() -> None:
        forget_gradients(model)
        model(x).backward(g)

    graph, _ = capture(step)
    for seed in range(3):
        write_raws(model, seed)
        graph.replay()
        write_raws(model, 20 + seed)
        forget_gradients(model)
        expected = oracle_step(model, states_of(model), x, g)
        y = model(x)
        y.backward(g)
        check_step(model, y.detach(), expected)


def test_replays_in_eval_mode_do_not_iterate():
    model = build("group").eval()
    x, _ = batch()
    with torch.no_grad():
        graph, y = capture(lambda: model(x))
        for seed in range(3):
            write_raws(model, seed)
            before = states_of(model)
            graph.replay()
            expected = oracle_step(model, before, x, torch.ones_like(y), times=0)["y"][0]
            assert_near(y, expected)
            assert all(same_bits(a, b) for a, b in zip(states_of(model), before, strict=True))


def test_a_layer_that_is_read_twice_in_a_captured_step_iterates_once():
    layer = build("alone")[0]
    raw = wx.raw(layer)
    dout = torch.randn(64, 48, device=raw.device)

    def step() -> tuple[Tensor, Tensor]:
        raw.grad = None
        first, second = layer.weight, layer.weight
        (first * dout).sum().backward()
        return first.detach(), second.detach()

    graph, (first, second) = capture(step)
    for seed in range(3):
        with torch.no_grad():
            raw.normal_(generator=torch.Generator(raw.device).manual_seed(seed))
        weight, grad, after = answer(raw, state_of(layer), dout)
        graph.replay()
        torch.cuda.synchronize()
        assert_near(first, weight)
        assert_near(second, weight)
        assert_near(raw.grad, grad)
        for actual, exact in zip(state_of(layer), after, strict=True):
            assert_near(actual, exact)


def test_list_ops_replay_to_the_same_bits():
    inputs = list_inputs([(64, 64)] * 20 + [(512, 768), (2048, 1536), (3, 5)])
    graph, outputs = capture(lambda: run_list(inputs))
    for seed in range(2):
        other = list_inputs([t.shape for t in inputs["weights"]], seed=seed)
        for name, tensors in other.items():
            for target, source in zip(inputs[name], tensors, strict=True):
                target.copy_(source)
        graph.replay()
        assert same_bits(outputs, run_list(other))


def test_a_copy_of_a_captured_model_stands_alone():
    model = build("group")
    x, g = batch()

    def step() -> None:
        forget_gradients(model)
        model(x).backward(g)

    graph, _ = capture(step)
    twin = copy.deepcopy(model)
    write_raws(twin, 1)
    kept = states_of(twin)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(states_of(twin), kept, strict=True))
    forget_gradients(twin)
    expected = oracle_step(twin, kept, x, g)
    y = twin(x)
    y.backward(g)
    check_step(twin, y.detach(), expected)
