"""Bad input, section 5 of the issue: the argument, what it must be, what it was; and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from subspace_models import Conv, Zoo, mlp, seeded, state_of
from torch import nn
from torch.testing import assert_close

import weightxform as wx

P = wx.subspace


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = state_of(model)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
    assert not any("_wx" in vars(m) for m in model.modules())


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


class Kinds(nn.Module):
    """A float weight, and parameters of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)
        self.complex = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.eighth = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))


class Twins(nn.Module):
    """Two names that are one without wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.module = nn.Linear(3, 3)


def devices() -> nn.Module:
    model = mlp()
    model[2].to("meta")
    return model


def parametrized() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, max_norm=1.0))


VALUES = [
    (mlp, {"dim": 0}, "dim must be at least 1, got 0"),
    (mlp, {"dim": -5}, "dim must be at least 1, got -5"),
    (mlp, {"dim": 104}, "dim must be from 1 to 103, the elements of the tensors, got 104"),
    (mlp, {"dim": 2**64}, "dim must fit into 64 bits"),
    (mlp, {"dim": 104, "structure": "per_tensor"}, "dim must be from 1 to 103"),
    (mlp, {"projection": "hadamard"}, "projection must be one of 'block_hadamard', .*; got 'hadamard'"),
    (mlp, {"projection": "dense"}, "projection must be one of .*Dense"),
    (mlp, {"projection": ""}, "projection must be one of"),
    (mlp, {"projection": P.Dense(torch.zeros(102, 5))}, r"basis must be \[D, dim\] = \[103, 5\] .* got \[102, 5\]"),
    (mlp, {"projection": P.Learned(torch.zeros(103, 6))}, r"Learned: basis must be \[D, dim\] = \[103, 5\]"),
    (mlp, {"seed": 2**63}, "seed must fit into 64 bits"),
    (mlp, {"normalize": "layer"}, "normalize must be 'global' or 'per_tensor' or 'init', got 'layer'"),
    (mlp, {"normalize": None}, "normalize must be .* got None"),
    (mlp, {"projection": "kronecker", "normalize": "init"}, "normalize must be 'global' for kronecker, got 'init'"),
    (mlp, {"projection": P.Dense(torch.zeros(103, 5)), "normalize": "init"}, "normalize must be 'global' for dense"),
    (mlp, {"structure": "per_layer"}, "structure must be 'shared' or 'said' or 'per_tensor', got 'per_layer'"),
    (mlp, {"structure": "per_tensor", "projection": "fastfood"}, "structure must be 'shared' or 'said' for fastfood"),
    (mlp, {"redraw": "epoch"}, "redraw must be 'step', got 'epoch'"),
    (mlp, {"redraw": True}, "redraw must be 'step', got True"),
    (mlp, {"redraw": "step", "projection": "kronecker"}, "redraw must be None for kronecker"),
    (mlp, {"bucket_bytes": 0}, "bucket_bytes must be at least 1"),
    (mlp, {"include": ["3.*"]}, "include pattern '3.*' matches no parameter; there are: 0.weight, 0.bias, 2.weight"),
    (mlp, {"exclude": ["weight"]}, "exclude pattern 'weight' matches no parameter"),
    (mlp, {"extra_trainable": ["0.weight", "x"]}, "extra_trainable pattern 'x' matches no parameter"),
    (mlp, {"include": []}, "no parameter is selected"),
    (mlp, {"exclude": ["*"]}, "no parameter is selected"),
    (mlp, {"extra_trainable": ["*"]}, "no parameter is selected"),
    (mlp, {"include": ["0.*"], "extra_trainable": ["0.bias"]}, "0.bias matches a pattern of both include and extra"),
    (mlp, {"exclude": ["0.*"], "extra_trainable": ["0.bias"], "include": ["0.bias"]}, "both include and extra"),
    (lambda: nn.ReLU(), {}, "no parameter is selected"),
    (lambda: nn.ReLU(), {"include": ["*"]}, "matches no parameter; there are: none"),
    (lambda: frozen(mlp()), {}, "no parameter is selected; frozen ones take part only after requires_grad_"),
    (lambda: frozen(mlp()), {"include": ["0.weight"]}, "include: 0.weight is frozen"),
    (lambda: frozen(mlp()), {"extra_trainable": ["0.weight"]}, "extra_trainable: 0.weight is frozen"),
    (devices, {}, "the parameters must be on one device, got cpu, meta"),
    (parametrized, {}, "the module is parametrized"),
    (with_norm, {}, "max_norm must be None, got 1.0"),
    (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), {}, "lazy"),
    (Twins, {"dim": 2}, "weight .* two parameters"),
    (Twins, {"dim": 2, "include": ["weight"]}, "weight .* two parameters"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values(number):
    make, options, message = VALUES[number]
    model = make()
    plain = not any(nn.parameter.is_lazy(p) or p.is_meta for p in model.parameters())
    before = state_of(model) if plain else None
    with pytest.raises(ValueError, match=message):
        wx.Subspace(model, **{"dim": 5, **options})
    assert not any("_wx" in vars(m) for m in model.modules())
    if before is not None:
        assert_unchanged(model, before)


TYPES = [
    (mlp, {"dim": 5.0}, "dim must be an int, got 5.0"),
    (mlp, {"dim": True}, "dim must be an int, got True"),
    (mlp, {"dim": None}, "dim must be an int, got None"),
    (mlp, {"seed": "0"}, "seed must be an int, got '0'"),
    (mlp, {"projection": P.OneHot}, "projection must be a name or a projection of wx.subspace, got OneHot"),
    (mlp, {"projection": None}, "projection must be a name or a projection of wx.subspace, got NoneType"),
    (mlp, {"projection": torch.zeros(103, 5)}, "projection must be a name .* got Tensor"),
    (mlp, {"include": "0.*"}, "include must be a list of patterns, got '0.*'"),
    (mlp, {"exclude": [0]}, r"exclude must be a list of patterns, got \[0\]"),
    (mlp, {"extra_trainable": 5}, "extra_trainable must be a list of patterns, got 5"),
    (Kinds, {"include": ["whole"]}, r"include: whole must be float64, float32, .*, got int64\[3\] on cpu; exclude it"),
    (Kinds, {}, r"model: complex must be float64, .*, got complex64\[3\] on cpu"),
    (Kinds, {"exclude": ["complex"]}, "model: eighth must be float64, .*, got float8_e4m3fn"),
    (Kinds, {"include": ["layer"], "extra_trainable": ["complex"]}, "extra_trainable: complex must be float64"),
    (lambda: torch.zeros(3), {}, "model must be an nn.Module, got Tensor"),
    (lambda: nn.Linear, {}, "model must be an nn.Module, got type"),
    (lambda: torch.jit.script(nn.Linear(3, 3)), {}, "a ScriptModule cannot have computed weights"),
]


@pytest.mark.parametrize("number", range(len(TYPES)))
def test_types(number):
    make, options, message = TYPES[number]
    model = make()
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(TypeError, match=message):
        wx.Subspace(model, **{"dim": 5, **options})
    if before is not None and not isinstance(model, torch.jit.ScriptModule):
        assert_unchanged(model, before)


def test_what_can_be_left_out_may_be_of_any_kind():
    model = Kinds()
    sub = wx.Subspace(model, 5, exclude=["complex", "eighth"])
    assert set(sub.names) == {"layer.weight", "layer.bias"}
    model = devices()
    assert set(wx.Subspace(model, 5, include=["0.*"]).names) == {"0.weight", "0.bias"}


def test_twice():
    sub = wx.Subspace(seeded(Zoo), 9)
    x = torch.randint(0, 13, (2, 3))
    before = sub(x)
    classes = [type(m) for m in sub.model.modules()]
    sub.model.requires_grad_()
    with pytest.raises(ValueError, match=r"scale is computed already; exclude it, or wx.bake it first"):
        wx.Subspace(sub.model, 4)
    assert classes == [type(m) for m in sub.model.modules()]
    assert_close(sub(x), before, rtol=0, atol=0)


def test_a_subspace_of_a_subspace():
    sub = wx.Subspace(mlp(), 5)
    for model in (sub, nn.Sequential(sub)):
        with pytest.raises(ValueError, match="model has a Subspace already, whose coordinates is trained"):
            wx.Subspace(model, 2)
    assert sub.coordinates.requires_grad


def test_a_model_with_a_computed_weight():
    model = Conv()
    model.conv.weight = wx.ComputedParameter(model.conv.weight, wx.SpectralNorm())
    transform = model.conv.weight_transform
    with pytest.raises(ValueError, match=r"conv.weight is computed already; exclude it, or wx.bake it first"):
        wx.Subspace(model, 4)
    assert model.conv.weight_transform is transform and not wx.is_computed(model.head)
    assert all(p.requires_grad for p in model.parameters())
    sub = wx.Subspace(model, 4, exclude=["conv.weight"])
    sub(torch.randn(2, 2, 5, 5)).sum().backward()
    assert sub.coordinates.grad.abs().sum() > 0


def test_coordinates_that_are_not_finite():
    """They give weights that are not; no adapter is written of them (test_subspace_adapter.py)."""
    sub = wx.Subspace(mlp(), 5)
    with torch.no_grad():
        sub.coordinates[2] = float("nan")
    assert sub(torch.randn(1, 6)).isnan().any()
    sub.reset()
    assert sub(torch.randn(1, 6)).isfinite().all()


def test_a_failure_in_the_middle_leaves_nothing_behind():
    """The last of several layers is the one that cannot be wrapped."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(4, 3, max_norm=2.0))
    before = state_of(model)
    with pytest.raises(ValueError, match="max_norm"):
        wx.Subspace(model, 5)
    assert_unchanged(model, before)
    wx.Subspace(model, 5, exclude=["2"])
