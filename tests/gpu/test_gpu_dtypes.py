"""Autocast, memory formats, and the backends beside each other."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import computed, randn, state_of
from on_gpu import (
    DEVICE,
    KINDS,
    answer,
    anywhere,
    assert_near,
    batch,
    build,
    check_step,
    needs_gpu,
    oracle_step,
    states_of,
    write_raws,
)
from torch import nn

import weightxform as wx
from weightxform.numerics import relative_error
from weightxform.registry import OPS
from weightxform.verify import allowed_errors, flatten, make_args


@anywhere
@pytest.mark.parametrize("kind", KINDS)
def test_steps_against_float64(kind):
    for dtype in (torch.float32, torch.float64):
        model = build(kind, dtype)
        for step in range(3):
            x, g = batch(step, dtype)
            model.zero_grad()
            write_raws(model, step)
            expected = oracle_step(model, states_of(model), x, g)
            y = model(x)
            y.backward(g)
            check_step(model, y.detach(), expected)


@anywhere
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_half_weights_from_float_arithmetic(dtype, grouped):
    model = build("group" if grouped else "alone")
    for step in range(3):
        write_raws(model, step)
        before = states_of(model)
        model.zero_grad()
        for i, (layer, state) in enumerate(zip(model[::2], before, strict=True)):
            raw = wx.raw(layer)
            dout = randn(*raw.shape, seed=step + i).to(DEVICE, dtype)
            with torch.autocast(DEVICE.type, dtype):
                weight = layer.weight
            assert weight.dtype == dtype and weight.device == raw.device
            weight.backward(dout)
            exact, grad, after = answer(raw, state, dout)
            assert_near(weight, exact)
            assert raw.grad.dtype == torch.float32
            assert_near(raw.grad, grad)
            for actual, expected in zip(state_of(layer), after, strict=True):
                assert_near(actual, expected)
        with torch.autocast(DEVICE.type, dtype):
            assert model(batch()[0]).dtype == dtype


@anywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_weights_and_gradients(dtype):
    torch.manual_seed(0)
    for layer in (nn.Conv2d(12, 20, 3), nn.ConvTranspose2d(12, 20, 3), nn.Conv3d(4, 6, 3)):
        layout = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
        layer = computed(layer.to(DEVICE, dtype, memory_format=layout))
        raw, state = wx.raw(layer), state_of(layer)
        assert raw.is_contiguous(memory_format=layout)
        for dense in (False, True):  # an upstream gradient in the layout of the weight, and in another
            raw.grad = None
            dout = randn(*raw.shape, dtype=dtype).to(DEVICE)
            dout = dout if dense else dout.to(memory_format=layout)
            weight = layer.weight
            weight.backward(dout)
            assert weight.stride() == raw.grad.stride() == raw.stride()
            exact, grad, after = answer(raw, state, dout, dim=int(isinstance(layer, nn.ConvTranspose2d)))
            assert_near(weight, exact)
            assert_near(raw.grad, grad)
        for actual, expected in zip(state_of(layer), after, strict=True):
            assert_near(actual, expected)


def check_backends(first: str, second: str) -> None:
    compared = 0
    for op in OPS.values():
        if op.triton is None or not op.name.startswith("spectral_norm"):
            continue
        for case in op.cases:
            for dtype in (torch.float32, torch.bfloat16):
                outputs = []
                for name in (first, second):
                    with wx.backend(name):
                        outputs.append(flatten(op(*make_args(op, case, dtype, DEVICE))))
                for a, b, allowed in zip(*outputs, allowed_errors(op, case, dtype), strict=True):
                    assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
                    error, bound = relative_error(a, b), 2 * allowed + 4 * torch.finfo(a.dtype).eps
                    assert error <= bound, f"{op.name}-{case}, {dtype}: {first} and {second} differ by {error:.2e}"
                    compared += 1
    assert compared


@needs_gpu
def test_triton_gives_what_cuda_gives():
    check_backends("cuda", "triton")


@anywhere
@pytest.mark.parametrize("name", ["reference", "triton", DEVICE.type])
def test_training_under_a_forced_backend(name):
    if DEVICE.type == "cpu" and name == "triton":
        name = "reference"  # the interpreter has tests of its own
    with wx.backend(name):
        model = build("group")
        for step in range(3):
            x, g = batch(step)
            model.zero_grad()
            write_raws(model, step)
            expected = oracle_step(model, states_of(model), x, g)
            y = model(x)
            y.backward(g)
            check_step(model, y.detach(), expected)
