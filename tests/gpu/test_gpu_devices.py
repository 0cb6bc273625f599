"""Which device: the tensors decide, the current one stays current, and a group may span several."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import randn, state_of, unsettle
from on_gpu import DEVICE, answer, anywhere, assert_near, needs_gpu, run_list, run_single
from torch import nn

import weightxform as wx
from weightxform.registry import OPS
from weightxform.spectral_norm.op import make_inputs
from weightxform.verify import flatten, make_args


def last_gpu() -> torch.device:
    """Not the current one, where there are several."""
    return torch.device("cuda", torch.cuda.device_count() - 1)


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_call_computes_on_the_device_of_its_tensors_and_leaves_the_current_one(name):
    op, device = OPS[name], last_gpu()
    torch.cuda.set_device(0)
    before = torch.cuda.current_device(), torch.cuda.current_stream(), torch.cuda.current_stream(device)
    for case in op.cases:
        outputs = flatten(op(*make_args(op, case, torch.float32, device)))
        assert all(t.device == device for t in outputs)
        assert (torch.cuda.current_device(), torch.cuda.current_stream(), torch.cuda.current_stream(device)) == before


@needs_gpu
def test_a_backward_computes_there_too():
    device = last_gpu()
    torch.cuda.set_device(0)
    weight, u, v = make_inputs((33, 65), 0, torch.float32, device, torch.Generator().manual_seed(0))
    inputs = {"weights": [weight], "us": [u], "vs": [v], "douts": [torch.randn(33, 65, device=device)]}
    for run in (run_single, run_list):
        assert all(t.device == device for t in run(inputs))
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_tensors_of_two_devices_are_refused():
    weight, u, v = make_inputs((33, 65), 0, torch.float32, torch.device("cuda"), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"spectral_norm: u must be float32\[33\] on cuda:0"):
        wx.functional.spectral_norm(weight, u.cpu(), v)
    with pytest.raises((RuntimeError, ValueError)):
        OPS["spectral_norm_fwd"](weight, u.cpu(), v, None, 0, 1, 1e-12, False, None, None)
    with pytest.raises((RuntimeError, ValueError)):
        OPS["spectral_norm_fwd_list"](
            [weight, weight.cpu()], [u, u.cpu()], [v, v.cpu()], [], [0, 0], [1, 1], 1e-12, False, None, None
        )
    torch.cuda.synchronize()  # no kernel ran on what it cannot read


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 7), nn.Linear(7, 6).to(DEVICE), nn.Conv2d(6, 5, 3), nn.Linear(5, 11).to(DEVICE, torch.bfloat16),
        nn.Conv1d(4, 6, 3).to(DEVICE), nn.Linear(8, 4),
    )  # fmt: skip


def check_weights(net: nn.Sequential, step: int) -> None:
    """Every weight and gradient, each on its own device, against float64."""
    before = [state_of(layer) for layer in net]
    for i, (layer, state) in enumerate(zip(net, before, strict=True)):
        raw = wx.raw(layer)
        raw.grad = None
        dout = randn(*raw.shape, seed=50 * step + i, dtype=raw.dtype).to(raw.device)
        weight = layer.weight
        weight.backward(dout)
        assert weight.device == raw.device and weight.dtype == raw.dtype
        exact, grad, after = answer(raw, state, dout)
        assert_near(weight, exact)
        assert_near(raw.grad, grad)
        for actual, expected in zip(state_of(layer), after, strict=True):
            assert actual.device == raw.device
            assert_near(actual, expected)


@anywhere
def test_one_constrain_over_devices_and_dtypes():
    net = model()
    wx.constrain(net, wx.SpectralNorm)
    unsettle(net)
    for step in range(3):
        with torch.no_grad():
            for i, layer in enumerate(net):
                raw = wx.raw(layer)
                raw.copy_(randn(*raw.shape, seed=10 * step + i, dtype=raw.dtype))
        check_weights(net, step)


@anywhere
def test_a_member_of_a_group_that_moves():
    net = model()
    wx.constrain(net, wx.SpectralNorm)
    unsettle(net)
    check_weights(net, 0)
    for step, (i, where) in enumerate(((0, DEVICE), (1, "cpu"), (3, torch.float32), (0, "cpu"), (4, "cpu")), 1):
        net[i].to(where)
        with torch.no_grad():
            for layer in net:
                wx.raw(layer).mul_(1.5)
        check_weights(net, step)
    check_moved_as_a_whole(net)


def check_moved_as_a_whole(net: nn.Sequential) -> None:
    for step, where in enumerate((DEVICE, "cpu", DEVICE), 10):
        net.to(where)
        with torch.no_grad():
            for layer in net:
                wx.raw(layer).mul_(0.9)
        check_weights(net, step)
