"""In steady state: the same bits every time, no wait for the GPU, few launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_gpu import KINDS, RUNS, SHAPES, anywhere, batch, build, list_inputs, needs_gpu, run_backward, same_bits
from torch.profiler import ProfilerActivity, profile

from weightxform.registry import OPS

LISTS = {
    "64 layers of 64 x 64": [(64, 64)] * 64,
    "a residual network": [(64, 3, 7, 7)]
    + [(c, c, 3, 3) for c in (64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)]
    + [(128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1), (1000, 512)],
    "mixed": [*SHAPES],
}


@anywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_the_same_bits_every_time(run, dtype):
    inputs = list_inputs(SHAPES, dtype)
    expected = RUNS[run](inputs, 2)
    for i in range(10):
        noise = torch.full((1 + i * 1000,), float("nan"), device=expected[0].device)  # other memory, other scratch
        assert same_bits(RUNS[run](inputs, 2), expected)
        del noise


@anywhere
@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bits(kind):
    ends = []
    for _ in range(2):
        model = build(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for step in range(4):
            x, g = batch(step)
            optimizer.zero_grad()
            model(x).backward(g)
            optimizer.step()
        ends.append([t.clone() for t in model.state_dict().values()])
    assert same_bits(*ends)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_does_not_wait_for_the_gpu(kind):
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, g = batch()

    def step() -> None:
        optimizer.zero_grad()
        model(x).backward(g)
        optimizer.step()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(4_000_000_000)  # two seconds, in which the steps below are only queued
        slept = torch.cuda.Event()
        slept.record()
        for _ in range(3):
            step()
        waited = slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    torch.cuda.synchronize()


def on_the_device(call: Callable[[], object]) -> list[str]:
    """Kernels, copies and fills that ``call`` queues."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@needs_gpu
@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
def test_a_list_is_at_most_three_launches_a_direction(shapes):
    inputs = list_inputs(shapes)
    weights, us, vs, douts = (inputs[k] for k in ("weights", "us", "vs", "douts"))
    n = len(shapes)

    def forward() -> tuple:
        return OPS["spectral_norm_fwd_list"](weights, us, vs, [], [0] * n, [1] * n, 1e-12, False, None, None)

    _, state = forward()
    launched = on_the_device(forward)
    assert 1 <= len(launched) <= 3, launched
    launched = on_the_device(lambda: run_backward(weights, douts, state, us, vs))
    assert 1 <= len(launched) <= 3, launched


@needs_gpu
def test_a_state_alone_is_at_most_three_launches():
    inputs = list_inputs(LISTS["a residual network"])
    weights, us, vs = (inputs[k] for k in ("weights", "us", "vs"))
    n = len(weights)
    launched = on_the_device(lambda: OPS["spectral_norm_state_list"](weights, us, vs, [0] * n, [1] * n, 1e-12, False))
    assert 1 <= len(launched) <= 3, launched
