"""project_gradients (g <- P P'g in place), and the intrinsic dimension."""

from __future__ import annotations

import pytest
import torch
from subspace_models import EXACT, NAMES, Calls, Conv, matrix, mlp, seeded, values_of
from torch import nn
from torch.nn.parallel import DataParallel
from torch.testing import assert_close

import weightxform as wx

P = wx.subspace


def backward(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def explicit(projection: wx.SubspaceProjection, sizes: dict[str, int], dtype=torch.float64) -> torch.Tensor:
    step = torch.tensor(projection.step) if projection.step else None
    return matrix(projection._map, sizes, dtype, step)


def flat(tensors: dict[str, torch.Tensor], order) -> torch.Tensor:
    return torch.cat([tensors[n].flatten().double() for n in order])


# g <- P P' g


@pytest.mark.parametrize("options", [{}, {"normalize": "per_tensor"}, {"normalize": "init"}])
@pytest.mark.parametrize("projection", [*NAMES, P.OneHot(tile=64), P.Sparse(nonzeros=3)], ids=str)
def test_against_the_explicit_matrix(projection, options):
    if projection == "kronecker" and options:
        with pytest.raises(ValueError, match="normalize must be 'global' for kronecker"):
            wx.SubspaceProjection(mlp(), 11, projection, **options)
        return
    model = seeded().double()
    proj = wx.SubspaceProjection(model, 11, projection, seed=4, **options)
    g, addresses = backward(model), [p.grad.data_ptr() for p in model.parameters()]
    full = explicit(proj, {n: t.numel() for n, t in g.items()})
    order = proj._map.names
    z = wx.project_gradients(model, proj)
    assert_close(z, full.T @ flat(g, order), **EXACT)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert_close(flat(found, order), full @ (full.T @ flat(g, order)), **EXACT)
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("projection", ["block_hadamard", "one_hot"])
def test_isometric_projections_are_idempotent(projection):
    model = seeded().double()
    proj = wx.SubspaceProjection(model, 11, projection)
    g = backward(model)
    first = wx.project_gradients(model, proj)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    second = wx.project_gradients(None, proj)
    assert_close(first, second, **EXACT)
    assert_close({n: p.grad for n, p in model.named_parameters()}, once, **EXACT)
    order = proj._map.names
    assert float((flat(g, order) - flat(once, order)) @ flat(once, order)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("projection", ["block_hadamard", "sparse", "gaussian"])
def test_descent_is_that_of_a_subspace(projection):
    """SGD on projected gradients stays in theta0 + P z, with z that of SGD on the coordinates."""
    plain, inside = seeded().double(), wx.Subspace(seeded().double(), 11, projection, seed=2)
    proj = wx.SubspaceProjection(plain, 11, projection, seed=2)
    ours, theirs = torch.optim.SGD(plain.parameters(), lr=0.1), torch.optim.SGD(inside.parameters(), lr=0.1)
    for k in range(3):
        torch.manual_seed(k)
        x, y = torch.randn(8, 6).double(), torch.randn(8, 4).double()
        for model, optimizer in ((plain, ours), (inside, theirs)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if model is plain:
                z = wx.project_gradients(plain, proj)
            optimizer.step()
        assert_close(z, inside.coordinates.grad, **EXACT)
    assert_close(values_of(inside.bake()), values_of(plain), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = seeded().to(dtype)
    proj = wx.SubspaceProjection(model, 11)
    g = backward(model)
    full = explicit(proj, {n: t.numel() for n, t in g.items()})
    z = wx.project_gradients(model, proj)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(dtype).eps
    assert_close(z.double(), full.T @ flat(g, proj._map.names), rtol=0, atol=100 * torch.finfo(z.dtype).eps)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert all(t.dtype == dtype for t in found.values())
    expected = full @ (full.T @ flat(g, proj._map.names))
    assert_close(flat(found, proj._map.names), expected, rtol=2 * eps, atol=100 * torch.finfo(z.dtype).eps)


def test_mixed_dtypes():
    """One call for each dtype; the sum in the widest."""
    model = seeded()
    model[2].bfloat16()
    proj = wx.SubspaceProjection(model, 11)
    g = backward(model)
    full = explicit(proj, {n: t.numel() for n, t in g.items()})
    z = wx.project_gradients(model, proj)
    assert z.dtype == torch.float32
    assert_close(z.double(), full.T @ flat(g, proj._map.names), rtol=0, atol=1e-5)
    expected = full @ (full.T @ flat(g, proj._map.names))
    for (n, p), row in zip(
        sorted(model.named_parameters()), expected.split([g[n].numel() for n in sorted(g)]), strict=True
    ):
        tolerance = 1e-2 if n.startswith("2") else 1e-5
        assert_close(p.grad.double().flatten(), row, rtol=tolerance, atol=1e-5)


def test_missing_and_unknown_gradients():
    """A parameter without a gradient counts as zero and keeps none; one that P does not know keeps its own."""
    model = seeded(Conv).double()
    proj = wx.SubspaceProjection(model, 9, exclude=["head.bias"])
    g = backward(model)
    model.conv.weight.grad = None
    full = explicit(proj, {m.name: m.parameter.numel() for m in proj.members})
    g["conv.weight"].zero_()
    order = proj._map.names
    z = wx.project_gradients(model, proj)
    assert model.conv.weight.grad is None
    assert torch.equal(model.head.bias.grad, g["head.bias"])
    assert_close(z, full.T @ flat(g, order), **EXACT)
    start = sum(g[n].numel() for n in order[: order.index("head.weight")])
    expected = (full @ z)[start : start + g["head.weight"].numel()]
    assert_close(model.head.weight.grad.flatten(), expected, **EXACT)


def test_expanded_and_strided_gradients():
    model = seeded().double()
    proj = wx.SubspaceProjection(model, 11)
    g = backward(model)
    model[0].weight.grad = g["0.weight"].T.contiguous().T
    wx.project_gradients(model, proj)
    turned = model[0].weight.grad
    assert turned.stride() == (1, 9)
    model[0].weight.grad = g["0.weight"].clone()
    for n, p in model.named_parameters():
        p.grad.copy_(g[n])
    wx.project_gradients(model, proj)
    assert torch.equal(model[0].weight.grad, turned)


def test_named_parameters_lists_and_wrappers():
    """A model and its named parameters are one; a list is named by number; wrappers do not matter."""
    model = seeded().double()
    named = wx.SubspaceProjection(model.named_parameters(), 11)
    whole = wx.SubspaceProjection(model, 11)
    compiled = wx.SubspaceProjection(DataParallel(torch.compile(model)), 11)
    g = backward(model)
    z = [p.coordinates_of(g) for p in (named, whole, compiled)]
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])
    assert torch.equal(wx.project_gradients(DataParallel(model), whole), z[0])

    listed = wx.SubspaceProjection(model.parameters(), 11)
    assert sorted(listed._map.names) == ["0", "1", "2", "3"]
    backward(model)
    full = explicit(listed, dict(zip("0123", (t.numel() for t in g.values()), strict=True)))
    expected = full.T @ torch.cat([t.flatten() for t in g.values()])
    assert_close(wx.project_gradients(list(model.parameters()), listed), expected, **EXACT)


def test_redraw():
    model = seeded().double()
    proj = wx.SubspaceProjection(model, 11)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    found = []
    for step in range(3):
        g = backward(model)
        full = explicit(proj, sizes)
        assert proj.step == step
        assert_close(wx.project_gradients(model, proj), full.T @ flat(g, proj._map.names), **EXACT)
        found.append(full)
        proj.redraw()
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    with pytest.raises(RuntimeError, match="kronecker has one P"):
        wx.SubspaceProjection(model, 11, "kronecker").redraw()


def test_tensor_by_tensor(monkeypatch):
    """No D-vector: gradients are read where they lie in one call, and written one by one."""
    calls = Calls(monkeypatch)
    model = seeded()
    proj = wx.SubspaceProjection(model, 11)
    backward(model)
    wx.project_gradients(model, proj)
    assert (calls.backward_calls, calls.backwards) == (1, 4)
    assert (calls.forward_calls, calls.forwards) == (4, 4)
    backward(model)  # one that transforms all weights together does so once
    wx.project_gradients(model, wx.SubspaceProjection(model, 11, "fastfood"))
    assert (calls.backward_calls, calls.forward_calls) == (2, 5)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True))
    proj = wx.SubspaceProjection(model, 5)
    model(torch.tensor([1, 2, 2])).sum().backward()
    g = model[0].weight.grad.to_dense()
    z = wx.project_gradients(model, proj)
    full = explicit(proj, {"0.weight": 28}, torch.float32)
    assert_close(z, full.T @ g.flatten())
    assert_close(model[0].weight.grad.flatten(), full @ z)


VALUES = [
    (lambda m: wx.SubspaceProjection(m, 0), "dim must be at least 1, got 0"),
    (lambda m: wx.SubspaceProjection(m, 104), "dim must be from 1 to 103"),
    (lambda m: wx.SubspaceProjection(m, 5, "x"), "SubspaceProjection: projection must be one of"),
    (lambda m: wx.SubspaceProjection(m, 5, normalize="x"), "SubspaceProjection: normalize must be"),
    (lambda m: wx.SubspaceProjection(m, 5, include=["x"]), "include pattern 'x' matches no parameter"),
    (lambda m: wx.SubspaceProjection([], 5), "no parameter is selected"),
    (lambda m: wx.SubspaceProjection(m, 5, P.Dense(torch.zeros(5, 5))), r"basis must be \[D, dim\] = \[103, 5\]"),
    (lambda m: wx.project_gradients(m, wx.SubspaceProjection(m, 5)), "no parameter of the projection has a gradient"),
    (lambda m: wx.project_gradients(m[0], wx.SubspaceProjection(m, 5)), "those of the projection; .* is missing"),
    (lambda m: wx.project_gradients(Conv(), wx.SubspaceProjection(m, 5)), "0.weight is missing"),
    (lambda m: wx.SubspaceProjection(m, 5).coordinates_of({}), "no gradient is given"),
    (lambda m: wx.SubspaceProjection(m, 5).coordinates_of({"x": torch.zeros(3)}), "gradients .* 'x'"),
    (lambda m: wx.SubspaceProjection(m, 5).coordinates_of({"0.bias": torch.zeros(3)}), r"0.bias must be .*\[9\]"),
]
TYPES = [
    (lambda m: wx.SubspaceProjection(m, 5.0), "dim must be an int"),
    (lambda m: wx.SubspaceProjection([torch.zeros(3)], 2), "parameters must be a model, parameters or"),
    (lambda m: wx.SubspaceProjection([(0, m[0].weight)], 2), "parameters must be a model, parameters or"),
    (lambda m: wx.project_gradients(m, "one_hot"), "projection must be a wx.SubspaceProjection, got str"),
    (lambda m: wx.SubspaceProjection(m[0].weight, 5), "parameters must be"),
]


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values(number):
    call, message = VALUES[number]
    with pytest.raises(ValueError, match=message):
        call(mlp())


@pytest.mark.parametrize("number", range(len(TYPES)))
def test_types(number):
    call, message = TYPES[number]
    with pytest.raises(TypeError, match=message):
        call(mlp())


# the intrinsic dimension


def scored(curve):
    """A training whose score is a function of the number of trained coordinates."""
    tried = []

    def train(model):
        d = model.dim if isinstance(model, wx.Subspace) else None
        tried.append(d)
        return curve(sum(p.numel() for p in model.parameters()) if d is None else d)

    return train, tried


@pytest.mark.parametrize("least", [1, 5, 16, 17, 40, 64, 103])
@pytest.mark.parametrize("tolerance", [1e-9, 0.1])
def test_bisection_finds_the_smallest(least, tolerance):
    train, tried = scored(lambda d: 1.0 if d >= least else 0.5)
    found = wx.intrinsic_dimension(mlp, train, tolerance=tolerance)
    assert (found.baseline, found.threshold, found.total) == (1.0, 0.9, 103)
    assert tried[0] is None and len(tried) == len(set(tried)) and set(found.scores) == set(tried[1:])
    if tolerance < 1e-8:
        assert found.dim == least
    else:
        assert least <= found.dim <= max(least + 1, least / 0.9)
    assert len(tried) <= 12


def test_given_dims_and_baseline():
    train, tried = scored(lambda d: d / 100)
    found = wx.intrinsic_dimension(mlp, train, share=0.5, baseline=0.8, dims=[10, 30, 50, 90])
    assert found.dim == 50 and tried == [10, 30, 50] and found.scores == {10: 0.1, 30: 0.3, 50: 0.5}
    assert found.threshold == 0.4 and found.baseline == 0.8
    assert wx.intrinsic_dimension(mlp, train, share=0.5, baseline=0.8, dims=[39, 40, 41]).dim == 40  # reached: equal


@pytest.mark.parametrize("dims", [None, [10, 20]])
def test_none_reaches(dims):
    train, tried = scored(lambda d: 0.1)
    found = wx.intrinsic_dimension(mlp, train, baseline=1.0, dims=dims)
    assert found.dim is None
    assert max(tried) == (103 if dims is None else 20)


def test_options_go_to_the_subspace():
    seen = []

    def train(model):
        seen.append(model)
        return 1.0

    wx.intrinsic_dimension(
        mlp, train, dims=[3], projection=P.OneHot(tile=64), seed=9, normalize="init", exclude=["*.bias"]
    )
    sub = seen[1]
    assert (sub.projection, sub.seed, sub.normalize) == (P.OneHot(tile=64), 9, "init")
    assert sub.names == ("0.weight", "2.weight") and not isinstance(seen[0], wx.Subspace)


def test_a_real_task():
    """Regression on data that few directions explain: an easier task has the smaller dimension."""

    def make():
        torch.manual_seed(0)
        return nn.Linear(20, 1, bias=False)

    def task(active):
        generator = torch.Generator().manual_seed(active)
        x, w = torch.randn(64, 20, generator=generator), torch.zeros(20)
        w[:active] = 1
        y = (x @ w)[:, None] + make()(x).detach()

        def train(model):
            optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=60)

            def closure():
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            return 1 / (1 + float(closure().detach()))

        return train

    found = [wx.intrinsic_dimension(make, task(k), start=1, tolerance=0.01) for k in (1, 20)]
    assert found[0].dim is not None and found[1].dim is not None
    assert found[0].dim <= found[1].dim
    assert all(f.scores[f.dim] >= f.threshold for f in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dims": []}, ValueError, r"dims must ascend and not be empty, got \[\]"),
        ({"dims": [5, 3]}, ValueError, "dims must ascend"),
        ({"dims": [3, 3]}, ValueError, "dims must ascend"),
        ({"dims": [0, 3]}, ValueError, "dims must be at least 1, got 0"),
        ({"dims": [1.5]}, TypeError, "dims must be an int"),
        ({"dims": [200]}, ValueError, "dim must be from 1 to 103"),
        ({"share": 0}, ValueError, "share must be positive"),
        ({"share": "x"}, TypeError, "share must be a number"),
        ({"tolerance": -1}, ValueError, "tolerance must be positive"),
        ({"start": 0}, ValueError, "start must be at least 1"),
        ({"baseline": float("nan")}, ValueError, "baseline must give a finite number"),
        ({"projection": "x"}, ValueError, "intrinsic_dimension: projection must be one of"),
        ({"normalize": "x"}, ValueError, "normalize must be"),
        ({"train": lambda m: "good"}, TypeError, "train must give a number, got 'good'"),
        ({"train": lambda m: float("nan")}, ValueError, "train must give a finite number"),
        ({"train": 3}, TypeError, "train must be a function, got int"),
        ({"make_model": mlp()}, TypeError, "make_model must be a function, got Sequential"),
    ],
)
def test_errors_of_the_intrinsic_dimension(options, error, message):
    with pytest.raises(error, match=message):
        wx.intrinsic_dimension(**{"make_model": mlp, "train": lambda m: 1.0, **options})
