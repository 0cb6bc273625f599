"""A Subspace compiled, in other dtypes, copied, pickled, and in checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from subspace_models import EXACT, Calls, Conv, Zoo, computed, inputs, mlp, moved, thetas, values_of
from torch import nn
from torch.testing import assert_close

import weightxform as wx

P = wx.subspace


def batch(k: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 4, generator=generator, dtype=torch.float64)


# compiled, other dtypes, copies


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        ("aot_eager", {"structure": "said"}),
        ("aot_eager", {"projection": "kronecker"}),
        ("aot_eager", {"structure": "per_tensor", "projection": "one_hot"}),
        ("aot_eager", {"redraw": "step"}),
    ],
)
def test_compiled_whole(backend, options):
    """fullgraph, forward and backward; neither another z nor eager calls in between compile again."""
    sub = moved(wx.Subspace(mlp(), 7, **options))
    compiled = torch.compile(sub, fullgraph=True, backend=backend)
    for k in range(3):
        x = torch.randn(3, 6)
        with torch._dynamo.config.patch(error_on_recompile=k > 0):
            y = compiled(x)
        expected = sub(x)
        assert_close(y, expected)
        g = torch.randn_like(y)
        learned = [p for p in sub.parameters() if p.requires_grad]
        found = torch.autograd.grad(y, learned, g)
        assert_close(found, torch.autograd.grad(expected, learned, g))
        with torch.no_grad():
            sub.coordinates.add_(1)


def test_compiled_model_inside_and_no_grad():
    sub = moved(wx.Subspace(Conv().eval(), 7))
    x = torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        assert_close(torch.compile(sub, fullgraph=True, backend="aot_eager")(x), sub(x))
        assert_close(torch.compile(sub.model, fullgraph=True, backend="aot_eager")(x), sub(x))


def test_names_are_those_of_a_compiled_or_parallel_model():
    """The same P for a model that is wrapped already: prefixes are no part of a name."""
    model = mlp()
    plain = moved(wx.Subspace(copy.deepcopy(model), 7))
    compiled = moved(wx.Subspace(torch.compile(copy.deepcopy(model)), 7))
    parallel = moved(wx.Subspace(nn.DataParallel(copy.deepcopy(model)), 7))
    for other in (compiled, parallel):
        assert other.names == plain.names
        assert_close(computed(other), computed(plain), rtol=0, atol=0)


@pytest.mark.parametrize(("change", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_weights_keep_float_coordinates(change, dtype):
    sub = moved(wx.Subspace(mlp(), 5, structure="said", redraw="step"))
    z = sub.coordinates.detach().clone()
    sub(torch.randn(1, 6))
    getattr(sub, change)()
    assert torch.equal(sub.coordinates, z) and sub.scales.dtype == torch.float32 and sub.step.dtype == torch.int64
    fresh = mlp().to(dtype)
    fresh.load_state_dict(sub.model.state_dict())
    other = moved(wx.Subspace(fresh, 5, structure="said"))
    assert other.coordinates.dtype == torch.float32
    assert {t.dtype for t in computed(sub).values()} == {dtype}
    assert_close(computed(sub), computed(other), rtol=0, atol=0)
    y = sub(torch.randn(2, 6).to(dtype))
    y.float().sum().backward()
    assert sub.coordinates.grad.dtype == torch.float32


def test_double_and_mixed_dtypes():
    sub = moved(wx.Subspace(mlp(), 5)).double()
    assert sub.coordinates.dtype == torch.float64 and computed(sub)["0.weight"].dtype == torch.float64
    model = mlp()
    model[2].bfloat16()
    mixed = wx.Subspace(model, 5)
    theta0 = values_of(model)
    assert mixed.coordinates.dtype == torch.float32
    moved(mixed)
    weights = computed(mixed)
    assert weights["0.weight"].dtype == torch.float32 and weights["2.weight"].dtype == torch.bfloat16
    P64 = {n: t.double() for n, t in theta0.items()}
    expected = thetas(mixed, P64, mixed.coordinates.detach().double())
    for n, t in weights.items():
        assert_close(t.double(), expected[n], rtol=1e-2 if n.startswith("2") else 1e-5, atol=1e-5)
    sum(t.float().square().sum() for t in (model[0].weight, model[2].weight)).backward()
    assert mixed.coordinates.grad.dtype == torch.float32
    model = mlp()
    model[2].double()
    assert wx.Subspace(model, 5).coordinates.dtype == torch.float64


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("make", [mlp, Zoo])
def test_copies(make, how):
    sub = moved(wx.Subspace(make(), 9, "sparse", structure="said"))
    x = inputs(sub.model)[0]
    x = x if make is Zoo else x.float()
    y = sub(x)
    if how == "deepcopy":
        other = copy.deepcopy(sub)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(sub))
    else:
        file = io.BytesIO()
        torch.save(sub, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    again = other(x)
    assert_close(again, y, rtol=0, atol=0)
    with torch.no_grad():
        other.coordinates.add_(1)
        wx.raw(next(m for m in other.model.modules() if wx.is_computed(m, "weight"))).add_(1)
    assert_close(sub(x), y, rtol=0, atol=0)  # nothing is shared
    changed = other(x)
    first = changed if torch.is_tensor(changed) else changed["logits"]
    assert not torch.equal(first, y if torch.is_tensor(y) else y["logits"])
    first.sum().backward()
    assert other.coordinates.grad is not None and sub.coordinates.grad is None
    other.bake()
    assert type(sub.model[0] if make is mlp else sub.model.embedding) is not nn.Embedding


def test_state_dict_round_trip():
    sub = moved(wx.Subspace(Conv(), 9, P.OneHot(tile=64), structure="said", redraw="step"))
    sub(torch.randn(4, 2, 5, 5))
    torch.manual_seed(99)
    other = wx.Subspace(Conv(), 9, P.OneHot(tile=64), structure="said", redraw="step")
    file = io.BytesIO()
    torch.save(sub.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_close(computed(other), computed(sub), rtol=0, atol=0)
    assert_close(values_of(other), values_of(sub), rtol=0, atol=0)
    x = torch.randn(4, 2, 5, 5)
    assert torch.equal(other.eval()(x), sub.eval()(x))


def test_a_checkpoint_of_the_plain_model_moves_theta0():
    sub, other = moved(wx.Subspace(mlp().double(), 9)), mlp().double()
    sub(batch()[0])
    sub.model.load_state_dict(other.state_dict(), strict=True)
    expected = thetas(sub, values_of(other), sub.coordinates.detach())
    assert_close(computed(sub), expected, **EXACT)
    plain = mlp().double()
    plain.load_state_dict(sub.model.state_dict(), strict=True)
    assert_close(values_of(plain), values_of(other), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"projection": "one_hot"}, "kind"),
        ({"dim": 8}, "d"),
        ({"normalize": "init"}, "normalize"),
        ({"projection": P.BlockHadamard(tile=64)}, "tile"),
        ({"exclude": ["0.bias"]}, "names"),
    ],
)
def test_a_checkpoint_of_another_projection_is_refused(options, what):
    state = moved(wx.Subspace(mlp(), 9)).state_dict()
    other = moved(wx.Subspace(mlp(), **{"dim": 9, **options}))
    before = values_of(other)
    with pytest.raises(ValueError, match=f"another projection; {what} differs"):
        other.load_state_dict(state)
    assert_close(values_of(other), before, rtol=0, atol=0)


def test_without_strictness_and_assigned():
    sub, other = moved(wx.Subspace(mlp(), 9)), wx.Subspace(mlp(), 9)
    other.load_state_dict(sub.state_dict(), assign=True)
    assert_close(computed(other), computed(sub), rtol=0, atol=0)
    assert isinstance(other.coordinates, nn.Parameter)
    other(torch.randn(1, 6)).sum().backward()
    assert other.coordinates.grad is not None
    missing = other.load_state_dict(sub.model.state_dict(), strict=False)
    assert "coordinates" in missing.missing_keys


def test_two_subspaces_of_one_model(monkeypatch):
    """Of different weights: each computes its own."""
    calls = Calls(monkeypatch)
    model = mlp()
    first = wx.Subspace(model, 5, include=["0"])
    model[2].requires_grad_()
    second = wx.Subspace(model, 6, include=["2"])
    moved(first)
    moved(second)
    model(torch.randn(2, 6)).sum().backward()
    assert first.coordinates.grad is not None and second.coordinates.grad is not None
    assert calls.forward_calls == 2
    second.unwrap()
    model(torch.randn(2, 6)).sum().backward()
    first.unwrap()
    assert not any(wx.is_computed(m) for m in model.modules())
