"""Filter warps, their matrices, modulation and per-filter networks: every case, launches, graphs, large sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_gpu import DEVICE, anywhere, assert_near, needs_gpu, same_bits
from test_gpu_graphs import capture
from torch import Tensor

import weightxform as wx
from weightxform.registry import OPS
from weightxform.verify import check_case, flatten

ON_GPU = DEVICE.type == "cuda"
ROOMS = "filter_warp", "warp_matrix", "modulate", "filter_mlp"
NAMES = [f"{room}_{way}" for room in ROOMS for way in ("fwd", "bwd")]


@anywhere
@pytest.mark.parametrize("name", NAMES)
def test_every_case_in_every_dtype(name):
    op = OPS[name]
    results = [check_case(op, case, dtype, DEVICE, op) for case in op.cases for dtype in op.dtypes]
    assert [str(r) for r in results if not r.passed] == []


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def warped(weight: Tensor, angle: Tensor) -> Tensor:
    return wx.functional.filter_warp(weight, wx.functional.rotation_matrix(angle, weight.shape[-1]))


def modulated(weight: Tensor, style: Tensor) -> Tensor:
    return wx.functional.modulate(weight, style)


def networked(weight: Tensor, v: Tensor, w1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    from weightxform.filter_mlp.function import apply

    return apply(weight.flatten(0, 1).flatten(1), v, w1, w2, b2, "silu", True)


def inputs(which: str, channels: int, seed: int = 0) -> tuple[Callable, list[Tensor], tuple[int, int]]:
    """(a function, its arguments, the launches that its forward and its backward may take)."""
    weight = randn(channels, channels, 3, 3, seed=seed)
    if which == "warp":
        return warped, [weight, randn(8, seed=seed + 1)], (2, 4)
    if which == "modulate":
        return modulated, [weight, randn(8, channels, seed=seed + 1) + 0.5], (1, 2)
    layers = (
        randn(8, 40, seed=seed + 1),
        randn(40, 9, seed=seed + 2),
        randn(9, 40, seed=seed + 3),
        randn(9, seed=seed + 4),
    )
    return networked, [weight, *layers], (1, 2)


WHICH = "warp", "modulate", "network"


def run(function: Callable, arguments: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def outputs(function: Callable, arguments: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*arguments)


@anywhere
@pytest.mark.parametrize("which", WHICH)
def test_values_and_gradients_are_those_of_float64(which):
    function, arguments, _ = inputs(which, 96 if ON_GPU else 24)
    upstream = randn(*outputs(function, arguments).shape, seed=9)
    found = run(function, arguments, upstream)
    with wx.backend("reference"):
        exact = run(function, [t.double() for t in arguments], upstream.double())
    for a, e in zip(found, exact, strict=True):
        assert_near(a, e)
    assert same_bits(found, run(function, arguments, upstream))


@needs_gpu
@pytest.mark.parametrize("which", WHICH)
def test_a_replay_reads_the_arguments_as_they_are_then(which):
    function, arguments, _ = inputs(which, 48)
    upstream = randn(*outputs(function, arguments).shape, seed=9)
    graph, found = capture(lambda: run(function, arguments, upstream))
    for seed in (10, 20):
        for target, source in zip(arguments, inputs(which, 48, seed)[1], strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(found, run(function, arguments, upstream))


def launches(work: Callable[[], object]) -> list[str]:
    """The kernels of this package that it launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if "wx::gpu" in name]


@needs_gpu
@pytest.mark.parametrize("which", WHICH)
def test_few_launches(which):
    function, arguments, (forward, backward) = inputs(which, 64)
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = function(*leaves)
    upstream = randn(*out.shape, seed=9)
    torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    assert 1 <= len(launches(lambda: function(*leaves))) <= forward
    assert 1 <= len(launches(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))) <= backward


@needs_gpu
@pytest.mark.parametrize("which", WHICH)
def test_nothing_waits_for_the_gpu(which):
    function, arguments, _ = inputs(which, 32)
    upstream = randn(*outputs(function, arguments).shape, seed=9)
    run(function, arguments, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, arguments, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@anywhere
def test_more_numbers_than_32_bits_count():
    """The last condition of many: its place in the output is past 2^31."""
    batch, filters = (260, 2**20) if ON_GPU else (3, 2**10)
    weight, a = randn(1, filters, 9, dtype=torch.bfloat16), randn(batch, 1, 9, 9, seed=1)
    out = OPS["filter_warp_fwd"](weight, a, None)
    expected = weight[0].double() @ a[-1, 0].double().T
    assert_near(out[-1], expected)
    da = OPS["filter_warp_bwd"](out, weight, a, False, True)[1]
    assert_near(da[-1, 0], out[-1].double().T @ weight[0].double(), torch.bfloat16)


@anywhere
@pytest.mark.parametrize("name", NAMES)
def test_arguments_anywhere_in_memory(name):
    """Tensors that begin at any element, not at 16 bytes."""
    op = OPS[name]
    case = next(c for c in op.cases if c not in ("large", "empty"))
    args = op.cases[case](torch.float32, DEVICE, torch.Generator().manual_seed(0))

    def moved(t: object) -> object:
        if not isinstance(t, Tensor):
            return t
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return room[1:].view(t.shape).copy_(t)

    assert same_bits(flatten(op(*map(moved, args))), flatten(op(*args)))
