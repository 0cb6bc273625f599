"""Triton kernels of warps, modulation and networks over filters in its interpreter. ``test_triton.py`` runs this file.

Every case of every op in float32, and some in the other dtypes; those that take seconds, and float16, are ``long``.

    TRITON_INTERPRET=1 pytest tests/on_triton/interpreted_filters.py
"""

from __future__ import annotations

import importlib
import math

import fast_interpreter
import pytest
import torch
import triton
import triton.language as tl

import weightxform as wx
from weightxform.filter_mlp import triton_kernels as mlp
from weightxform.filter_warp import triton_launch as warp_launch
from weightxform.modulation import triton_launch as modulation_launch
from weightxform.registry import OPS
from weightxform.triton_common import kernels, sums
from weightxform.verify import check_case, make_args

fast_interpreter.install()

ROOMS = ("filter_warp", "warp_matrix", "modulate", "filter_mlp")
ROOM = [op for name, op in OPS.items() if name.startswith(ROOMS)]
OTHER_DTYPES = ("conv3", "experts", "conv5", "rotate", "scale", "plain", "tanh", "silu", "autocast")
LONG = ("large", "many", "wide", "residual")


def _param(op, case, dtype):
    marks = [pytest.mark.long] if case in LONG or dtype == torch.float16 else []
    return pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}", marks=marks)


CASES = [_param(op, case, torch.float32) for op in ROOM for case in op.cases]
CASES += [
    _param(op, case, dtype)
    for op in ROOM
    for case in OTHER_DTYPES
    if case in op.cases
    for dtype in op.dtypes
    if dtype != torch.float32
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_against_float64(op, case, dtype):
    """And two runs give the same bits."""
    with wx.backend("triton"):
        result = check_case(op, case, dtype, "cpu", op)
    assert result.passed, result


def test_every_op_of_the_rooms_has_a_kernel():
    assert len(ROOM) == 8 and all(op.triton is not None for op in ROOM)


def checked(op, case):
    result = check_case(op, case, torch.float32, "cpu", op.triton)
    assert result.passed, result


@pytest.mark.parametrize(
    ("room", "op", "limits"),
    [
        ("filter_warp", "filter_warp_bwd", {"PROGRAMS": 1, "LEAST": 1}),
        ("modulation", "modulate_bwd", {"PROGRAMS": 10_000, "BLOCK": 64}),
        ("filter_mlp", "filter_mlp_bwd", {"PROGRAMS": 1}),
    ],
)
def test_however_the_sums_are_cut(room, op, limits, monkeypatch):
    """More and fewer partial sums than these small cases have."""
    launch = importlib.import_module(f"weightxform.{room}.triton_launch")
    for name, value in limits.items():
        monkeypatch.setattr(launch, name, value)
    for case in ("conv3", "conv5"):
        checked(OPS[op], case)


def test_more_partial_sums_than_are_added_at_once(monkeypatch):
    monkeypatch.setattr(sums, "AT_ONCE", 3)
    acc = torch.randn(150, 5, 14)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = sums.add_rows(acc, torch.empty(5, 14, dtype=dtype))
        torch.testing.assert_close(out, acc.double().sum(0).to(dtype))
    monkeypatch.setattr(warp_launch, "LEAST", 1)
    checked(OPS["filter_warp_bwd"], "one_condition")


def test_blocks_of_any_number_of_taps():
    """Of modulation: a block has all taps of a filter."""
    blocks = [modulation_launch.stream_block(*sizes) for sizes in ((512, 512, 9), (3, 512, 1), (512, 512, 3000))]
    assert [tuple(b.values()) for b in blocks] == [(8, 8, 16, 4), (4, 256, 1, 4), (1, 1, 4096, 16)]
    weight, style = torch.randn(2, 3, 300), torch.randn(2, 3)
    out, d = OPS["modulate_fwd"].triton(weight, style, True, 1e-8, None)
    expected, scale = OPS["modulate_fwd"].reference(weight, style, True, 1e-8, None)
    torch.testing.assert_close((out, d), (expected, scale))
    grad = torch.randn_like(out)
    args = grad, weight, style, d, True, True, True
    torch.testing.assert_close(OPS["modulate_bwd"].triton(*args), OPS["modulate_bwd"].reference(*args))


@triton.jit
def functions(x, of_tanh, of_over, of_root, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    tl.store(of_tanh + i, mlp.tanh(y))
    tl.store(of_over + i, kernels.over(y, tl.abs(y) + 3))
    tl.store(of_root + i, kernels.root(tl.abs(y)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions(dtype):
    x = torch.cat([torch.linspace(-4, 4, 1022), torch.tensor([1e-6, 200.0])]).to(dtype)
    tanh, over, root = (torch.empty_like(x) for _ in range(3))
    functions[(1,)](x, tanh, over, root, N=1024)
    torch.testing.assert_close(tanh.double(), x.double().tanh(), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(over, x / (x.abs() + 3))
    assert torch.equal(root, torch.tensor([math.sqrt(abs(y)) for y in x.tolist()], dtype=dtype))


@triton.jit
def slopes(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    _, slope = mlp.activated(tl.load(x + i), "relu")
    tl.store(out + i, slope)


def test_the_slope_of_relu_at_infinity():
    x = torch.tensor([torch.inf, -torch.inf, 1e30, 0.0])
    out = torch.empty(4)
    slopes[(1,)](x, out, N=4)
    assert out.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_taps_on_taps(interpolation, padding):
    """Quarter turns and none, where both neighbours of a tap count; and an angle that is no number."""
    angles = torch.tensor([[0.0], [torch.pi / 2], [torch.pi], [-torch.pi / 2]])
    options = "rotate", 3, 3, 1.0, 1.0, interpolation, padding
    a = OPS["warp_matrix_fwd"].triton(angles, *options)
    torch.testing.assert_close(a, OPS["warp_matrix_fwd"].reference(angles, *options))
    kernel = torch.randn(3, 3)
    for k, turned in enumerate((a @ kernel.flatten()).unflatten(-1, (3, 3))):
        torch.testing.assert_close(turned, torch.rot90(kernel, k), rtol=1e-5, atol=1e-5)
    nan = torch.full((1, 1), torch.nan)
    ours, theirs = (f(nan, *options) for f in (OPS["warp_matrix_fwd"].triton, OPS["warp_matrix_fwd"].reference))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


REFUSED = [
    ("filter_warp_fwd", "conv3", {1: lambda a: a.double()}, "filter_warp: a must lie where the weight does"),
    ("filter_warp_fwd", "conv3", {1: lambda a: a[..., 1:]}, r"filter_warp: a must be \[B, E, K, K\]"),
    ("filter_warp_fwd", "conv3", {2: lambda _: torch.int32}, "filter_warp: dtypes must be"),
    ("filter_warp_bwd", "conv3", {0: lambda g: g[1:]}, r"filter_warp: grad must be \[3, 41, 9\]"),
    ("warp_matrix_fwd", "rotate", {1: lambda _: "turn"}, "warp_matrix: kind must be one of affine"),
    ("warp_matrix_fwd", "rotate", {6: lambda _: "cubic"}, "warp_matrix: interpolation must be one of"),
    ("warp_matrix_fwd", "rotate", {7: lambda _: "circular"}, "warp_matrix: padding must be one of"),
    ("warp_matrix_fwd", "scale", {0: lambda p: p[:, :1]}, r"warp_matrix: params must be \[B, 2\] for scale"),
    ("warp_matrix_bwd", "scale", {0: lambda g: g[1:]}, "warp_matrix: grad must be"),
    ("modulate_fwd", "conv3", {1: lambda s: s[:, 1:]}, r"modulate: style must be \[N, I\]"),
    ("modulate_fwd", "conv3", {0: lambda w: w.int()}, "modulate: dtypes must be"),
    ("modulate_bwd", "conv3", {3: lambda d: d[1:]}, r"modulate: d must be \[N, O\]"),
    ("modulate_bwd", "conv3", {0: lambda g: g.int()}, "modulate: grad must be float64"),
    ("filter_mlp_fwd", "conv3", {5: lambda _: "gelu"}, "filter_mlp: activation must be one of relu, silu, tanh"),
    ("filter_mlp_fwd", "conv3", {2: lambda w1: w1[1:]}, r"filter_mlp: w1 must be \[H, K\]"),
    ("filter_mlp_bwd", "conv3", {0: lambda g: g[:, 1:]}, "filter_mlp: grad must be"),
]


@pytest.mark.parametrize(("name", "case", "changed", "message"), REFUSED)
def test_arguments_that_do_not_fit(name, case, changed, message):
    args = list(make_args(OPS[name], case, torch.float32, "cpu"))
    for i, change in changed.items():
        args[i] = change(args[i])
    with pytest.raises(RuntimeError, match=message):
        OPS[name].triton(*args)
