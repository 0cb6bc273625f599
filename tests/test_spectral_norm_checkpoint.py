"""Checkpoints of torch's two spectral_norms load into ours, and ours into them."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from spectral_norm_layers import LAYERS, assert_same_state, input_for, make, norm_of, state_of, vectors, write
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import weightxform as wx

layer = pytest.mark.parametrize("layer", LAYERS)
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def hooks(module: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what old checkpoints were made with
        return torch.nn.utils.spectral_norm(module, name)


TORCH = {"parametrizations": parametrizations.spectral_norm, "hooks": hooks}
form = pytest.mark.parametrize("form", TORCH)


def trained(form: str, module: nn.Module) -> nn.Module:
    TORCH[form](module)
    for step in range(3):
        raw = module.weight_orig if form == "hooks" else module.parametrizations.weight.original
        with torch.no_grad():
            raw.add_(torch.randn(raw.shape, generator=torch.Generator().manual_seed(step)).to(raw), alpha=0.1)
        module(input_like(module))
    return module


def input_like(module: nn.Module) -> torch.Tensor:
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (4, module.in_features)
    else:
        shape = (2, module.in_channels, *(5,) * len(module.stride))
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(module.bias.dtype)


def ours(layer: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    module = make(layer, dtype, seed=5)
    module.weight = wx.ComputedParameter(module.weight, wx.SpectralNorm(**options))
    return module


@form
@layer
@pytest.mark.parametrize("assign", [False, True])
def test_torch_checkpoints_load_strictly(form, layer, assign):
    theirs = trained(form, make(layer))
    module = ours(layer)
    before = theirs.state_dict()
    keys = set(before)
    result = module.load_state_dict(before, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert set(before) == keys  # the caller's dict is as it was
    module.eval(), theirs.eval()
    assert_close(module(input_like(module)), theirs(input_like(theirs)), **EXACT)
    assert_close(vectors(module)[0], next(v for k, v in before.items() if k.endswith("_u")), **EXACT)


@form
def test_training_goes_on_as_torch(form):
    """train, eval, train, eval after loading, as the same module of torch goes on."""
    theirs = trained(form, make("conv2d"))
    module = ours("conv2d", order="v_first" if form == "hooks" else "u_first", cache=False)
    module.load_state_dict(theirs.state_dict())
    x = input_like(module)
    for training in (True, False, True, False):
        module.train(training), theirs.train(training)
        assert_close(module(x), theirs(x), **EXACT)


@form
@layer
def test_ours_loads_into_torch(form, layer):
    module = ours(layer)
    for step in range(3):
        write(module, seed=step)
        module(input_for(module))
    theirs = TORCH[form](make(layer, seed=6))
    checkpoint = wx.torch_state_dict(module, form)
    assert set(checkpoint) == set(theirs.state_dict())
    result = theirs.load_state_dict(checkpoint, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    module.eval(), theirs.eval()
    assert_close(theirs(input_like(theirs)), module(input_like(module)), **EXACT)


@form
def test_round_trip_of_a_model(form):
    model = nn.Sequential(make("conv2d"), nn.BatchNorm2d(5).double(), nn.Flatten(), nn.Linear(45, 3).double())
    twin = copy.deepcopy(model)
    wx.spectral_norm(model[0]), wx.spectral_norm(model[3])
    TORCH[form](twin[0]), TORCH[form](twin[3])
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model(x)
    before = state_of(model)
    checkpoint = wx.torch_state_dict(model, form)
    assert_same_state(model, before)
    twin.load_state_dict(checkpoint, strict=True)
    model.eval(), twin.eval()
    assert_close(twin(x), model(x), **EXACT)
    again = nn.Sequential(make("conv2d", seed=9), nn.BatchNorm2d(5).double(), nn.Flatten(), nn.Linear(45, 3).double())
    wx.spectral_norm(again[0]), wx.spectral_norm(again[3])
    again.load_state_dict(twin.state_dict(), strict=True)
    assert_same_state(again, before)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv_transpose2d"])
def test_hooks_of_version_none_have_their_v_solved_for(layer):
    """Before version 1 a checkpoint held the computed weight and no v; torch's own loader is the oracle."""
    source = trained("hooks", make(layer))
    old = OrderedDict((k, v.clone()) for k, v in source.state_dict().items() if not k.endswith("_v"))
    source.eval()
    source(input_like(source))
    old["weight"] = source.weight.detach().clone()
    expected = hooks(make(layer, seed=8))
    expected.load_state_dict(OrderedDict(old), strict=True)
    module = ours(layer)
    result = module.load_state_dict(old, strict=True)
    assert not result.missing_keys and "weight_orig" in old
    module.eval(), expected.eval()
    reference = expected(input_like(expected))
    assert_close(module(input_like(module)), reference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@form
def test_half_checkpoints_load_into_float32_state(form, dtype):
    theirs = trained(form, make("linear")).to(dtype).eval()
    module = ours("linear", dtype).eval()
    module.load_state_dict(theirs.state_dict(), strict=True)
    assert [x.dtype for x in vectors(module)] == [torch.float32] * 2
    assert norm_of(module.weight) == pytest.approx(1, abs=0.05)
    checkpoint = wx.torch_state_dict(module, form)
    assert {v.dtype for v in checkpoint.values()} == {dtype}


def test_a_vector_has_no_state_to_load():
    theirs = parametrizations.spectral_norm(make("linear"), "bias")
    module = wx.spectral_norm(make("linear", seed=5), "bias")
    module.load_state_dict(theirs.state_dict(), strict=True)
    assert_close(module.bias, theirs.bias, **EXACT)
    theirs.load_state_dict(wx.torch_state_dict(module), strict=True)
    with pytest.raises(ValueError, match="a vector under hooks: bias"):
        wx.torch_state_dict(module, "hooks")


def test_a_stacked_checkpoint_is_refused():
    theirs = parametrizations.spectral_norm(parametrizations.spectral_norm(make("linear")))
    module = ours("linear")
    before = state_of(module)
    with pytest.raises(RuntimeError, match="several parametrizations of this weight"):
        module.load_state_dict(theirs.state_dict(), strict=False)
    assert_same_state(module, before)


def test_checkpoints_of_something_else_are_reported():
    theirs = parametrizations.orthogonal(make("linear"))
    module = ours("linear")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*parametrizations.weight.original"):
        module.load_state_dict(theirs.state_dict())


def test_missing_and_superfluous_keys():
    checkpoint = trained("parametrizations", make("linear")).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*not_there"):
        ours("linear").load_state_dict({**checkpoint, "not_there": torch.ones(1)})
    for key in checkpoint:
        rest = {k: v for k, v in checkpoint.items() if k != key}
        result = ours("linear").load_state_dict(rest, strict=False)
        assert not [k for k in result.unexpected_keys if "_u" not in k and "_v" not in k]


def test_nested_prefixes_and_two_weights():
    def build(wrap):
        module = nn.Bilinear(3, 4, 5).double()
        wrap(module, "weight"), wrap(module, "bias")
        return nn.ModuleDict({"a": nn.Sequential(module)})

    theirs, module = build(parametrizations.spectral_norm), build(wx.spectral_norm)
    module.load_state_dict(theirs.state_dict(), strict=True)
    x, y = torch.randn(2, 3).double(), torch.randn(2, 4).double()
    module.eval(), theirs.eval()
    assert_close(module["a"][0](x, y), theirs["a"][0](x, y), **EXACT)
    assert set(wx.torch_state_dict(module)) == set(theirs.state_dict())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bound": 2.0}, "bound"),
        ({"gain": 2.0}, "gain"),
        ({"learn_gain": True}, "gain"),
        ({"operator": "conv", "input_size": (5, 5)}, "operator='conv'"),
    ],
)
def test_what_torch_cannot_say_is_refused(options, named):
    module = ours("conv2d", **options)
    before = state_of(module)
    with pytest.raises(ValueError, match=f"no {named}: weight"):
        wx.torch_state_dict(module)
    assert_same_state(module, before)


def test_a_model_with_nothing_of_ours_and_a_bad_format():
    model = make("linear")
    assert set(wx.torch_state_dict(model)) == {"weight", "bias"}
    with pytest.raises(ValueError, match="format must be 'parametrizations' or 'hooks', got 'onnx'"):
        wx.torch_state_dict(model, "onnx")


def test_parametrized_with_ours_keeps_its_own_keys():
    module = make("linear")
    parametrize.register_parametrization(module, "weight", wx.SpectralNorm())
    twin = make("linear", seed=5)
    parametrize.register_parametrization(twin, "weight", wx.SpectralNorm())
    twin.load_state_dict(module.state_dict(), strict=True)
    assert_close(twin.eval().weight, module.eval().weight, **EXACT)
