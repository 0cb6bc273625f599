"""Training in a subspace: optimizers, redrawn bases, and the way back to a plain model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from subspace_models import EXACT, Conv, Zoo, computed, inputs, matrix, mlp, moved, thetas, values_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import weightxform as wx

P = wx.subspace
OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.05, "fused": True}),
    (torch.optim.Adam, {"lr": 0.05, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.05, "foreach": True}),
    (torch.optim.Adam, {"lr": 0.05, "foreach": False}),
]


def batch(k: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 4, generator=generator, dtype=torch.float64)


def plain_step(plain: nn.Module, weights: dict, k: int, z: torch.Tensor) -> torch.Tensor:
    x, y = batch(k)
    loss = nn.functional.mse_loss(functional_call(plain, weights, (x,)), y)
    z.grad = None
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_trains_as_the_explicit_matrix_does(kind, options):
    sub, plain = wx.Subspace(mlp().double(), 17, "one_hot"), mlp().double()
    theta0 = values_of(sub.model)
    z = torch.zeros(17, dtype=torch.float64, requires_grad=True)
    ours, theirs = kind(sub.parameters(), **options), kind([z], **options)
    for step in range(6):
        x, y = batch(step)
        ours.zero_grad()
        loss = nn.functional.mse_loss(sub(x), y)
        loss.backward()
        assert_close(loss.detach(), plain_step(plain, thetas(sub, theta0, z), step, z), rtol=1e-8, atol=1e-8)
        ours.step()
        theirs.step()

    assert_close(sub.coordinates.detach(), z.detach(), rtol=1e-7, atol=1e-8)
    assert_close(values_of(sub.model), theta0, rtol=0, atol=0)


def test_lbfgs_and_closures():
    sub, (x, y) = wx.Subspace(mlp().double(), 12), batch()
    optimizer = torch.optim.LBFGS([sub.coordinates], max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(sub(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    assert closure() < 0.9 * first


def test_every_dimension_is_the_full_model():
    """d = D: plain gradient descent in z is plain gradient descent in theta, because P is orthogonal."""
    sub = wx.Subspace(mlp().double(), 103)
    plain = mlp().double()
    plain.load_state_dict(sub.model.state_dict())
    for k in range(4):
        x, y = batch(k)
        for model in (sub, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert_close(computed(sub), values_of(plain), **EXACT)


# redraw


@pytest.mark.parametrize("projection", ["block_hadamard", "rademacher"])
@pytest.mark.parametrize("structure", ["shared", "said"])
def test_random_bases_descent(projection, structure):
    """theta <- theta - lr P_s P_s' g, with another P_s each step: what was found is folded into theta0."""
    sub = wx.Subspace(mlp().double(), 11, projection, redraw="step", structure=structure)
    plain = mlp().double()
    theta, seen = values_of(sub.model), []
    optimizer = torch.optim.SGD([sub.coordinates], lr=0.1)
    for step in range(4):
        assert int(sub.step) == step and not sub.coordinates.any()
        Q = matrix(sub._maps[0], {n: t.numel() for n, t in theta.items()}, step=torch.tensor(step))
        z = torch.zeros(11, dtype=torch.float64, requires_grad=True)
        plain_step(plain, thetas(sub, theta, z), step, z)
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(sub(x), y).backward()
        assert_close(sub.coordinates.grad, z.grad, **EXACT)
        optimizer.step()
        with torch.no_grad():
            theta = {n: t.detach() for n, t in thetas_at(sub, theta, -0.1 * z.grad, step).items()}
        assert_close(values_of(sub.model), theta, **EXACT)
        assert_close(computed(sub), theta, **EXACT)
        seen.append(Q)
    assert not torch.allclose(seen[0], seen[1])


def thetas_at(sub: wx.Subspace, theta0: dict, z: torch.Tensor, step: int) -> dict:
    before = sub.step.clone()
    sub.step.fill_(step)
    found = thetas(sub, theta0, z)
    sub.step.copy_(before)
    return found


def test_redraw_only_after_steps_over_the_coordinates():
    sub = wx.Subspace(mlp(), 5, redraw="step", extra_trainable=["2.bias"])
    other = torch.optim.SGD([sub.model[2].bias], lr=1.0)
    sub(torch.randn(1, 6)).sum().backward()
    other.step()
    assert int(sub.step) == 0
    torch.optim.Adam(sub.parameters()).step()
    assert int(sub.step) == 1


def test_no_redraw_after_the_way_back():
    sub = wx.Subspace(mlp(), 5, redraw="step")
    sub(torch.randn(1, 6)).sum().backward()
    sub.unwrap()
    torch.optim.SGD([sub.coordinates], lr=0.1).step()
    assert int(sub.step) == 0 and sub.coordinates.any()


def test_redraw_by_hand_and_its_end():
    sub = moved(wx.Subspace(mlp().double(), 5, redraw="step"))
    before = computed(sub)
    sub.redraw()
    assert_close(computed(sub), before, rtol=0, atol=0)
    assert_close(values_of(sub.model), before, rtol=0, atol=0)
    assert int(sub.step) == 1 and not sub.coordinates.any()
    sub.step.fill_(2**32 - 2)
    state = {k: v.clone() for k, v in sub.state_dict().items() if torch.is_tensor(v)}
    with pytest.raises(RuntimeError, match="no more"):
        sub.redraw()
    for k, v in state.items():
        assert torch.equal(sub.state_dict()[k], v)
    with pytest.raises(RuntimeError, match="redraw=None"):
        wx.Subspace(mlp(), 5).redraw()


def test_copies_redraw_on_their_own():
    sub = wx.Subspace(mlp(), 5, redraw="step")
    for other in (copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        other(torch.randn(1, 6)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert int(other.step) == 1 and int(sub.step) == 0
        assert not other.coordinates.any()


# back to a plain model


@pytest.mark.parametrize("how", ["bake", "unwrap"])
@pytest.mark.parametrize("make", [mlp, Conv, Zoo])
def test_the_way_back(make, how):
    model = make().double()
    frozen = next(p for n, p in model.named_parameters() if n.endswith("bias") or "mixes" in n)
    frozen.requires_grad_(False)
    hooks = {n: sum(len(h) for k, h in vars(m).items() if k.endswith("hooks")) for n, m in model.named_modules()}
    asks = {n: p.requires_grad for n, p in model.named_parameters()}
    classes, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
    theta0 = values_of(model)
    sub = moved(wx.Subspace(model, 9, extra_trainable=["norm.weight"] if hasattr(model, "norm") else None))
    now = {**theta0, **computed(sub)}
    back = getattr(sub, how)()
    assert back is model
    assert [type(m) for m in model.modules()] == classes
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asks
    assert hooks == {
        n: sum(len(h) for k, h in vars(m).items() if k.endswith("hooks")) for n, m in model.named_modules()
    }
    assert_close(values_of(model), now if how == "bake" else theta0, rtol=0, atol=0)
    assert not any("_wx" in vars(m) for m in model.modules())
    for again in ("bake", "unwrap"):
        with pytest.raises(RuntimeError, match=f"Subspace.{again}: .* is not computed by this Subspace alone"):
            getattr(sub, again)()
    assert torch.equal(
        pickle.loads(pickle.dumps(model)).state_dict()[next(iter(theta0))], next(iter(model.parameters()))
    )
    wx.Subspace(model, 4)(*inputs(model))


def test_an_optimizer_of_the_model_goes_on_after_bake():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sub = moved(wx.Subspace(model, 5))
    sub.bake()
    before = values_of(model)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_bake_with_another_transform_on_top():
    sub = moved(wx.Subspace(mlp(), 5))
    layer = sub.model[0]
    layer.weight = wx.ComputedParameter(layer.weight, wx.WeightNorm())
    x = torch.randn(2, 6)
    before = sub(x)
    with pytest.raises(RuntimeError, match=r"Subspace.bake: 0.weight is not computed by this Subspace alone"):
        sub.bake()
    assert torch.equal(sub(x), before)
