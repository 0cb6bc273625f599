"""Stored projections (kronecker, dense, learned), options, and the published gradient that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from subspace_models import EXACT, NAMES, SMALL, apply, implicit, matrix, transpose
from torch import nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.subspace.maps import KroneckerMap, StoredMap
from weightxform.subspace.projections import NAMED

P = wx.subspace


# kronecker


@pytest.mark.parametrize(
    ("sizes", "d"),
    [({"a": 60, "b": 84}, 9), ({"a": 60, "b": 84}, 144), ({"a": 12, "b": 30}, 1), ({"a": 90}, 7), ({"a": 1}, 1)],
)
def test_kronecker_is_orthonormal_if_it_fills_its_square(sizes, d):
    """D = D1 D2 with D2 = ceil(sqrt D): 144, 42, 90, 1."""
    K = matrix(KroneckerMap(sizes, d, 3), sizes)
    assert_close(K.T @ K, torch.eye(d, dtype=torch.float64), **EXACT)


def test_kronecker_is_that_of_its_factors():
    """Section 8: factors are block_hadamard matrices named #1 and #2; z is padded, the last rows are left out."""
    sizes, d = {"a": 100, "b": 53}, 29  # D2 = 13, D1 = 12, d2 = 6, d1 = 5
    p = KroneckerMap(sizes, d, 3)
    factors = [matrix(implicit("block_hadamard", {n: r}, c, 3, key_kind="kronecker"), {n: r})
               for n, r, c in (("#1", 12, 5), ("#2", 13, 6))]  # fmt: skip
    expected = torch.kron(*factors)[:153, :29]
    assert_close(matrix(p, sizes), expected, **EXACT)
    g, z = torch.randn(153, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    assert_close(transpose(p, sizes, g), expected.T @ g, **EXACT)
    assert_close(apply(p, sizes, z), expected @ z, **EXACT)
    stored = sum(t.numel() for t in p.tables(z, None))
    assert stored <= 2 * (math.isqrt(153) + 1) * (math.isqrt(29) + 1)


@pytest.mark.parametrize("total", [2, 3, 5, 7, 12, 13, 50])
def test_kronecker_for_every_dim(total):
    """Any d up to D finds factors with no more columns than rows."""
    for d in range(1, total + 1):
        p = KroneckerMap({"a": total}, d, 0)
        K = matrix(p, {"a": total})
        assert K.shape == (total, d)
        assert float(torch.linalg.eigvalsh(K.T @ K)[-1]) <= 1 + 1e-12


# dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense(dtype):
    """theta = theta0 + E z with rows in the order of the model, not of the names."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    E = torch.randn(26, 5).to(dtype)
    sub = wx.Subspace(model, 5, P.Dense(E))
    z = torch.randn(5, dtype=torch.float64)
    with torch.no_grad():
        sub.coordinates.copy_(z)
    theta = torch.cat([t.flatten() for layer in model for t in (layer.weight, layer.bias)])
    assert_close(theta, before + E.double() @ z, **EXACT)
    g = torch.randn_like(theta)
    theta.backward(g)
    assert_close(sub.coordinates.grad, E.double().T @ g, **EXACT)


def test_stored_rows_of_a_shard():
    basis = torch.randn(50, 4, dtype=torch.float64)
    p = StoredMap(basis, {"a": 20, "b": 30})
    z, g = torch.randn(4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    (part,) = p.project(z, [torch.zeros(7, dtype=torch.float64)], [1], [11])
    assert_close(part, basis[31:38] @ z, **EXACT)
    assert_close(p.adjoint([g], [1], [11]), basis[31:38].T @ g, **EXACT)


# learned


def trajectory(model: nn.Module, steps: int, directions: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    basis = [{k: torch.randn_like(v) for k, v in start.items()} for _ in range(directions)]
    weights = torch.randn(steps, directions).tolist()
    return [
        {k: v + sum(w * b[k] for w, b in zip(row, basis, strict=True)) for k, v in start.items()} for row in weights
    ]


def test_from_trajectory_spans_the_trajectory():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    names = [n for n, _ in model.named_parameters()]
    checkpoints = trajectory(model, 8, 3)
    basis = P.Learned.from_trajectory(checkpoints, names, 3).basis
    assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)
    flat = torch.stack([torch.cat([c[n].flatten() for n in names]) for c in checkpoints])
    centred = flat - flat.mean(0)
    assert_close(centred @ basis @ basis.T, centred, rtol=1e-4, atol=1e-4)
    variances = (centred @ basis).square().sum(0)
    assert (variances.diff() < 0).all()  # the first component is the strongest
    sub = wx.Subspace(model, 3, P.Learned(basis))
    with torch.no_grad():
        sub.coordinates.copy_(torch.tensor([1.0, 2, -1]))
    moved = torch.cat([t.flatten() for layer in model for t in (layer.weight, layer.bias)])
    theta0 = nn.utils.parameters_to_vector(p for p in model.parameters())
    assert_close(moved - theta0, basis @ sub.coordinates, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [P.Learned.from_weights, P.Learned.from_gradient])
def test_from_singular_directions(make):
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(6) * 0.01, "c": torch.randn(3, 2, 2, 2) * 10}
    basis = make(tensors, 3).basis
    assert basis.shape == (54, 3)
    assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)
    found = sorted(((float(s), n) for n, t in tensors.items() for s in torch.linalg.svdvals(t.reshape(len(t), -1))))
    assert [n for _, n in found[-3:]] == ["c", "c", "c"]
    assert not basis[:30].any()
    flat = torch.cat([t.flatten() for t in tensors.values()])
    assert_close((basis.T @ flat), torch.linalg.svdvals(tensors["c"].reshape(3, 8)), rtol=1e-4, atol=1e-4)
    every = make(tensors, 4 + 1 + 3).basis
    assert_close(every @ every.T @ flat, flat, rtol=1e-4, atol=1e-4)


def test_from_gradient_descends():
    """A step along the basis lowers the loss as the gradient does."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(20, 6), torch.randn(20, 3)
    nn.functional.mse_loss(model(x), y).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    sub = wx.Subspace(model, 4, P.Learned.from_gradient(gradients, 4))
    loss = nn.functional.mse_loss(sub(x), y)
    loss.backward()
    with torch.no_grad():
        sub.coordinates -= 0.1 * sub.coordinates.grad
    assert nn.functional.mse_loss(sub(x), y) < loss


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: P.Learned.from_trajectory([m.state_dict()] * 3, ["weight"], 3), "more than dim = 3, got 3"),
        (lambda m: P.Learned.from_trajectory([m.state_dict()] * 4, ["weight"], 2), "span fewer than dim = 2"),
        (lambda m: P.Learned.from_trajectory(trajectory(m, 6, 2), ["weight", "bias"], 3), "span fewer than dim = 3"),
        (lambda m: P.Learned.from_trajectory([m.state_dict()] * 4, ["w"], 2), "checkpoint 0 has no 'w'"),
        (lambda m: P.Learned.from_trajectory([m.state_dict()] * 4, ["weight"], 0), "dim must be at least 1"),
        (lambda m: P.Learned.from_trajectory([m.state_dict()] * 4, [], 1), "names must be at least one"),
        (lambda m: P.Learned.from_weights({"w": m.weight}, 4), "have 3 singular directions, fewer than dim = 4"),
        (lambda m: P.Learned.from_weights({"w": torch.zeros(3, 3)}, 1), "have 0 singular directions"),
        (lambda m: P.Learned.from_weights({}, 1), "have 0 singular directions"),
        (lambda m: P.Learned.from_gradient({"w": torch.full((3, 3), math.nan)}, 1), "w must be finite"),
        (
            lambda m: P.Learned.from_trajectory([{"w": torch.tensor([math.nan, i])} for i in range(4)], ["w"], 1),
            "finite",
        ),
        (lambda m: P.Learned.from_gradient({"w": m.weight}, 0), "dim must be at least 1"),
        (lambda m: P.Dense(torch.zeros(3)), r"basis must be a matrix \[D, d\], got float32\[3\] on cpu"),
        (lambda m: P.Dense(torch.full((3, 2), math.inf)), "basis must be finite"),
        (lambda m: P.Sparse(nonzeros=0), "nonzeros must be at least 1, got 0"),
        (lambda m: P.OneHot(tile=100), "tile must be a power of two from 64 to 16384, got 100"),
        (lambda m: P.BlockHadamard(tile=32), "tile must be a power of two from 64 to 16384, got 32"),
        (lambda m: P.BlockHadamard(columns="x"), "columns must be 'auto' or 'name' or 'packed', got 'x'"),
        (lambda m: P.Fastfood(form="x"), "form must be 'global' or 'stacked', got 'x'"),
        (lambda m: P.Fastfood(diagonal="x"), "diagonal must be 'sign' or 'binomial', got 'x'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: P.Dense([[1.0]]), "basis must be a Tensor, got list"),
        (lambda: P.Dense(torch.zeros(3, 2, dtype=torch.int64)), r"got int64\[3, 2\] on cpu"),
        (lambda: P.Dense(torch.zeros(3, 2).to_sparse()), "must be dense"),
        (lambda: P.OneHot(signed=1), "signed must be a bool, got 1"),
        (lambda: P.OneHot(tile=64.0), "tile must be an int, got 64.0"),
        (lambda: P.Sparse(nonzeros=1.5), "nonzeros must be an int, got 1.5"),
        (lambda: P.Learned.from_weights({"w": torch.eye(2)}, 1.0), "dim must be an int, got 1.0"),
    ],
)
def test_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


# options


def test_names_are_their_defaults():
    assert set(NAMED) == set(NAMES)
    for name in NAMES:
        sub = wx.Subspace(nn.Linear(5, 3), 4, name)
        assert sub.projection == NAMED[name]()
        assert repr(sub.projection) in repr(sub)


@pytest.mark.parametrize(
    ("projection", "kind"),
    [
        (P.OneHot(signed=False, tile=128), "one_hot_unsigned"),
        (P.Sparse(nonzeros=3, columns="packed"), "sparse"),
        (P.Fastfood(form="stacked", diagonal="binomial"), "fastfood_stacked_binomial"),
        (P.Fastfood("global", "binomial"), "fastfood_global_binomial"),
        (P.BlockHadamard(tile=64), "block_hadamard"),
    ],
)
def test_options_reach_the_plan(projection, kind):
    plan = projection.map_of(SMALL, 20, 0, "global", {}).plan
    options = projection.options()
    assert plan.kind == kind
    assert plan.strata == options.get("K", 1)
    assert plan.tile == options.get("tile", plan.tile)
    assert plan.packed == (options.get("columns") == "packed")


def test_limits_of_fastfood():
    with pytest.raises(ValueError, match="at most 2\\^30 weights, got 1073741825; use 'stacked'"):
        P.Fastfood().map_of({"a": 2**30 + 1}, 5, 0, "global", {})
    with pytest.raises(ValueError, match="dim up to 32768, got 32769; use 'global'"):
        P.Fastfood("stacked").map_of({"a": 2**20}, 2**15 + 1, 0, "global", {})


def test_by_name_and_no_tensor_of_dim_elements():
    sizes = {"a": 20, "b": 20}
    with pytest.raises(ValueError, match=r"columns='name' leaves .* of 35 coordinates without a weight.*'packed'"):
        P.OneHot(columns="name").map_of(sizes, 35, 0, "global", {})


@pytest.mark.parametrize("dim", [0, 41])
@pytest.mark.parametrize("name", NAMES)
def test_dim_out_of_range(name, dim):
    with pytest.raises(ValueError, match=f"dim must be .*got {dim}"):
        wx.Subspace(nn.Linear(7, 5), dim, name)


def test_more_nonzeros_than_columns():
    with pytest.raises(ValueError, match="nonzeros must be from 1 to dim = 3, got 4"):
        wx.Subspace(nn.Linear(7, 5), 3, P.Sparse(nonzeros=4))


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name):
    """d = 1 and d = D, and a model of one weight."""
    for sizes, d in (({"a": 33, "b": 1}, 1), ({"a": 33, "b": 1}, 34), ({"one": 1}, 1)):
        p = NAMED[name]().map_of(sizes, d, 3, "global", {})
        full = matrix(p, sizes)
        assert full.isfinite().all() and full.shape == (sum(sizes.values()), d)
        g = torch.randn(len(full), dtype=torch.float64)
        assert_close(transpose(p, sizes, g), full.T @ g, **EXACT)


# research finding 1: three published codes


class PublishedHadamard(torch.autograd.Function):
    """As in compacter, t-few and rojagtap/intrinsic-dimension: H forward, H / sqrt(n) backward."""

    @staticmethod
    def forward(ctx, x):
        return sylvester(len(x)) @ x

    @staticmethod
    def backward(ctx, g):
        return sylvester(len(g)) @ g / math.sqrt(len(g))


def sylvester(n: int) -> torch.Tensor:
    return torch.tensor([[1.0 - 2 * ((i & j).bit_count() & 1) for j in range(n)] for i in range(n)]).double()


def test_published_fastfood_gradient_is_too_small_by_the_length():
    """H is unnormalized forward and divided by sqrt(LL) in each of two backwards: 1/LL of the gradient."""
    for length in (64, 256):
        torch.manual_seed(length)
        B, G = torch.randint(0, 2, (length,)) * 2.0 - 1, torch.randn(length).double()
        order, target = torch.randperm(length), torch.randn(length).double()

        def fastfood(z, H, B=B, G=G, order=order):
            return H(G * H(B * z)[order])

        gradients = []
        for H in (lambda x: sylvester(len(x)) @ x, PublishedHadamard.apply):
            z = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            fastfood(z, H).backward(target)
            gradients.append(z.grad)
        assert_close(gradients[0], length * gradients[1], **EXACT)


@pytest.mark.parametrize("form", ["global", "stacked"])
@pytest.mark.parametrize("diagonal", ["sign", "binomial"])
@pytest.mark.parametrize("structure", ["shared", "said"])
def test_our_fastfood_gradient_is_that_of_the_explicit_matrix(form, diagonal, structure):
    """Through a loss of a model, with several tensors of different lengths: autograd through P as a matrix."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    names = [n for n, _ in model.named_parameters()]
    theta0 = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, target = torch.randn(16, 7).double(), torch.randn(16, 4).double()
    sub = wx.Subspace(model, 20, P.Fastfood(form, diagonal), seed=4, structure=structure)
    sizes = {n: t.numel() for n, t in theta0.items()}
    full = matrix(sub._maps[0], sizes)
    with torch.no_grad():
        sub.coordinates.normal_()
    loss = nn.functional.mse_loss(sub(x), target)
    loss.backward()

    z = sub.coordinates.detach().clone().requires_grad_()
    scales = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = dict(zip(sub._maps[0].names, (full @ z).split([sizes[n] for n in sub._maps[0].names]), strict=True))
    theta = {n: theta0[n] + scales[k] * y[n].view_as(theta0[n]) for k, n in enumerate(names)}
    plain = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    expected = nn.functional.mse_loss(torch.func.functional_call(plain, theta, (x,)), target)
    expected.backward()
    assert_close(loss, expected, **EXACT)
    assert_close(sub.coordinates.grad, z.grad, **EXACT)
    if structure == "said":
        assert_close(sub.scales.grad, scales.grad, **EXACT)
