"""Transforms that follow a condition, and the layers made of them: the numbers of float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from conditioned_zoo import ZOO, attached, shaken
from on_gpu import DEVICE, anywhere, assert_near
from torch import nn

from weightxform.filter_warp.module import AdaptiveRotatedConv2d
from weightxform.modulation.module import ModulatedConv2d

LAYERS = {
    "adaptive": lambda: AdaptiveRotatedConv2d(4, 6, 3, n_kernels=2, max_angle=None),
    "materialised": lambda: ModulatedConv2d(4, 6, 3, 5, form="materialised"),
    "activation": lambda: ModulatedConv2d(4, 6, 3, 5, form="activation", prenormalize="rms"),
}


@anywhere
@pytest.mark.parametrize("name", ZOO)
def test_transforms(name):
    layer = nn.Conv2d(2, 3, 3)
    transform, conditions = attached(name, layer), ZOO[name].conditions()
    exact, moved = copy.deepcopy(transform).double(), transform.to(DEVICE)
    grad = torch.randn(3, *layer.weight.shape)
    results = []
    for t, device, dtype in ((exact, "cpu", torch.float64), (moved, DEVICE, torch.float32)):
        weight = layer.weight.detach().to(device, dtype).requires_grad_()
        given = {n: c.to(device, dtype if c.is_floating_point() else None) for n, c in conditions.items()}
        floats = [c.requires_grad_() for c in given.values() if c.is_floating_point()]
        out = t.whole(weight, given)
        grads = torch.autograd.grad(out, [weight, *floats, *t.parameters()], grad.to(out), allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    for expected, got in zip(*results, strict=True):
        assert got.device.type == DEVICE.type
        assert_near(got, expected, torch.float32)


@anywhere
@pytest.mark.parametrize("name", ZOO)
def test_transforms_made_there(name):
    layer = nn.Conv2d(2, 3, 3, device=DEVICE)
    transform = ZOO[name].make()
    transform.attach(layer.weight, layer)
    assert all(t.device.type == DEVICE.type for t in (*transform.parameters(), *transform.buffers()))
    shaken(transform)
    dtypes = torch.float32, torch.int64
    given = {n: c.to(DEVICE, dtypes[not c.is_floating_point()]) for n, c in ZOO[name].conditions().items()}
    exact = copy.deepcopy(transform).cpu().double()
    expected = exact.whole(
        layer.weight.cpu().double(),
        {n: c.cpu().double() if c.is_floating_point() else c.cpu() for n, c in given.items()},
    )
    assert_near(transform.whole(layer.weight, given), expected)


@anywhere
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers(kind, dtype):
    layer = LAYERS[kind]()
    arguments = [torch.randn(3, 4, 9, 9), *([] if kind == "adaptive" else [torch.randn(3, 5)])]
    expected = copy.deepcopy(layer).double()(*(a.double() for a in arguments))
    layer.to(DEVICE)
    exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exactly, torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        y = layer(*(a.to(DEVICE) for a in arguments))
    assert y.dtype == dtype
    assert_near(y, expected, dtype)
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
