"""The kernels of the projections: the bits of theta, golden vectors, what must not change z_bar, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import weightxform as wx
from weightxform import backends
from weightxform.registry import OPS
from weightxform.subspace.op import TOY
from weightxform.subspace.plan import Plan, make_plan
from weightxform.subspace.reference import KINDS
from weightxform.verify import make_args

FORWARD, BACKWARD = OPS["subspace_fwd"], OPS["subspace_bwd"]
DENSE_FORWARD, DENSE_BACKWARD = OPS["subspace_dense_fwd"], OPS["subspace_dense_bwd"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SERVED = [name for name in ("cpu", "reference") if name in backends.available("subspace_fwd")]


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    """On each backend."""
    with wx.backend(request.param):
        yield


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def tables(plan: Plan, members: list[int] | None = None, step: int | None = None) -> tuple[Any, ...]:
    """Everything between theta0 (or the gradients) and the kind, for whole tensors."""
    rows = list(range(len(plan.names))) if members is None else members
    redraw = None if step is None else torch.tensor(step)
    return rows, [0] * len(rows), plan.layout, plan.factors, redraw


def forward(plan: Plan, z: Tensor, theta0: list[Tensor], **options: Any) -> list[Tensor]:
    c = plan.columns_in(z.dtype, "cpu")
    return FORWARD(z, c, theta0, *tables(plan, **options), plan.kind, plan.tile, plan.strata, plan.packed)


def backward(plan: Plan, grads: list[Tensor], batch: int = 0, **options: Any) -> Tensor:
    dt = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    given = tables(plan, **options)
    return BACKWARD(
        grads, plan.columns_in(dt, "cpu"), *given, plan.kind, plan.dim, batch, plan.tile, plan.strata, plan.packed
    )


def referred(plan: Plan, z: Tensor, theta0: list[Tensor], **options: Any) -> list[Tensor]:
    with wx.backend("reference"):
        return forward(plan, z, theta0, **options)


# Kind, d and the first six numbers of theta: section "golden vectors" of the specification.
GOLDEN = """
one_hot 29 3dd413cc bf200000 beb504f3 be000000 3f400000 bf000000
one_hot 7 bee882f6 bcbbe850 3dd105ec 3ea0c248 3d3be850 3d091b58
block_hadamard 29 beb45a6e bede6455 bdbb739e 3f31f0ed be8ba592 3da57d84
block_hadamard 7 be50cc1c 3dbf76b4 3d3ccf8b 3df0fa39 3f0bc756 be06e580
sparse 29 bf5503c2 bde0fd46 3dd105ec 3f1ec35c 3ee4a29f 3c962bc0
rademacher 29 bf842d04 3d7b3e9c bf223081 3f1c06f9 be9e377a bf02c8ae
gaussian 29 3f087bca 3c7efd90 3eec77c0 bf8281d8 3e349abf be836d54
fastfood_global_sign 29 bf1d053b bf1e6992 3eba0a76 bf5f35bc bca568c0 bf1d053b
fastfood_global_binomial 29 3e53cb82 be42d3ee bf02a832 bf8a6eac bf0ee8c8 be85ff54
fastfood_stacked_sign 29 3e65b9d2 bca07cc4 bf8a4c05 bbdd9020 be2fc19e 3e2fc19e
fastfood_stacked_binomial 29 be45d738 bf3d83c7 be41dd43 3ee4c8e0 be991a6e bc5ab6c0
"""

# Kind, tensor of TOY (d = 29), theta[0], theta[1], ..., and its last number.
GOLDEN_TOY = """
one_hot b.weight be800000 be1dc268 3db64a28 3e619e4f
one_hot c.bias be623d98 be000000 bd715bef bd715bef
one_hot one be623d98 be623d98
block_hadamard b.weight bebf153c bd5aa314 bdad515c 3e800000
block_hadamard c.bias beb55555 bdd55556 3db504f3 3db504f3
block_hadamard one be620997 be620997
"""


def pattern(plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """The z and theta0 of the golden vectors."""
    return (torch.arange(plan.dim) % 7 - 3) / 4, [(torch.arange(n) % 5 - 2) / 8 for n in plan.sizes]


def words(t: Tensor) -> list[str]:
    return [f"{v & 0xFFFFFFFF:08x}" for v in bits(t).tolist()]


@pytest.mark.parametrize("row", GOLDEN.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2]))
def test_golden_vectors(served: None, row: str) -> None:
    kind, d, *expected = row.split()
    plan = make_plan(kind, {"a.weight": 45}, int(d), 5, nonzeros=4 if kind == "sparse" else None)
    (theta,) = forward(plan, *pattern(plan))
    assert words(theta[:6]) == expected


@pytest.mark.parametrize("row", GOLDEN_TOY.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2]))
def test_golden_vectors_of_one_tensor_among_seven(served: None, row: str) -> None:
    kind, name, *start, last = row.split()
    plan = make_plan(kind, TOY, 29, 5)
    theta = forward(plan, *pattern(plan))[plan.names.index(name)]
    assert (words(theta[: len(start)]), words(theta[-1:])) == (start, [last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FORWARD.cases)
def test_theta_has_the_bits_of_the_reference(case: str, dtype: torch.dtype) -> None:
    args = make_args(FORWARD, case, dtype, "cpu")
    expected = FORWARD.reference(*args)
    found = FORWARD(*args)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(bits(a), bits(b))
        assert a.stride() == b.stride()


# What no case reaches: tiles beyond the shared chunk of signs, tails, outputs stored past the cache, long transforms.
LARGE: dict[str, tuple[str, dict[str, int], int, dict[str, Any]]] = {
    "tile_16384": ("block_hadamard", {"a": 40_000, "b": 77, "c": 16_384}, 1000, {"tile": 16384}),
    "tile_8192": ("one_hot", {"a": 40_001, "b": 77}, 333, {"tile": 8192}),
    "past_cache": ("block_hadamard", {"a": 2_100_003}, 1000, {}),
    "past_cache_one_hot": ("one_hot", {"a": 600_001, "b": 1_600_000}, 777, {}),
    "many_columns": ("block_hadamard", {"a": 30_000, "b": 50_001}, 60_000, {"columns": "packed"}),
    "sparse": ("sparse", {"a": 50_000, "b": 6_001}, 999, {"nonzeros": 5}),
    "rademacher": ("rademacher", {"a": 20_000, "b": 3_001}, 130, {}),
    "gaussian": ("gaussian", {"a": 20_000, "b": 3_001}, 65, {}),
    "fastfood": ("fastfood_global_sign", {"a": 100_000, "b": 31_000}, 500, {}),
    "fastfood_many_columns": ("fastfood_global_binomial", {"a": 20_000, "b": 3_001}, 6000, {}),
    "fastfood_stacked": ("fastfood_stacked_sign", {"a": 40_000, "b": 3_001}, 6000, {}),
    "fastfood_stacked_binomial": ("fastfood_stacked_binomial", {"a": 20_000, "b": 3_001}, 300, {}),
}


def large(name: str) -> Plan:
    kind, sizes, d, options = LARGE[name]
    return make_plan(kind, sizes, d, 11, **options)


def drawn(plan: Plan, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """z, theta0 and gradients."""
    dt = torch.float64 if dtype == torch.float64 else torch.float32
    theta0, grads = ([torch.randn(n).to(dtype) for n in plan.sizes] for _ in range(2))
    return torch.randn(plan.dim, dtype=dt), theta0, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_theta_has_the_bits_of_the_reference_where_it_is_large(name: str, dtype: torch.dtype) -> None:
    plan = large(name)
    z, theta0, _ = drawn(plan, dtype)
    found = forward(plan, z, theta0, step=3)
    expected = referred(plan, z, theta0, step=3)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    plan = large(name)
    z, theta0, grads = drawn(plan, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*forward(plan, z, theta0), backward(plan, grads)])
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", LARGE)
def test_backward_is_the_adjoint_of_the_forward(name: str) -> None:
    plan = large(name)
    z, _, grads = drawn(plan, torch.float64)
    p_z = forward(plan, z, [torch.zeros(()).double().expand(n) for n in plan.sizes])
    along = sum(torch.dot(a, g) for a, g in zip(p_z, grads, strict=True))
    scale = z.norm() * torch.stack([g.norm() for g in grads]).norm()
    assert abs(along - torch.dot(z, backward(plan, grads))) <= 1e-13 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_keep_their_signs(kind: str) -> None:
    """A sign bit flips the sign of a zero too: -0 + -0 is -0."""
    plan = make_plan(kind, TOY, 29, 5)
    z = torch.where(torch.arange(29) % 3 == 0, -0.0, torch.arange(29) % 2.0)
    theta0 = [torch.full((n,), -0.0) for n in plan.sizes]
    found = forward(plan, z, theta0)
    expected = referred(plan, z, theta0)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["one_hot", "sparse", "block_hadamard", "rademacher", "gaussian"])
@pytest.mark.parametrize("cuts", [(0, 1, 130, 4000, 9000), (0, 4096, 8192, 9000), (0, 5000, 5000, 9000)], ids=str)
def test_shards_are_pieces_of_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    """Each with the bits of the whole; what lies around a shard is NaN, so it is not read."""
    plan = make_plan(kind, {"a": 500, "b": 9000}, 100, 7)
    z, theta0, grads = drawn(plan, torch.float32)
    whole = forward(plan, z, theta0)[1]
    total = backward(plan, grads[1:], members=[1])
    sums = torch.zeros(100, dtype=torch.float64)
    c = plan.columns_in(torch.float32, "cpu")
    for first, last in pairwise(cuts):
        own, g = torch.full((2, 9000), float("nan"))
        own[first:last], g[first:last] = theta0[1][first:last], grads[1][first:last]
        rest = [1], [first], plan.layout, plan.factors, None, plan.kind
        (theta,) = FORWARD(z, c, [own[first:last]], *rest, plan.tile, plan.strata, plan.packed)
        assert torch.equal(bits(theta), bits(whole[first:last]))
        sums += BACKWARD([g[first:last]], c, *rest, 100, 0, plan.tile, plan.strata, plan.packed)
    assert (sums - total).norm() <= 2**-20 * grads[1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_one_after_another(kind: str) -> None:
    plan = make_plan(kind, {"a": 700, "b": 5000}, 60, 7)
    z = torch.randn(3, 60)
    theta0 = [torch.randn(n) for n in plan.sizes]
    grads = [torch.randn(3, n) for n in plan.sizes]
    together = forward(plan, z, theta0)
    z_bar = backward(plan, grads, batch=3)
    for k in range(3):
        assert all(torch.equal(a[k], b) for a, b in zip(together, forward(plan, z[k], theta0), strict=True))
        alone = backward(plan, [g[k] for g in grads])
        torch.testing.assert_close(z_bar[k], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_without_a_gradient_counts_as_zero(kind: str) -> None:
    plan = make_plan(kind, TOY, 29, 5)
    _, _, grads = drawn(plan, torch.float32)
    some = [0, 3, 5]
    full = [g if m in some else torch.zeros(()).expand(g.shape) for m, g in enumerate(grads)]
    torch.testing.assert_close(backward(plan, [grads[m] for m in some], members=some), backward(plan, full))


PROBE = """
import hashlib, torch, weightxform as wx
from weightxform.registry import OPS
from weightxform.verify import flatten, make_args

torch.set_num_threads(1)
digest = hashlib.sha256()
for name in ("subspace_fwd", "subspace_bwd", "subspace_dense_fwd", "subspace_dense_bwd"):
    for case in OPS[name].cases:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for out in flatten(OPS[name](*make_args(OPS[name], case, dtype, "cpu"))):
                digest.update(str(out.double().flatten().tolist()).encode())
print(digest.hexdigest())
"""


def test_any_width_of_vectors_gives_the_same_bits() -> None:
    """AVX-512, AVX2 and SSE2, of those that this machine has: theta and z_bar of every case."""

    def run(width: str) -> str:
        env = {**os.environ, "WEIGHTXFORM_VECTOR_BYTES": width}
        return subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True).stdout

    assert len({run(width) for width in ("64", "32", "16")}) == 1


def zeros(dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(n, dtype=dtype) for n in make_plan("one_hot", TOY, 29, 5).sizes]


def call(change: dict[str, Any]) -> Any:
    plan = make_plan("one_hot", TOY, 29, 5)
    args = {
        "z": torch.zeros(29),
        "c": plan.columns_in(torch.float32, "cpu"),
        "theta0": zeros(torch.float32),
        "members": list(range(7)),
        "firsts": [0] * 7,
        "layout": plan.layout,
        "factors": plan.factors,
        "step": None,
        "kind": plan.kind,
        "tile": 4096,
        "strata": 1,
        "packed": False,
    }
    return FORWARD(*(args | change).values())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "two_hot"}, "unknown kind two_hot"),
    "fastfood": ({"kind": "fastfood_global_cosine"}, "unknown kind"),
    "tile": ({"tile": 100}, "tile must be a power of two"),
    "large tile": ({"tile": 1 << 15}, "tile must be a power of two"),
    "strata": ({"kind": "sparse", "strata": 30}, "strata must be from 1 to the dimension"),
    "strata of one_hot": ({"strata": 2}, "only sparse"),
    "z dtype": ({"z": torch.zeros(29).double()}, "z must be float64 for float64 tensors, else float32"),
    "z shape": ({"z": torch.zeros(1, 2, 29)}, r"z must be \[d\] or \[K, d\]"),
    "c": ({"c": torch.zeros(28)}, "c must have a number for each column"),
    "members": ({"members": [0]}, "an entry for each tensor"),
    "row": ({"members": [0, 1, 2, 3, 4, 5, 7]}, "members must be rows of layout"),
    "first": ({"firsts": [1] * 7}, "reaches beyond the elements"),
    "negative first": ({"firsts": [-1] * 7}, "reaches beyond the elements"),
    "layout": ({"layout": torch.zeros(7, 3, dtype=torch.int64)}, "layout must be"),
    "factors": ({"factors": torch.zeros(7)}, "factors must be"),
    "step": ({"step": torch.tensor(1 << 32)}, "step must be from 0"),
    "step dtype": ({"step": torch.tensor(1.0)}, "step must be an int64 scalar"),
    "dtypes": ({"theta0": zeros(torch.float32)[:-1] + zeros(torch.float16)[-1:]}, "of one dtype"),
    "complex": ({"theta0": zeros(torch.complex64)}, "float64"),
}  # fmt: skip


needs_kernels = pytest.mark.usefixtures("kernels")


@pytest.fixture
def kernels() -> Iterator[None]:
    """The checks are those of the kernels: the reference stands behind those of the modules."""
    assert "cpu" in SERVED, "the compiled kernels are not built"
    with wx.backend("cpu"):
        yield


@needs_kernels
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call(change)


@needs_kernels
def test_dense_refuses_what_does_not_fit() -> None:
    e, z, theta0 = torch.randn(50, 8), torch.randn(8), [torch.randn(40)]
    with pytest.raises(RuntimeError, match="a number for each column"):
        DENSE_FORWARD(torch.randn(9), e, theta0, [0])
    with pytest.raises(RuntimeError, match="beyond the rows of basis"):
        DENSE_FORWARD(z, e, theta0, [11])
    with pytest.raises(RuntimeError, match="beyond the rows of basis"):
        DENSE_BACKWARD(theta0, e, [-1], 0)
    with pytest.raises(RuntimeError, match="a contiguous floating-point CPU matrix"):
        DENSE_FORWARD(z, torch.randn(8, 50).T, theta0, [0])


@pytest.mark.parametrize("basis", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 15, 64, 100, 700])
def test_dense_products(basis: torch.dtype, d: int) -> None:
    """Every length of rows modulo a vector, special values in a half basis."""
    e = torch.randn(203, d).to(basis)
    e[0, 0] = 6e-8 if basis == torch.float16 else 1e-30  # subnormal in float16
    z, theta0, g = torch.randn(d), torch.randn(203), torch.randn(203)
    (theta,) = DENSE_FORWARD(z, e, [theta0], [0])
    torch.testing.assert_close(theta.double(), theta0.double() + e.double() @ z.double(), rtol=1e-5, atol=1e-5)
    z_bar = DENSE_BACKWARD([g], e, [0], 0)
    torch.testing.assert_close(z_bar.double(), e.double().T @ g.double(), rtol=1e-5, atol=1e-4)
