"""Filter warps, modulation and per-filter networks on the host GPU: sizes that the cases of the ops have not, many
groups of partial sums, and what is refused."""

import pytest
import torch
from host_build import HostGPU, compile_for_host

from weightxform.numerics import FLOAT_DTYPES, opmath, relative_error
from weightxform.registry import OPS
from weightxform.verify import convert, flatten


@pytest.fixture(scope="session")
def gpu() -> HostGPU:
    gpu = HostGPU(compile_for_host())
    gpu.order("random")
    return gpu


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check(gpu: HostGPU, name: str, *args) -> None:
    """As near to float64 as verify.py wants it, and the same bits in another order of threads and blocks."""
    exact = flatten(OPS[name].reference(*convert(args, lambda t: t.double())))
    rounded = flatten(OPS[name].reference(*args))
    gpu.order("random")
    found = flatten(gpu[name](*args))
    gpu.order("reverse")
    again = flatten(gpu[name](*args))
    assert len(found) == len(exact) > 0
    for a, b, r, e in zip(found, again, rounded, exact, strict=True):
        assert a.shape == e.shape and a.dtype == r.dtype and torch.equal(a, b)
        allowed = 1e-13 if a.dtype == torch.float64 else 2 * relative_error(r, e) + 2 * torch.finfo(a.dtype).eps
        assert relative_error(a, e) <= allowed


def warp(batch: int, banks: int, filters: int, taps: int, dtype: torch.dtype) -> tuple:
    weight, a = randn(banks, filters, taps, dtype=dtype), randn(batch, banks, taps, taps, dtype=opmath(dtype), seed=1)
    return randn(batch, filters, taps, dtype=dtype, seed=2), weight, a


@pytest.mark.parametrize(
    ("batch", "banks", "filters", "taps"),
    [
        (2, 1, 270_000, 3),  # more tiles than groups
        (11, 1, 600, 4),
        (9, 1, 513, 9),
        (70, 1, 3, 9),
        (3, 1, 700, 27),
        (2, 3, 300, 9),
        (5, 2, 130, 10),
        (1, 1, 40, 300),
    ],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_warps_of_other_sizes(gpu, batch, banks, filters, taps, dtype):
    if filters > 10_000 and dtype != torch.float32:
        filters //= 100
    grad, weight, a = warp(batch, banks, filters, taps, dtype)
    check(gpu, "filter_warp_fwd", weight, a, None)
    check(gpu, "filter_warp_bwd", grad, weight, a, True, True)
    check(gpu, "filter_warp_bwd", grad, weight, a, False, True)


@pytest.mark.parametrize(
    ("samples", "outputs", "inputs", "taps"),
    [(9, 3, 7, 300), (17, 5, 300, 4), (2, 300, 3, 9), (8, 2, 1500, 9), (3, 2, 2, 513)],
)
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_modulation_of_other_sizes(gpu, samples, outputs, inputs, taps, demodulate, dtype):
    wide = opmath(dtype)
    weight, style = randn(outputs, inputs, taps, dtype=dtype), randn(samples, inputs, dtype=wide, seed=1) + 0.5
    check(gpu, "modulate_fwd", weight, style, demodulate, 1e-8, None)
    d = OPS["modulate_fwd"].reference(weight.double(), style.double(), demodulate, 1e-8, None)[1].to(wide)
    grad = (randn(samples, outputs, inputs, taps, seed=2) + weight.float() * style.float()[:, None, :, None]).to(dtype)
    for needed in ((True, True), (False, True), (True, False)):
        check(gpu, "modulate_bwd", grad, weight, style, d, demodulate, *needed)


@pytest.mark.parametrize(
    ("batch", "filters", "taps", "hidden", "activation"),
    [
        (5, 130, 9, 70, "silu"),
        (1, 34_000, 3, 2, "tanh"),  # more tiles than groups
        (1, 200, 4, 130, "tanh"),
        (6, 33, 25, 33, "silu"),
        (2, 300, 11, 35, "tanh"),
        (2, 3, 70, 5, "silu"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_networks_of_other_sizes(gpu, batch, filters, taps, hidden, dtype, activation):
    if filters > 10_000 and dtype != torch.float32:
        filters //= 100
    wide = opmath(dtype)
    weight, v = randn(filters, taps, dtype=dtype), randn(batch, hidden, dtype=wide, seed=1)
    w1, w2 = randn(hidden, taps, dtype=wide, seed=2) / taps**0.5, randn(taps, hidden, dtype=wide, seed=3) / hidden**0.5
    check(gpu, "filter_mlp_fwd", weight, v, w1, w2, randn(taps, dtype=wide, seed=4), activation, True, None)
    grad = randn(batch, filters, taps, dtype=dtype, seed=5)
    for need_weight in (True, False):
        check(gpu, "filter_mlp_bwd", grad, weight, v, w1, w2, activation, True, need_weight)


def test_modulation_of_filters_with_no_taps(gpu):
    """The scales are still there: of eps alone."""
    args = randn(2, 3, 0), randn(5, 3, seed=1), True, 0.25, None
    out, d = gpu["modulate_fwd"](*args)
    assert out.shape == (5, 2, 3, 0) and torch.equal(d, torch.full((5, 2), 2.0))


def test_the_slope_of_tanh(gpu):
    """Where 1 - tanh^2 would be off by three roundings."""
    x = torch.linspace(-9, 9, 4001)[:, None].contiguous()
    one = torch.ones(1, 1)
    slope = gpu["filter_mlp_bwd"](torch.ones(1, 4001, 1), x, torch.zeros(1, 1), one, one, "tanh", False, True)[0]
    assert (slope.double() - x.double().cosh() ** -2).abs().max() < 2.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("filter_warp_fwd", (randn(1, 5, 9), randn(2, 1, 9, 8), None), r"a must be \[B, E, K, K\]"),
        ("filter_warp_fwd", (randn(1, 5, 9), randn(2, 2, 9, 9), None), r"a must be \[B, E, K, K\]"),
        ("filter_warp_fwd", (randn(1, 5, 9), randn(2, 1, 9, 9).double(), None), "a must be on the device"),
        ("filter_warp_fwd", (randn(1, 5, 9), randn(2, 1, 9, 9), torch.int32), "out_dtype must be"),
        ("filter_warp_bwd", (randn(2, 4, 9), randn(1, 5, 9), randn(2, 1, 9, 9), True, True), "grad must be"),
        ("warp_matrix_fwd", (randn(2, 2), "rotate", 3, 3, 1.0, 1.0, "bilinear", "zeros"), r"params must be \[B, P\]"),
        ("warp_matrix_fwd", (randn(2, 1), "turn", 3, 3, 1.0, 1.0, "bilinear", "zeros"), "kind must be"),
        ("warp_matrix_fwd", (randn(2, 1), "rotate", 3, 3, 1.0, 1.0, "nearest", "zeros"), "interpolation must be"),
        (
            "warp_matrix_bwd",
            (
                randn(1, 1, 1).expand(1 << 31, 1, 1),
                randn(1, 1).expand(1 << 31, 1),
                "rotate",
                1,
                1,
                1.0,
                1.0,
                "bilinear",
                "zeros",
            ),
            "fewer than 2\\^31 conditions",
        ),
        ("modulate_fwd", (randn(3, 4, 9), randn(2, 5), True, 1e-8, None), r"style must be \[N, I\]"),
        ("modulate_bwd", (randn(2, 3, 4, 8), randn(3, 4, 9), randn(2, 4), randn(2, 3), True, True, True), "grad must"),
        ("modulate_bwd", (randn(2, 3, 4, 9), randn(3, 4, 9), randn(2, 4), randn(3, 2), True, True, True), "d must be"),
        (
            "filter_mlp_fwd",
            (randn(5, 9), randn(2, 8), randn(7, 9), randn(9, 8), randn(9), "relu", False, None),
            r"w1 must be \[H, K\]",
        ),
        (
            "filter_mlp_fwd",
            (randn(5, 9), randn(2, 8), randn(8, 9), randn(9, 8), randn(8), "relu", False, None),
            r"b2 must be \[K\]",
        ),
        (
            "filter_mlp_fwd",
            (randn(5, 9), randn(2, 8), randn(8, 9), randn(9, 8), randn(9), "gelu", False, None),
            "activation must be",
        ),
    ],
)
def test_arguments_that_would_read_out_of_bounds_are_refused(gpu, name, args, message):
    with pytest.raises(RuntimeError, match=message):
        gpu[name](*args)


def test_a_position_that_is_not_finite_makes_its_row_nan(gpu):
    args = torch.tensor([[float("nan")], [float("inf")], [0.3]]), "rotate", 3, 3, 1.0, 1.0, "bilinear", "zeros"
    a = gpu["warp_matrix_fwd"](*args)
    assert torch.equal(a.isnan(), OPS["warp_matrix_fwd"].reference(*args).isnan())
    assert a[0].isnan().any() and a[2].isfinite().all()
