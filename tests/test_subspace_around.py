"""What else is done with a model: frozen and thawed, averaged, exported, converted; what must not pass in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from subspace_models import EXACT, Zoo, computed, inputs, matrix, mlp, moved, seeded, values_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import weightxform as wx

P = wx.subspace


def batch() -> torch.Tensor:
    return torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)


# frozen and thawed


def test_coordinates_frozen_and_thawed():
    """As a GAN does with its halves: the weights that were computed meanwhile have no graph, or one too many."""
    sub = moved(wx.Subspace(mlp().double(), 5))
    sub.coordinates.requires_grad_(False)
    assert not sub(batch()).requires_grad
    sub.coordinates.requires_grad_(True)
    sub(batch()).sum().backward()
    assert sub.coordinates.grad.abs().sum() > 0
    sub.coordinates.requires_grad_(False)
    assert not sub(batch()).requires_grad


@pytest.mark.parametrize("how", ["bake", "unwrap"])
@pytest.mark.parametrize("change", ["assign", "overwrite", "swap"])
def test_gradients_are_required_again_by_parameters_that_were_replaced(change, how):
    model = mlp()
    model[0].bias.requires_grad_(False)
    sub = moved(wx.Subspace(model, 5))
    sub(batch().float())
    if change == "assign":
        model.load_state_dict(mlp().state_dict(), assign=True)
    else:
        option = getattr(torch.__future__, f"set_{change}_module_params_on_conversion")
        option(True)
        try:
            sub.double()
        finally:
            option(False)
    now = computed(sub) if how == "bake" else {n: values_of(model)[n] for n in sub.names}
    getattr(sub, how)()
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert_close({n: t for n, t in values_of(model).items() if n in now}, now, rtol=0, atol=0)


def test_theta0_that_requires_gradients():
    """What the user thaws is trained too: both gradients are right."""
    sub = moved(wx.Subspace(mlp().double(), 5))
    raw = wx.raw(sub.model[0]).requires_grad_()
    weight = sub.model[0].weight
    g = torch.randn_like(weight)
    weight.backward(g)
    assert torch.equal(raw.grad, g) and sub.coordinates.grad.abs().sum() > 0


# between a forward and its backward


@pytest.mark.parametrize("write", ["redraw", "basis", "scales"])
def test_what_the_backward_needs_was_written(write):
    """P of another step, a basis or a scale that was changed: an error, and no wrong gradient."""
    basis = torch.randn(103, 5)
    options = {
        "redraw": {"redraw": "step"}, "basis": {"projection": P.Dense(basis)}, "scales": {"structure": "said"},
    }[write]  # fmt: skip
    sub = moved(wx.Subspace(mlp(), 5, **options))
    y = sub(batch().float()).sum()
    with torch.no_grad():
        {"redraw": sub.redraw, "basis": basis.zero_, "scales": lambda: sub.scales.mul_(2)}[write]()
    with pytest.raises(RuntimeError, match=r"Subspace: a tensor of shape .* was written between forward and backward"):
        y.backward()


def test_z_may_change_before_the_backward():
    """The map is linear in z: the gradient does not depend on it."""
    sub = moved(wx.Subspace(mlp().double(), 5))
    weight = sub.model[0].weight
    g = torch.randn_like(weight)
    expected = torch.autograd.grad(weight, sub.coordinates, g, retain_graph=True)
    with torch.no_grad():
        sub.coordinates.zero_()
    assert_close(torch.autograd.grad(weight, sub.coordinates, g), expected, rtol=0, atol=0)


# other ways to a derivative, and to coordinates


@pytest.mark.parametrize("projection", ["block_hadamard", "rademacher", "kronecker"])
def test_batched_gradients(projection):
    """autograd.functional.jacobian(vectorize=True) and grad(is_grads_batched=True): an older vmap than torch.func's."""
    sub = moved(wx.Subspace(mlp().double(), 5, projection))
    z = sub.coordinates.detach().clone()

    def output(z):
        return functional_call(sub, {"coordinates": z}, (batch(),))

    expected = torch.func.jacrev(output)(z)
    assert_close(torch.autograd.functional.jacobian(output, z, vectorize=True), expected, **EXACT)
    y = sub(batch())
    grads = torch.randn(4, *y.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, sub.coordinates, grads, is_grads_batched=True, retain_graph=True)
    one = torch.stack([torch.autograd.grad(y, sub.coordinates, g, retain_graph=True)[0] for g in grads])
    assert_close(found, one, **EXACT)


def test_hypernetwork():
    sub, net = wx.Subspace(mlp().double(), 5), nn.Linear(2, 5).double()
    c = torch.randn(2, dtype=torch.float64)
    for _ in range(2):
        functional_call(sub, {"coordinates": net(c)}, (batch(),)).square().sum().backward()
    (expected,) = torch.autograd.grad(
        functional_call(sub, {"coordinates": (z := net(c).detach().requires_grad_())}, (batch(),)).square().sum(), z
    )
    assert_close(net.bias.grad, 2 * expected, **EXACT)
    assert sub.coordinates.grad is None


def test_written_behind_every_counter():
    """z.data.add_: as for every computed weight, invalidate says so."""
    sub = moved(wx.Subspace(mlp().double(), 5))
    before = computed(sub)
    sub.coordinates.data.mul_(2)
    wx.invalidate(sub)
    theta0 = values_of(sub.model)
    for n, t in computed(sub).items():
        assert_close(t - theta0[n], 2 * (before[n] - theta0[n]), **EXACT)


# models of other makes, and copies of them


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GRU(4, 5, bidirectional=True),
        lambda: nn.LSTM(4, 5, proj_size=2),
        lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        lambda: nn.Bilinear(4, 4, 3),
        lambda: nn.ModuleDict({"a": nn.Conv1d(4, 4, 1, groups=2), "b": nn.ConvTranspose1d(4, 2, 3)}),
    ],
)
def test_layers(make):
    """Training, evaluation (with torch's fast paths) and gradients are those of a plain model with these weights."""
    torch.manual_seed(0)
    sub = moved(wx.Subspace(make().double(), 11))
    plain = copy.deepcopy(make().double())
    plain.load_state_dict({**values_of(sub.model), **computed(sub)})
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def run(model):
        if isinstance(model, nn.ModuleDict):
            return model["b"](model["a"](x.mT.repeat(1, 1, 2)))
        y = model(x, x) if isinstance(model, (nn.Transformer, nn.Bilinear)) else model(x)
        return y[0] if isinstance(y, tuple) else y

    y, expected = run(sub.model), run(plain)
    assert_close(y, expected, **EXACT)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    full = matrix(sub._maps[0], {n: p.numel() for n, p in plain.named_parameters()})
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
    flat = torch.cat([gradients[n].flatten() for n in sub._maps[0].names])
    assert_close(sub.coordinates.grad, full.T @ flat, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert_close(run(sub.model.eval()), run(plain.eval()), rtol=1e-7, atol=1e-9)


def test_parameters_without_elements_are_left_out():
    model = mlp()
    model.nothing = nn.Parameter(torch.zeros(0, 3))
    sub = wx.Subspace(model, 103)
    assert "nothing" not in sub.names
    assert sub.unwrap().nothing.requires_grad


def test_averaged_model():
    sub = moved(wx.Subspace(mlp().double(), 5))
    average = torch.optim.swa_utils.AveragedModel(sub)
    average.update_parameters(sub)
    first = sub.coordinates.detach().clone()
    with torch.no_grad():
        sub.coordinates.add_(2)
    average.update_parameters(sub)
    assert_close(average.module.coordinates, first + 1, **EXACT)
    with torch.no_grad():
        sub.coordinates.copy_(first + 1)
    assert_close(computed(average.module), computed(sub), **EXACT)


@pytest.mark.parametrize("make", [mlp, Zoo])
def test_a_copy_of_the_model_alone(make):
    """It takes its own Subspace with it."""
    sub = moved(wx.Subspace(make().double(), 9))
    x = inputs(sub.model)
    y, other = sub(*x), copy.deepcopy(sub.model)
    assert_close(other(*x), y, rtol=0, atol=0)
    sub.unwrap()
    assert_close(other(*x), y, rtol=0, atol=0)


def test_meta_device():
    with torch.device("meta"):
        model = mlp()
    sub = wx.Subspace(model, 5).to_empty(device="cpu")
    sub.model.load_state_dict(seeded().state_dict())
    sub.reset()
    expected = moved(wx.Subspace(seeded(), 5))
    assert_close(computed(moved(sub)), computed(expected), rtol=0, atol=0)


def test_exported_model():
    sub = moved(wx.Subspace(mlp().double(), 5))
    program = torch.export.export(sub, (batch(),))
    again = program.module()
    assert_close(again(batch()), sub(batch()), **EXACT)
    again(batch()).sum().backward()
    sub(batch()).sum().backward()
    assert_close(again.coordinates.grad, sub.coordinates.grad, **EXACT)
    with torch.no_grad():
        for p in (again.coordinates, sub.coordinates):
            p.add_(1)
    assert_close(again(batch()), sub(batch()), **EXACT)


def test_traces_do_not_freeze_the_weights():
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(RuntimeError, match="would become a constant of the trace"),
    ):
        torch.jit.trace(wx.Subspace(mlp().double(), 5), (batch(),))


def test_bake_of_the_package():
    """wx.bake(model) is the other way out: the same values; the parameters stay frozen."""
    sub = moved(wx.Subspace(mlp().double(), 5))
    y = sub(batch())
    assert torch.equal(wx.bake(sub.model)(batch()), y)
    with pytest.raises(RuntimeError, match="it was baked, or has another transform on top"):
        sub.bake()
