"""Autocast rounds none of the products that a weight is made with, whichever way it is made and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import weightxform as wx
from weightxform import functional as F
from weightxform.weight_norm.function import apply as weight_norm


def unit(n: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n), dim=0)


def _spectral_norm(weight: Tensor) -> Tensor:
    u, v = unit(6), unit(12)
    return F.spectral_norm(weight, u, v, n_power_iterations=2)[0]


def _project(z: Tensor) -> Tensor:
    return F.project(z, {"w": torch.zeros(5, 3), "b": torch.zeros(5)}, projection="kronecker")["w"]


# What is made of tensors of these shapes. Where a function draws a constant, it draws the same one every time.
MADE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "filter_warp": (F.filter_warp, ((4, 3, 3, 3), (2, 9, 9))),
    "rotation_matrix": (lambda angle: F.rotation_matrix(angle, 3), ((3,),)),
    "affine_matrix": (lambda theta: F.affine_matrix(theta, 3, "bicubic"), ((2, 2, 3),)),
    "modulate": (F.modulate, ((4, 3, 3, 3), (2, 3))),
    "filter_mlp": (
        lambda *tensors: F.filter_mlp(*tensors, activation="silu"),
        ((4, 3, 3, 3), (2, 2), (5, 11), (5,), (9, 5), (9,)),
    ),
    "spectral_norm": (_spectral_norm, ((6, 12),)),
    "weight_norm": (lambda weight, g: weight_norm(weight, g, 0, None)[0], ((6, 12), (6,))),
    "project": (_project, ((20,),)),
}


def made(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    function, shapes = MADE[name]

    def with_constants(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(*tensors)

    torch.manual_seed(0)
    return with_constants, tuple(torch.randn(shape) for shape in shapes)


def _reference(f, tensors) -> tuple[Tensor, ...]:
    with wx.backend("reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = f(*leaves)
        return (out, *torch.autograd.grad(out, leaves, upstream(out)))


def _backward_with_a_graph(f, tensors) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    return torch.autograd.grad(out, leaves, upstream(out), create_graph=True)


def _forward_mode(f, tensors) -> tuple[Tensor, ...]:
    return torch.func.jvp(f, tensors, tuple(t.cos() for t in tensors))


def _function_transform(f, tensors) -> tuple[Tensor, ...]:
    return torch.func.grad(lambda *a: (f(*a) * upstream(f(*tensors))).sum(), 0)(*tensors).unbind(0)


def upstream(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel()).cos().reshape(out.shape)


@pytest.mark.parametrize("way", [_reference, _backward_with_a_graph, _forward_mode, _function_transform])
@pytest.mark.parametrize("name", MADE)
def test_nothing_is_rounded(name: str, way: Callable[..., tuple[Tensor, ...]]) -> None:
    expected = way(*made(name))
    with torch.autocast("cpu", torch.bfloat16):
        found = way(*made(name))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["filter_warp", "rotation_matrix", "modulate", "filter_mlp", "spectral_norm"])
def test_nothing_is_rounded_in_a_compiled_function_transform(name: str) -> None:
    """Where Dynamo would drop a Function's backward, and its operations stand in the graph instead."""
    function, shapes = MADE[name]
    if name == "spectral_norm":
        u, v = unit(6), unit(12)
        function = lambda weight: F.spectral_norm(weight, u, v)[0]  # noqa: E731
    tensors = tuple(torch.randn(shape) for shape in shapes)
    g = upstream(function(*tensors))

    def gradient(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *a: (function(*a) * g).sum())(*tensors)

    expected = gradient(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_kronecker_projection_compiles() -> None:
    """Its products stand in the graph, without an op around them, forward and backward."""
    net = torch.nn.Linear(5, 3)
    sub = wx.Subspace(net, 10, projection="kronecker")
    torch.nn.init.normal_(sub.coordinates)
    found = []
    for read in (lambda: net.weight * 1, torch.compile(lambda: net.weight * 1, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            weight = read()
        found.append((weight, *torch.autograd.grad(weight, sub.coordinates, upstream(weight))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdaptiveRotatedConv2d", "ModulatedConv2d"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_float64_layer_stays_one(name: str, batch: int) -> None:
    """As ``nn.Conv2d`` does."""
    x = torch.randn(batch, 4, 6, 6, dtype=torch.float64)
    if name == "ModulatedConv2d":
        layer, args = wx.ModulatedConv2d(4, 5, 3, 2, dtype=torch.float64), (x, torch.randn(batch, 2).double())
    else:
        layer, args = wx.AdaptiveRotatedConv2d(4, 5, 3, dtype=torch.float64), (x,)
    expected = layer(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.Conv2d(4, 5, 3, dtype=torch.float64)(x).dtype == torch.float64
        found = layer(*args)
    torch.testing.assert_close(found, expected)
