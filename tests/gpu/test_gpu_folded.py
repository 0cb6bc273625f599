"""Folded layers on a GPU, in every dtype: as accurate as the unfolded ones, and nothing waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from folded_layers import KINDS, folded_twin, folds, input_for, step, unfolded, upstream
from on_gpu import DEVICE, ROUNDING, anywhere, needs_gpu

from weightxform import nn as folding
from weightxform.numerics import relative_error

__all__ = ["folds"]  # a fixture


def check(kind, dtype, x, cast=None, **options) -> None:
    """One training step: errors against float64 on the CPU, at most twice those of the unfolded layer."""
    exact = unfolded(kind, dtype, **options)
    folded, plain = folded_twin(exact).to(DEVICE), unfolded(kind, dtype, **options).to(DEVICE)
    exact.double()
    dy = upstream(exact(x.double()))
    exact = unfolded(kind, dtype, **options).double()

    def run(layer):
        def call(x):
            with torch.autocast(DEVICE.type, cast, enabled=cast is not None):
                return layer(x).to(dtype)

        return step(layer, x.to(DEVICE), call=call, dy=dy.to(DEVICE, dtype))

    oracle = step(exact, x.double(), dy=dy.to(dtype).double())
    actual, usual = run(folded), run(plain)
    for name, value in oracle.items():
        assert actual[name].dtype == usual[name].dtype, name
        bound = 2 * relative_error(usual[name], value) + 2 * torch.finfo(cast or dtype).eps
        if dtype == torch.float64:  # the oracle has the same error
            bound = ROUNDING[dtype]
        assert relative_error(actual[name], value) <= bound, name


@anywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"gain": -0.7, "learn_gain": True, "bound": 0.3}], ids=["plain", "learned"])
@pytest.mark.parametrize("kind", [k for k in KINDS if "empty" not in k])
def test_dtypes(kind, dtype, options, monkeypatch, folds):
    monkeypatch.setattr(folding, "_worth", lambda *_: True)
    check(kind, dtype, input_for(kind, dtype), **options)
    assert len(folds) == (dtype != torch.float16)


@anywhere
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rides", "no_bias", "conv2d", "conv_groups"])
def test_autocast(kind, cast, folds):
    check(kind, torch.float32, input_for(kind, torch.float32), cast)
    assert len(folds) == (cast != torch.float16)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rides", "batch_above_outputs", "conv2d"])
def test_nothing_waits_for_the_gpu(kind, dtype, monkeypatch, folds):
    monkeypatch.setattr(folding, "_worth", lambda *_: True)
    layer, x = folded_twin(unfolded(kind, dtype, learn_gain=True)).to(DEVICE), input_for(kind, dtype).to(DEVICE)
    layer(x).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step()
            layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert folds == ["tensors"] * 3
