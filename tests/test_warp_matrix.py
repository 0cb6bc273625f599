"""What is true of warp matrices alone; tests/test_ops.py has their cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import weightxform as wx
from weightxform.functional import affine_matrix, filter_warp, rotation_matrix
from weightxform.warp_matrix import function

# kind: a point away from the kinks, where a tap would land on a tap
POINTS = {
    "rotate": [-2.2],
    "scale": [1.3, 0.8],
    "shear": [0.3, -0.2],
    "affine": [0.9, 0.2, 0.13, -0.3, 1.1, -0.21],
}


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("interpolation", "padding"), [("bilinear", "zeros"), ("bicubic", "border")])
@pytest.mark.parametrize("kind", POINTS)
def test_derivatives_of_every_order_and_mode(kind: str, interpolation: str, padding: str) -> None:
    options = function.Options(kind, 2, 3, 1.0, 2.0, interpolation, padding)
    params = double([POINTS[kind]]).requires_grad_()

    def f(params: Tensor) -> Tensor:
        return function.apply(params, options)

    assert gradcheck(f, params, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, params, check_fwd_over_rev=True)


def sampled(weight: Tensor, theta: Tensor, interpolation: str, padding: str) -> Tensor:
    """[B, O, I, h, w] of weight [O, I, h, w] and theta [B, 2, 3] in taps, by torch's own resampling."""
    height, width = weight.shape[-2:]
    half = double([(width - 1) / 2, (height - 1) / 2])
    ratio = double([[1, half[1] / half[0]], [half[0] / half[1], 1]])  # grid_sample counts in halves of the kernel
    scaled = torch.cat([theta[..., :2] * ratio, theta[..., 2:] / half[:, None]], -1)
    filters = weight.reshape(1, -1, height, width).expand(len(theta), -1, -1, -1)
    grid = F.affine_grid(scaled, list(filters.shape), align_corners=True)
    out = F.grid_sample(filters, grid, mode=interpolation, padding_mode=padding, align_corners=True)
    return out.reshape(len(theta), *weight.shape)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (5, 3), (2, 7)], ids=str)
def test_equals_affine_grid_and_grid_sample(kernel: tuple[int, int], interpolation, padding) -> None:
    weight = torch.randn(3, 2, *kernel, dtype=torch.float64, requires_grad=True)
    theta = (torch.eye(2, 3, dtype=torch.float64) + 0.4 * torch.randn(3, 2, 3, dtype=torch.float64)).requires_grad_()
    ours = filter_warp(weight, affine_matrix(theta, kernel, interpolation, padding))
    theirs = sampled(weight, theta, interpolation, padding)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (weight, theta), upstream),
        torch.autograd.grad(theirs, (weight, theta), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_quarter_turns_and_reflections_permute_taps(k: int, interpolation: str, padding: str) -> None:
    weight = torch.randn(2, 3, k, k, dtype=torch.float64)
    for turns in range(-4, 5):
        turned = filter_warp(weight, rotation_matrix(double(turns * math.pi / 2), k, interpolation, padding))
        torch.testing.assert_close(turned, weight.rot90(turns, (-2, -1)), rtol=1e-12, atol=1e-12)
    for dim, signs in ((-1, [-1.0, 1.0]), (-2, [1.0, -1.0])):
        theta = torch.cat([torch.diag(double(signs)), torch.zeros(2, 1, dtype=torch.float64)], 1)
        flipped = filter_warp(weight, affine_matrix(theta, k, interpolation, padding))
        torch.testing.assert_close(flipped, weight.flip(dim), rtol=1e-12, atol=1e-12)


def test_the_full_circle() -> None:
    angles = torch.arange(-40, 41, dtype=torch.float64) * math.pi / 20 + 0.01  # a whole turn to either side
    for padding in ("zeros", "border"):
        a = rotation_matrix(angles, 5, padding=padding)
        torch.testing.assert_close(a[:41], a[40:], rtol=0, atol=1e-12)
        quarter = rotation_matrix(double(math.pi / 2), 5)
        torch.testing.assert_close(quarter @ a[:71], a[10:], rtol=0, atol=1e-12)  # 10 steps further
    border = rotation_matrix(angles, 5, padding="border")
    torch.testing.assert_close(border.sum(-1), torch.ones_like(border[..., 0]))
    assert bool((border >= 0).all())


def arc(theta: float) -> Tensor:
    """The matrix of ARC (Pu et al., ICCV 2023) for a 3 x 3 kernel and 0 <= theta <= 45 degrees, turned the other way.

    Its corner and edge rows; the others follow by quarter turns.
    """
    x, y = math.cos(theta), math.sin(theta)
    a, b, c = x - y, x * y, x + y
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    matrix[4, 4] = 1
    rows = {0: {0: a, 1: 1 - a}, 1: {1: x - b, 2: b, 4: 1 - c + b, 5: y - b}}
    turned = torch.arange(9).reshape(3, 3).rot90(1).reshape(-1).tolist()  # where rot90 takes each tap from
    for p, row in rows.items():
        for _ in range(4):
            for q, value in row.items():
                matrix[p, q] = value
            p, row = turned.index(p), {turned.index(q): value for q, value in row.items()}
    return matrix


@pytest.mark.parametrize("degrees", [0, 10, 30, 45])
def test_is_arcs_matrix_to_45_degrees(degrees: int) -> None:
    theta = math.radians(degrees)
    torch.testing.assert_close(rotation_matrix(double(theta), 3, padding="border"), arc(theta))


def test_only_the_ratio_of_dilations_matters() -> None:
    angle = double([0.4, 2.0])
    plain = rotation_matrix(angle, (3, 5))
    assert torch.equal(rotation_matrix(angle, (3, 5), dilation=4), plain)
    wide = rotation_matrix(angle, (3, 5), dilation=(1, 2))
    torch.testing.assert_close(rotation_matrix(angle, (3, 5), dilation=(2, 4)), wide)
    assert not torch.allclose(wide, plain)
    # a row of 3 taps, 2 apart, turned by 90 degrees: a column of 5 taps, 1 apart
    row = torch.zeros(1, 1, 5, 3, dtype=torch.float64)
    row[0, 0, 2] = double([1.0, 2.0, 3.0])
    turned = filter_warp(row, rotation_matrix(double(math.pi / 2), (5, 3), dilation=(1, 2)))
    torch.testing.assert_close(turned[0, 0], double([3.0, 2.5, 2.0, 1.5, 1.0])[:, None] * double([0.0, 1.0, 0.0]))


def test_a_translation_is_in_units_of_the_input() -> None:
    weight = torch.randn(1, 1, 3, 5, dtype=torch.float64)
    theta = torch.eye(2, 3, dtype=torch.float64)
    theta[0, 2] = 2.0
    moved = filter_warp(weight, affine_matrix(theta, (3, 5), dilation=(1, 2)))  # by one tap
    torch.testing.assert_close(moved, F.pad(weight[..., 1:], (0, 1)))


def test_a_number_that_is_not_finite_does_not_pass_for_zeros() -> None:
    for backend in wx.backends.available("warp_matrix_fwd"):
        if backend not in ("cpu", "reference"):
            continue
        with wx.backend(backend):
            for bad in (math.nan, math.inf):
                angle = double([bad, 0.5]).requires_grad_()
                a = rotation_matrix(angle, 3)
                assert bool(a[0].isnan().all()) and bool(a[1].isfinite().all())
                a.sum().backward()
                assert angle.grad is not None and bool(angle.grad[0].isnan()) and bool(angle.grad[1].isfinite())


def test_angles_of_every_form() -> None:
    a = rotation_matrix(0.5, 3)
    assert a.shape == (9, 9) and a.dtype == torch.float32
    assert torch.equal(rotation_matrix(torch.tensor([0.5]), 3)[0], a)
    assert torch.equal(rotation_matrix(torch.tensor(0.5, dtype=torch.bfloat16), (3, 3)), a)
    assert rotation_matrix(torch.zeros(0), (2, 3)).shape == (0, 6, 6)
    assert torch.equal(rotation_matrix(0.5, [3, 3]), a)
    torch.testing.assert_close(affine_matrix(torch.eye(2, 3), (2, 3)), torch.eye(6))


def test_a_number_is_not_rounded_to_a_half_default() -> None:
    expected = rotation_matrix(0.3, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = rotation_matrix(0.3, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_written_angle_and_a_second_backward() -> None:
    angle = torch.randn(3, requires_grad=True)
    a = rotation_matrix(angle, 3)
    upstream = torch.randn_like(a)
    first = torch.autograd.grad(a, angle, upstream)[0]
    assert torch.equal(torch.autograd.grad(a, angle, upstream)[0], first)  # with no retain_graph
    with torch.no_grad():
        angle.add_(1)
    with pytest.raises(RuntimeError, match="warp_matrix"):
        a.backward(upstream)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rotation_matrix("1", 3), TypeError, "rotation_matrix: angle must be a number, got '1'"),
        (lambda: rotation_matrix(math.nan, 3), ValueError, "rotation_matrix: angle must be finite"),
        (lambda: rotation_matrix(torch.ones(2, dtype=torch.int64), 3), TypeError, "rotation_matrix: angle must be"),
        (lambda: rotation_matrix(torch.ones(2, 1), 3), ValueError, r"angle must be a number, 0-dim or \[B\], got"),
        (lambda: rotation_matrix(0.1, 3.0), TypeError, "rotation_matrix: kernel_size must be an int, got 3.0"),
        (lambda: rotation_matrix(0.1, 0), ValueError, "rotation_matrix: kernel_size must be at least 1, got 0"),
        (lambda: rotation_matrix(torch.ones(0), 5000), ValueError, "kernel_size must be at most 4096, got 5000"),
        (lambda: rotation_matrix(0.1, (3, 3, 3)), ValueError, "kernel_size must be an int or two of them"),
        (lambda: rotation_matrix(0.1, 3, "nearest"), ValueError, "interpolation must be 'bilinear' or 'bicubic'"),
        (lambda: rotation_matrix(0.1, 3, padding="wrap"), ValueError, "padding must be 'zeros' or 'border'"),
        (lambda: rotation_matrix(0.1, 3, dilation=0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: affine_matrix(torch.eye(3), 3), ValueError, r"affine_matrix: theta must be \[2, 3\] or \[B, 2, 3\]"),
        (lambda: affine_matrix([[1.0]], 3), TypeError, "affine_matrix: theta must be"),
        (lambda: affine_matrix(torch.eye(2, 3), (3, True)), TypeError, "affine_matrix: kernel_size must be an int"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
