"""The projections against the specification: golden vectors, an oracle written from it, and what is proved there."""

from __future__ import annotations

import math
import struct

import pytest
import subspace_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_models import EXACT, SMALL, TOY, apply, implicit, matrix, transpose
from torch.testing import assert_close

import weightxform as wx
from weightxform import backends
from weightxform.subspace import philox as draw
from weightxform.subspace.adapter import fingerprint
from weightxform.subspace.plan import in_order, make_plan, plain_name, tensor_key
from weightxform.subspace.reference import FASTFOOD, KINDS, Row, runs, windows

M32 = 0xFFFFFFFF
ISOMETRIC = ("one_hot", "one_hot_unsigned", "block_hadamard")
quick = settings(max_examples=40, deadline=None, derandomize=True)


def zpat(d: int) -> torch.Tensor:
    return ((torch.arange(d) % 7) - 3).float() / 4


def tpat(n: int) -> torch.Tensor:
    return ((torch.arange(n) % 5) - 2).float() / 8


def hexadecimal(x: torch.Tensor) -> str:
    return " ".join(struct.pack(">f", v).hex() for v in x.tolist())


# golden vectors, section 14

ONE_TENSOR = [
    ("one_hot", 29, "3dd413cc bf200000 beb504f3 be000000 3f400000 bf000000"),
    ("one_hot", 7, "bee882f6 bcbbe850 3dd105ec 3ea0c248 3d3be850 3d091b58"),
    ("block_hadamard", 29, "beb45a6e bede6455 bdbb739e 3f31f0ed be8ba592 3da57d84"),
    ("block_hadamard", 7, "be50cc1c 3dbf76b4 3d3ccf8b 3df0fa39 3f0bc756 be06e580"),
    ("sparse", 29, "bf5503c2 bde0fd46 3dd105ec 3f1ec35c 3ee4a29f 3c962bc0"),
    ("rademacher", 29, "bf842d04 3d7b3e9c bf223081 3f1c06f9 be9e377a bf02c8ae"),
    ("gaussian", 29, "3f087bca 3c7efd90 3eec77c0 bf8281d8 3e349abf be836d54"),
    ("fastfood_global_sign", 29, "bf1d053b bf1e6992 3eba0a76 bf5f35bc bca568c0 bf1d053b"),
    ("fastfood_global_binomial", 29, "3e53cb82 be42d3ee bf02a832 bf8a6eac bf0ee8c8 be85ff54"),
    ("fastfood_stacked_sign", 29, "3e65b9d2 bca07cc4 bf8a4c05 bbdd9020 be2fc19e 3e2fc19e"),
    ("fastfood_stacked_binomial", 29, "be45d738 bf3d83c7 be41dd43 3ee4c8e0 be991a6e bc5ab6c0"),
]
SEVEN_TENSORS = [
    ("one_hot", "b.weight", "ad693ba8 8061bae5", 12, "be800000 be1dc268 3db64a28", "3e619e4f"),
    ("one_hot", "c.bias", "6d63108a 2b68e4c0", 3, "be623d98 be000000 bd715bef", "bd715bef"),
    ("one_hot", "one", "72dae7e5 bc456f67", 4, "be623d98", "be623d98"),
    ("block_hadamard", "b.weight", "25ffd533 2eeb35fb", 11, "bebf153c bd5aa314 bdad515c", "3e800000"),
    ("block_hadamard", "c.bias", "498c47c1 1b5c7f68", 19, "beb55555 bdd55556 3db504f3", "3db504f3"),
    ("block_hadamard", "one", "0c6f51ff c76555ce", 9, "be620997", "be620997"),
]


@pytest.fixture(params=[name for name in backends.available("subspace_fwd") if name in ("cpu", "reference")])
def backend(request):
    with wx.backend(request.param):
        yield


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("kind", "d", "expected"), ONE_TENSOR)
def test_golden_one_tensor(kind, d, expected):
    p = implicit(kind, {"a.weight": 45}, d)
    assert p.plan.strata == (4 if kind == "sparse" else 1)
    (theta,) = p.project(zpat(d), [tpat(45)], [0])
    assert hexadecimal(theta[:6]) == expected


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("kind", "name", "key", "o", "first", "last"), SEVEN_TENSORS)
def test_golden_seven_tensors(kind, name, key, o, first, last):
    p = implicit(kind)
    member = p.names.index(name)
    row = Row.of(p.plan.layout, member)
    assert [f"{word:08x}" for word in row.key] == key.split()
    assert int(windows(torch.tensor([0]), row.key, row.start, 29, 4096, False)[0]) == o
    (theta,) = p.project(zpat(29), [tpat(TOY[name])], [member])
    assert hexadecimal(theta[: len(first.split())]) == first
    assert hexadecimal(theta[-1:]) == last


def test_golden_intermediate_values():
    key = tensor_key(5, "one_hot", "a.weight")
    assert [f"{word:08x}" for word in key] == ["df7fa288", "d6a228d0"]
    words = draw.philox(key, draw.SETUP, torch.tensor(0)).tolist()
    assert [f"{w:08x}" for w in words] == ["dc2c83bf", "877edd50", "a57e698d", "7f5518d1"]
    found = list(runs(45, 4096, 0, 45))
    assert [(int(r.starts), r.length) for r in found] == [(0, 32), (32, 8), (40, 4), (44, 1)]
    assert [int(windows(r.starts, key, 0, 29, 4096, False)) for r in found] == [24, 27, 6, 10]
    counts = make_plan("one_hot", {"a.weight": 45}, 29, 5).counts
    assert counts.tolist() == [2 if k <= 10 or k >= 24 else 1 for k in range(29)]
    assert draw.permutation(key, draw.PERM, torch.tensor([0]), 32)[0, :8].tolist() == [13, 17, 31, 16, 20, 28, 7, 11]
    assert draw.bits(key, draw.SIGN_IN, torch.arange(8)).int().tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_golden_fingerprints():
    assert fingerprint(tpat(45)) == "fc53def5936c32ea"
    assert fingerprint(tpat(45).bfloat16()) == "7805dddc3b0f2249"


# the generator


def test_philox_known_answers():
    """The three of Random123's kat_vectors, counters put together from stream, position, column and step."""
    zeros = draw.philox((0, 0), 0, torch.tensor(0))
    ones = draw.philox((M32, M32), 0xFF, torch.tensor(2**56 - 1), M32, torch.tensor(M32))
    pi = draw.philox(
        (0xA4093822, 0x299F31D0), 0x85, torch.tensor(0xA308D3_243F6A88), 0x13198A2E, torch.tensor(0x03707344)
    )
    found = [" ".join(f"{w:08x}" for w in words.tolist()) for words in (zeros, ones, pi)]
    assert found == [
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ]


@quick
@given(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.integers(1, 8),
    st.integers(0, 2**56 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**32 - 1),
)
def test_philox_against_integers(key, stream, pos, column, step):
    words = draw.philox(key, stream, torch.tensor(pos), column, torch.tensor(step))
    assert words.tolist() == list(oracle.philox(key, stream, pos, column, step))


@quick
@given(st.integers(0, 14), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_permutation_is_a_bijection(m, start, column, step):
    places = draw.permutation((7, 9), draw.PERM, torch.tensor([start]), 1 << m, column, torch.tensor(step))[0]
    assert sorted(places.tolist()) == list(range(1 << m))
    for j in (0, (1 << m) // 3, (1 << m) - 1):
        assert int(places[j]) == oracle.bijection((7, 9), oracle.PERM, start, 1 << m, j, column, step)


def test_coins_are_odd_with_variance_31():
    coins = draw.coins((1, 2), draw.FF_G, torch.arange(1 << 16), 1).double()
    assert bool((coins % 2 == 1).all()) and coins.abs().max() <= 31
    assert float(coins.mean()) == pytest.approx(0, abs=0.1)
    assert float(coins.var()) == pytest.approx(31, rel=0.03)
    assert float((coins**4).mean() / coins.var() ** 2) == pytest.approx(2.94, abs=0.1)


# keys, names, order


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("name", ["", "a.weight", "schicht_ä.gewicht"])
def test_keys(seed, name):
    assert tensor_key(seed, "sparse", name) == oracle.key_of(seed, "sparse", name)


@pytest.mark.parametrize(
    ("given_name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("module._orig_mod.a._fsdp_wrapped_module.weight", "a.weight"),
        ("a._checkpoint_wrapped_module.b._orig_mod.weight", "a.b.weight"),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.w", "a.w"),
        ("a.module.module.weight", "a.weight"),
        ("mymodule.weight", "mymodule.weight"),
        ("a.submodule.weight", "a.submodule.weight"),
        ("module", "module"),
    ],
)
def test_names_lose_their_wrappers(given_name, plain):
    assert plain_name(given_name) == plain


def test_order_is_that_of_the_bytes():
    names = ["b", "a.b", "a-b", "Z", "ä", "a", "aa"]
    assert [names[i] for i in in_order(names)] == ["Z", "a", "a-b", "a.b", "aa", "b", "ä"]
    a, b = make_plan("one_hot", TOY, 29, 5), make_plan("one_hot", dict(reversed(TOY.items())), 29, 5)
    assert a.names == b.names == tuple(sorted(TOY)) and torch.equal(a.layout, b.layout)


def test_another_seed_kind_or_name_is_another_key():
    keys = {tensor_key(s, k, n) for s in (0, 1, -1) for k in ("one_hot", "sparse") for n in ("a", "b", "a.a")}
    assert len(keys) == 18


@pytest.mark.parametrize("kind", ["one_hot", "sparse", "block_hadamard", "rademacher", "gaussian"])
def test_another_tensor_moves_no_entries_of_the_others(kind):
    """Under columns="name" all that changes is the norm of each column (c_k, or sqrt(D))."""
    options = {"columns": "name"} if kind not in ("rademacher", "gaussian") else {}
    options |= {"nonzeros": 3} if kind == "sparse" else {}
    more = {"aa.before": 70, **TOY, "zz": 300}
    few, many = implicit(kind, **options), implicit(kind, more, **options)
    P, Q = matrix(few, TOY), matrix(many, more)
    scale = torch.ones(29, dtype=torch.float64)
    if few.plan.c is not None:
        scale = many.plan.c / few.plan.c
    else:
        scale *= math.sqrt(sum(TOY.values()) / sum(more.values()))
    starts = dict(zip(many.names, many.plan.layout[:, 1].tolist(), strict=True))
    rows = torch.cat([torch.arange(starts[name], starts[name] + TOY[name]) for name in few.names])
    assert_close(Q[rows], P * scale, **EXACT)


# P itself

CASES = [
    (TOY, 29, {}),
    (SMALL, 1, {"tile": 64}),
    (SMALL, 7, {"tile": 64, "normalize": "init", "sigmas": {n: (1 + k) ** -0.5 for k, n in enumerate(SMALL)}}),
    (SMALL, 90, {"tile": 64, "normalize": "per_tensor"}),
    (SMALL, 100, {"tile": 64, "columns": "name"}),
    (SMALL, 210, {"tile": 64}),
    ({"one": 1}, 1, {}),
    (SMALL, 29, {"step": 7}),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("kind", "case"), [(k, c) for k in KINDS for c in range(len(CASES)) if c or k not in FASTFOOD])
def test_against_the_oracle(kind, case):
    """Every entry of P, and P' from the backward; P in float32 agrees with that in float64 to rounding."""
    sizes, d, options = CASES[case]
    options = dict(options)
    step = options.pop("step", 0)
    nonzeros = min(d, 4) if kind == "sparse" else None
    p = implicit(kind, sizes, d, nonzeros=nonzeros, **options)
    at = torch.tensor(step) if step else None
    expected = oracle.explicit(kind, sizes, d, 5, **options, strata=nonzeros or 1, step=step)
    P = matrix(p, sizes, step=at)
    assert_close(P, expected, **EXACT)
    assert_close(
        matrix(p, sizes, torch.float32, at).double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max())
    )
    g, z = torch.randn(len(P), dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    assert_close(transpose(p, sizes, g, at), expected.T @ g, **EXACT)
    assert float(apply(p, sizes, z, at) @ g) == pytest.approx(float(z @ transpose(p, sizes, g, at)), abs=1e-10)


tensors = st.lists(st.integers(1, 300), min_size=1, max_size=6).map(lambda n: {f"t{k}": v for k, v in enumerate(n)})
tiles = st.sampled_from([64, 128, 4096])


@quick
@given(st.sampled_from(["one_hot", "block_hadamard"]), tensors, st.data(), tiles, st.integers(-5, 5))
def test_counts_and_windows(kind, sizes, data, tile, seed):
    d = data.draw(st.integers(1, sum(sizes.values())))
    plan = make_plan(kind, sizes, d, seed, tile=tile)
    counts = [0] * d
    g = 0
    for name in sorted(sizes):
        key = oracle.key_of(seed, kind, name)
        for i, start, _ in oracle.blocks(sizes[name], tile):
            counts[(oracle.window(key, start, g, d, tile, plan.packed) + i - start) % d] += 1
        g += sizes[name]
    assert plan.packed == (max(sizes.values()) < d)
    assert plan.counts.tolist() == counts
    assert min(counts) >= 1
    if plan.packed:
        assert max(counts) - min(counts) <= 1


@quick
@given(st.sampled_from(ISOMETRIC), tensors, st.data(), tiles, st.sampled_from(["global", "init"]))
def test_columns_are_exactly_orthonormal(kind, sizes, data, tile, normalize):
    """For every d, tail and tiny tensor: |P'P - 1| is rounding alone."""
    d = data.draw(st.integers(1, sum(sizes.values())))
    sigmas = {name: data.draw(st.floats(0.01, 10)) for name in sizes}
    p = implicit(kind, sizes, d, tile=tile, normalize=normalize, sigmas=sigmas)
    z = torch.randn(3, d, dtype=torch.float64)
    for row in z:
        assert_close(transpose(p, sizes, apply(p, sizes, row)), row, rtol=0, atol=1e-12 * d)


@pytest.mark.parametrize("d", [1, 10, 29, 200])
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
def test_orthonormal_toy(kind, d):
    for tile in (64, 4096):
        P = matrix(implicit(kind, dim=d, tile=tile), TOY)
        assert_close(P.T @ P, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
@pytest.mark.parametrize("d", [10, 290, 10000, 44000, 44426])
def test_orthonormal_lenet(kind, d):
    sizes = {"conv1.weight": 150, "conv1.bias": 6, "conv2.weight": 2400, "conv2.bias": 16, "fc1.weight": 30720}
    sizes |= {"fc1.bias": 120, "fc2.weight": 10080, "fc2.bias": 84, "fc3.weight": 840, "fc3.bias": 10}
    p, z = implicit(kind, sizes, d, 1), torch.randn(d, dtype=torch.float64)
    assert_close(transpose(p, sizes, apply(p, sizes, z)), z, rtol=0, atol=2e-12)


EIGENVALUES = {  # section 3: smallest and largest of P'P
    ("sparse", 29): (1, 1), ("sparse", 200): (0.52, 1.57),
    ("rademacher", 10): (0.90, 1.13), ("rademacher", 29): (0.80, 1.22), ("rademacher", 200): (0.49, 1.69),
    ("gaussian", 10): (0.93, 1.11), ("gaussian", 29): (0.83, 1.25), ("gaussian", 200): (0.49, 1.69),
    ("fastfood_global_sign", 29): (0.82, 1.16), ("fastfood_global_binomial", 200): (0.37, 2.17),
    ("fastfood_stacked_sign", 29): (0.986, 1.001), ("fastfood_stacked_sign", 200): (0.986, 1.106),
    ("fastfood_stacked_binomial", 29): (0.71, 1.25),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "d"), EIGENVALUES)
def test_eigenvalues(kind, d):
    P = matrix(implicit(kind, dim=d), TOY)
    found = torch.linalg.eigvalsh(P.T @ P)
    low, high = EIGENVALUES[kind, d]
    assert float(found[0]) == pytest.approx(low, abs=0.006)
    assert float(found[-1]) == pytest.approx(high, abs=0.006)


@pytest.mark.parametrize("kind", ["sparse", "rademacher", "fastfood_global_sign"])
def test_column_norms_are_one(kind):
    """Exactly for these: of fastfood, where D is a power of two."""
    sizes = {"a": 100, "b": 156}
    P = matrix(implicit(kind, sizes, 40), sizes)
    assert_close(P.norm(dim=0), torch.ones(40, dtype=torch.float64), **EXACT)


def test_sparse_rows():
    """K nonzeros in each row, one in each stratum: no row is dead."""
    p = implicit("sparse", dim=200)
    assert p.plan.strata == round(200 / math.sqrt(2078)) == 4
    P = matrix(p, TOY)
    assert ((P != 0).sum(1) == 4).all()
    assert ((P.unflatten(1, (4, 50)) != 0).sum(2) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_per_tensor_and_init(kind):
    """per_tensor: the mean square of a column is 1 in each tensor. init: rows in proportion to sigma."""
    sizes = {"a": 128, "b": 512, "c": 64}
    d, strata = 32, 2
    options = {"nonzeros": strata} if kind == "sparse" else {}
    parts = matrix(implicit(kind, sizes, d, normalize="per_tensor", **options), sizes).split([128, 512, 64])
    for part in parts:
        assert float(part.square().sum() / d) == pytest.approx(1, rel=1e-9 if kind not in FASTFOOD else 0.2) or (
            kind == "gaussian" and float(part.square().sum() / d) == pytest.approx(1, rel=0.1)
        )
    sigmas = {"a": 1.0, "b": 0.5, "c": 3.0}
    rows = matrix(implicit(kind, sizes, d, normalize="init", sigmas=sigmas, **options), sizes).split([128, 512, 64])
    norms = [float(r.square().sum(1).mean().sqrt()) for r in rows]
    tolerance = 0.2 if kind in FASTFOOD or kind == "gaussian" else 0.05
    assert norms[1] / norms[0] == pytest.approx(0.5, rel=tolerance)
    assert norms[2] / norms[0] == pytest.approx(3, rel=tolerance)


# redraw


@pytest.mark.parametrize("kind", KINDS)
def test_steps_draw_other_projections(kind):
    """P_0 z and P_1 z have the norm of z and are nearly orthogonal; step 0 is no step."""
    sizes = {"a": 3000, "b": 1096}
    p, z = implicit(kind, sizes, 64), torch.randn(64, dtype=torch.float64)
    plain, zero, one, last = (
        apply(p, sizes, z, None if s is None else torch.tensor(s)) for s in (None, 0, 1, 2**32 - 2)
    )
    assert torch.equal(plain, zero)
    for other in (one, last):
        if kind == "one_hot_unsigned":  # all its entries are positive: they share their mean
            continue
        assert abs(float(plain @ other / plain.norm() / other.norm())) < 0.12
    for theta in (plain, one, last):
        assert float(theta.norm() / z.norm()) == pytest.approx(1, abs=1e-9 if kind in ISOMETRIC else 0.35)
    assert not torch.equal(one, last)


def test_redraw_keeps_windows_and_counts():
    """Which columns a block reads is drawn once, so that c holds for all steps: P_s'P_s = 1 with the one c."""
    P = [matrix(implicit("one_hot", SMALL, 17, tile=64), SMALL, step=torch.tensor(s)) for s in (0, 1, 2)]
    for Q in P:
        assert_close(Q.T @ Q, torch.eye(17, dtype=torch.float64), **EXACT)
    assert not torch.equal(P[0] != 0, P[1] != 0)  # permutations are others
    H = [
        matrix(implicit("block_hadamard", {"a": 64}, 90 - 26, tile=64), {"a": 64}, step=torch.tensor(s)) for s in (0, 1)
    ]
    assert torch.equal(H[0].abs(), H[1].abs())
    wide = [implicit("block_hadamard", {"a": 4, "b": 100}, 50, tile=64) for _ in range(2)]
    zero, one = (matrix(p, {"a": 4, "b": 100}, step=torch.tensor(s)) for p, s in zip(wide, (0, 1), strict=True))
    assert torch.equal(zero[:4] != 0, one[:4] != 0)  # the window of "a"
