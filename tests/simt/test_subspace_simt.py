"""Projections on the host GPU: the promised bits, sizes that the cases of the ops have not, and what is refused."""

import pytest
import torch
from host_build import HostGPU, compile_for_host

from weightxform.numerics import FLOAT_DTYPES, relative_error
from weightxform.registry import OPS
from weightxform.subspace.plan import make_plan
from weightxform.verify import flatten, make_args


@pytest.fixture(scope="session")
def gpu() -> HostGPU:
    gpu = HostGPU(compile_for_host())
    gpu.order("random")
    return gpu


@pytest.mark.parametrize("case", OPS["subspace_fwd"].cases)
def test_theta_has_the_bits_of_the_reference(gpu, case):
    op = OPS["subspace_fwd"]
    for dtype in FLOAT_DTYPES:
        expected = flatten(op.reference(*make_args(op, case, dtype, "cpu")))
        found = flatten(gpu["subspace_fwd"](*make_args(op, case, dtype, "cpu")))
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride(), dtype


def arguments(kind: str, sizes: list[int], dim: int, dtype: torch.dtype, batch: int = 0, **options) -> tuple:
    """(arguments of the forward, arguments of the backward) for whole tensors."""
    plan = make_plan(kind, {f"t{i:04}": n for i, n in enumerate(sizes)}, dim, 3, **options)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (batch,) if batch else ()
    z, c = randn(*lead, dim).to(compute), plan.columns_in(compute, "cpu")
    theta0 = [randn(n).to(dtype) for n in sizes]
    grads = [randn(*lead, n).to(dtype) for n in sizes]
    members, firsts = list(range(len(sizes))), [0] * len(sizes)
    tables = plan.layout, plan.factors, None, kind
    last = plan.tile, plan.strata, plan.packed
    forward = z, c, theta0, members, firsts, *tables, *last
    return forward, (grads, c, members, firsts, *tables, dim, batch, *last)


def check(gpu: HostGPU, forward: tuple, backward: tuple) -> None:
    expected = OPS["subspace_fwd"].reference(*forward)
    for a, b in zip(gpu["subspace_fwd"](*forward), expected, strict=True):
        assert torch.equal(a, b)
    z_bar = gpu["subspace_bwd"](*backward)
    exact = OPS["subspace_bwd"].reference([g.double() for g in backward[0]], None, *backward[2:])
    norm = sum(float(g.double().square().sum()) for g in backward[0]) ** 0.5
    if (c := backward[1]) is not None:
        exact = exact * c.double()
    assert float((z_bar.double() - exact).norm()) <= 2.0**-20 * norm
    assert torch.equal(z_bar, gpu["subspace_bwd"](*backward))


@pytest.mark.parametrize("kind", ["one_hot", "sparse", "block_hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("sizes", "dim", "tile"),
    [
        ([150_001], 7, 4096),
        ([90_000, 70_001], 20_000, 4096),  # more columns than accumulators fit on a chip: ranges of them
        ([90_000, 70_001], 50_000, 256),
        ([40_000, 3], 3000, 64),
        ([60_000], 500, 8192),
    ],
)
def test_many_tiles(gpu, kind, dtype, sizes, dim, tile):
    gpu.device(shared_bytes=227 << 10)
    try:
        check(gpu, *arguments(kind, sizes, dim, dtype, tile=tile, nonzeros=3 if kind == "sparse" else None))
    finally:
        gpu.device()


@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_tile(gpu, kind, dtype):
    gpu.device(shared_bytes=227 << 10)
    try:
        check(gpu, *arguments(kind, [40_001], 300, dtype, batch=2, tile=16384))
    finally:
        gpu.device()


@pytest.mark.parametrize("kind", ["block_hadamard", "rademacher", "fastfood_stacked_sign"])
def test_more_tensors_than_one_launch_takes(gpu, kind):
    sizes = [1 + (7 * i) % 90 for i in range(500)]
    check(gpu, *arguments(kind, sizes, 40, torch.float32, tile=64))


@pytest.mark.parametrize("kind", ["fastfood_global_sign", "fastfood_global_binomial", "fastfood_stacked_sign"])
@pytest.mark.parametrize("dim", [3, 900, 9000])
def test_transforms_of_several_passes(gpu, kind, dim):
    check(gpu, *arguments(kind, [30_000, 17, 9_000], dim, torch.float32))


def test_a_dense_basis_of_many_rows_and_columns(gpu):
    generator = torch.Generator().manual_seed(0)
    for dim, basis in ((2100, torch.float32), (24, torch.bfloat16), (7, torch.float16)):
        e = torch.randn(3001, dim, generator=generator).to(basis)
        z = torch.randn(dim, generator=generator)
        theta0 = [torch.randn(n, generator=generator) for n in (3000, 1)]
        found = gpu["subspace_dense_fwd"](z, e, theta0, [0, 3000])
        for a, t, rows in zip(found, theta0, (e[:3000], e[3000:]), strict=True):
            assert relative_error(a, t.double() + rows.double() @ z.double()) <= 1e-6
        exact = e[:3000].double().T @ theta0[0].double() + e[3000].double() * theta0[1].double()
        assert relative_error(gpu["subspace_dense_bwd"](theta0, e, [0, 3000], 0), exact) <= 1e-6


def test_the_result_does_not_depend_on_the_device(gpu):
    _, backward = arguments("block_hadamard", [90_000], 3000, torch.float32)
    expected = gpu["subspace_bwd"](*backward)
    try:
        gpu.device(sms=132, shared_bytes=80 << 10)
        first = gpu["subspace_bwd"](*backward)
        gpu.device(sms=3, shared_bytes=227 << 10)
        assert torch.equal(first, gpu["subspace_bwd"](*backward))
    finally:
        gpu.device()
    assert relative_error(first, expected.double()) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(29, dtype=torch.float64)}, "z must be"),
        ({0: torch.zeros(2, 2, 29)}, "z must be"),
        ({1: torch.zeros(28)}, "c must be"),
        ({3: [0, 9]}, "not a row of layout"),
        ({3: [0]}, "as many as"),
        ({4: [0, 1]}, "must lie within the whole tensor"),
        ({4: [-1, 0]}, "must lie within the whole tensor"),
        ({5: torch.zeros(2, 3, dtype=torch.int64)}, "layout must be"),
        ({6: torch.zeros(2)}, "factors must be"),
        ({7: torch.zeros((), dtype=torch.int32)}, "step must be"),
        ({8: "two_hot"}, "unknown kind"),
        ({9: 100}, "tile must be a power of two"),
        ({9: 32768}, "tile must be a power of two"),
        ({10: 2}, "only sparse has strata"),
    ],
)
def test_arguments_that_would_read_out_of_bounds_are_refused(gpu, change, message):
    args = list(arguments("block_hadamard", [45, 60], 29, torch.float32)[0])
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        gpu["subspace_fwd"](*args)


def test_a_tile_that_does_not_fit_into_shared_memory_is_refused(gpu):
    forward, backward = arguments("block_hadamard", [20_000], 5, torch.float64, tile=16384)
    for name, args in (("subspace_fwd", forward), ("subspace_bwd", backward)):
        with pytest.raises(RuntimeError, match="does not fit into the shared memory"):
            gpu[name](*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4)}, "as many coordinates"),
        ({1: torch.zeros(10)}, "basis must be"),
        ({1: torch.zeros(5, 10).T}, "basis must be"),
        ({3: [5]}, "beyond the rows"),
        ({3: [-1]}, "beyond the rows"),
        ({3: [0, 1]}, "as many as"),
    ],
)
def test_a_basis_that_would_be_read_out_of_bounds_is_refused(gpu, change, message):
    args = [torch.zeros(5), torch.zeros(10, 5), [torch.zeros(8)], [0]]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        gpu["subspace_dense_fwd"](*args)
