"""Kernels run on the current stream, and their scratch memory belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from on_gpu import CYCLES, DEVICE, RUNS, SHAPES, list_inputs, needs_gpu, same_bits

pytestmark = needs_gpu


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    yield stream
    torch.cuda.synchronize()


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Callable:
    return RUNS[request.param]


def nans(inputs: dict) -> dict:
    return {k: [torch.full_like(t, float("nan")) for t in v] for k, v in inputs.items()}


def test_nothing_runs_before_the_current_stream_is_ready(run, stream):
    inputs = list_inputs(SHAPES)
    expected = run(inputs)
    late = nans(inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for name, tensors in inputs.items():
            for target, source in zip(late[name], tensors, strict=True):
                target.copy_(source)
        found = run(late)
    stream.synchronize()
    assert same_bits(found, expected)


def test_scratch_is_not_shared_with_what_another_stream_allocates(run, stream):
    inputs = list_inputs(SHAPES)
    expected = run(inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        found = run(inputs)
    sizes = 1, 16, 64, 128, 512, 1024, 4096, 65536, 2**20
    noise = [torch.full((n,), float("nan"), device=DEVICE) for n in sizes for _ in range(16)]
    torch.cuda.synchronize()
    assert same_bits(found, expected)
    assert all(bool(t.isnan().all()) for t in noise), "nor do the kernels write into theirs"


def test_a_weight_that_is_freed_while_its_stream_still_works(run, stream):
    inputs = list_inputs(SHAPES)
    expected = run(inputs)
    mine = {k: [t.clone() for t in v] for k, v in inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        found = run(mine)
    for tensors in mine.values():
        for t in tensors:
            t.record_stream(stream)
    mine.clear()
    del tensors, t
    noise = [torch.full_like(t, float("nan")) for tensors in inputs.values() for t in tensors for _ in range(4)]
    torch.cuda.synchronize()
    assert same_bits(found, expected) and noise


def test_several_streams_at_once_give_the_same_bits(run):
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [list_inputs(SHAPES, seed=seed) for seed in range(3)]
    expected = [run(i) for i in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((i, run(inputs[i])))
    torch.cuda.synchronize()
    assert all(same_bits(outputs, expected[i]) for i, outputs in found)
