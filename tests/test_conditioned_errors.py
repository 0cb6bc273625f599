"""wx.Conditioned: wrong arguments and conditions, each with its message and nothing changed; the subject's traps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import weightxform as wx


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()


X = torch.randn(4, 1, 6, 6)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, weights: Tensor, condition: Any) -> Any:
        return self.what(weights, condition)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module instance, got int"),
        ({"model": nn.Conv2d}, TypeError, "model must be an nn.Module instance, got Conv2d"),
        ({"transform": wx.Rotate}, TypeError, "transform must be an nn.Module instance, got Rotate"),
        ({"layers": "0"}, TypeError, "layers must be a list of patterns, got '0'"),
        ({"layers": [3]}, TypeError, "layers must be a list of patterns"),
        ({"layers": ["layer2.*"]}, ValueError, r"'layer2.\*' matches nothing; there are: 0, 4"),
        ({"layers": ["1"]}, ValueError, "1 is a BatchNorm2d with no spatial kernel"),
        ({"layers": ["4"]}, ValueError, "4 is a Linear with no spatial kernel: give sample=inputs, or flattened="),
        ({"flattened": {"4": (2, 4, 3)}}, ValueError, r"must have 32 elements, the layer's inputs, got \(2, 4, 3\)"),
        ({"flattened": {"0": (2, 4, 4)}}, ValueError, "'0' must be a Linear layer, got Conv2d"),
        ({"flattened": {"9": (2, 4, 4)}}, ValueError, "'9' must be a Linear layer, got no layer"),
        ({"flattened": {"4": (32,)}}, ValueError, r"must be \(channels, \*kernel\), got \(32,\)"),
        ({"flattened": [3]}, TypeError, "flattened must be a mapping"),
        ({"layers": ["0"], "flattened": {"4": (2, 4, 3)}}, ValueError, "must have 32 elements"),
        ({"sample": 3.0}, TypeError, "sample must be the model's inputs, with a Tensor among them, got 3.0"),
        ({"freeze": 1}, TypeError, "freeze must be a bool, got 1"),
        ({"deduplicate": None}, TypeError, "deduplicate must be a bool"),
        ({"form": "conv"}, ValueError, "form must be 'auto' or 'loop' or 'grouped' or 'activation', got 'conv'"),
        ({"cache_size": -1}, ValueError, "cache_size must be at least 0, got -1"),
        ({"model": nn.Sequential(nn.Linear(3, 3))}, ValueError, "model has no layer with a spatial kernel"),
        ({"model": nn.Sequential(nn.Conv1d(1, 1, 3))}, ValueError, "0: Rotate: .*two"),
        ({"model": nn.Sequential(nn.LazyConv2d(2, 3))}, ValueError, r"0\.weight is lazy, .*; run the model once first"),
        (
            {"transform": wx.Rotate(torch.ones((), requires_grad=True))},
            TypeError,
            "Rotate: angle must be an nn.Parameter",
        ),
        (
            {"transform": wx.Rotate() @ wx.Scale(torch.ones((), requires_grad=True).exp())},
            TypeError,
            "Scale: scale must",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = options.pop("model", None)
    model = cnn() if model is None else model
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        wx.Conditioned(model, options.pop("transform", wx.Rotate()), **options)
    if before is not None:
        assert list(model.state_dict()) == list(before)
        assert all(p.requires_grad for p in model.parameters())
        assert not any(wx.is_computed(m) for m in model.modules())
        assert all(type(m).__module__.startswith("torch.nn") for m in model.modules())


def test_a_weight_that_is_computed_already() -> None:
    model = cnn()
    model[0].weight = wx.ComputedParameter(model[0].weight, wx.SpectralNorm())
    with pytest.raises(ValueError, match=r"0\.weight is computed already; wx.bake it first"):
        wx.Conditioned(model, wx.Rotate())
    net = wx.Conditioned(cnn(), wx.Rotate())
    with pytest.raises(ValueError, match=r"0\.weight is computed already"):
        wx.Conditioned(net.model, wx.Rotate())


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"angle must be a number or \[4\] \(one a sample\), got float32\[3\]"),
        (torch.zeros(4, 1), ValueError, r"angle must be a number or \[4\]"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "angle must be real numbers"),
        (torch.zeros(4, dtype=torch.bool), TypeError, "angle must be real numbers"),
        (torch.zeros(4, device="meta"), ValueError, "angle must be on cpu as the model is"),
        (float("nan"), ValueError, "angle must be finite in float32, got nan"),
        (1e39, ValueError, r"angle must be finite in float32, got 1e\+39"),
        (10**400, ValueError, r"angle must be finite in float32, got 1000.*\.\.\."),
        (
            torch.tensor(0.0, device="meta"),
            ValueError,
            r"angle must be on cpu as the model is, got float32\[\] on meta",
        ),
        (torch.tensor([0.0, 1.0, float("nan"), 2.0]), ValueError, "angle must be finite, got nan"),
        (torch.tensor([0.0, float("inf"), 1.0, 2.0]), ValueError, "angle must be finite, got inf"),
        ("north", TypeError, "angle must be a number or a Tensor, got str"),
        (True, TypeError, "angle must be a number or a Tensor, got bool"),
        (None, TypeError, "angle must be a number or a Tensor, got NoneType"),
        ({}, ValueError, "the condition 'angle' is missing; got none"),
        ({"Angle": 1.0}, ValueError, "there is no condition 'Angle'; expected 'angle'"),
        ({1: 1.0}, TypeError, "the names of conditions must be strings, got 1"),
    ],
)
def test_wrong_conditions(condition: Any, error: type[Exception], message: str) -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    with pytest.raises(error, match=message):
        net(X, condition)
    assert torch.isfinite(net(X, 0.5)).all()


def test_a_scale_that_is_not_positive() -> None:
    net = wx.Conditioned(cnn(), wx.Scale())
    for wrong in (0.0, torch.tensor([1.0, 2.0, -0.5, 1.0])):
        with pytest.raises(ValueError, match=r"Conditioned: scale must be positive, got (0\.0|-0\.5)"):
            net(X, wrong)


def test_a_vector_for_all_of_a_transform_that_takes_any() -> None:
    net = wx.Conditioned(cnn(), Returns(lambda w, c: w * c.sum()))
    with pytest.raises(
        ValueError, match=r"condition must be a number, or \[1, \.\.\.\] \(one for all: condition\[None\]"
    ):
        net(X, torch.ones(3))
    net(X, torch.ones(3)[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.nn.utils.parametrizations.weight_norm, "parametrized; .*remove_parametrizations first"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "pruned; torch.nn.utils.prune.remove first"),
        (torch.nn.utils.spectral_norm, "made by .*; remove_spectral_norm first"),
    ],
)
def test_a_weight_that_is_no_parameter(make: Any, message: str) -> None:
    for path, options in (("0", {}), ("0", {"layers": ["0"]}), ("4", {"sample": X})):
        model = cnn()
        make(model.get_submodule(path))
        with pytest.raises(ValueError, match=rf"{path}\.weight is {message}; or leave the layer out with layers="):
            wx.Conditioned(model, wx.Rotate(), **options)
        others: dict[str, Any] = {"layers": ["0"]} if path == "4" else {"layers": ["4"], "flattened": {"4": (2, 4, 4)}}
        assert wx.Conditioned(model, wx.Rotate(), **others).names == tuple(others["layers"])


def test_flattened_layers_follow_in_any_case() -> None:
    assert wx.Conditioned(cnn(), wx.Rotate(), layers=["0"], flattened={"4": (2, 4, 4)}).names == ("0", "4")


def test_several_conditions_need_their_names() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate() @ wx.Rotate(condition="more"))
    with pytest.raises(ValueError, match="condition must be a mapping with 'angle' and 'more', got float"):
        net(X, 0.5)
    with pytest.raises(ValueError, match="'more' is missing"):
        net(X, {"angle": 0.5})
    net(X, {"angle": 0.5, "more": torch.rand(4)})


def test_a_transform_that_takes_none() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate(angle=torch.tensor(0.3)))
    assert net(X).shape == (4, 3)
    with pytest.raises(ValueError, match=r"the transform takes no condition, got 0\.5"):
        net(X, 0.5)
    with pytest.raises(ValueError, match=r"takes no condition, got float32\[4\] on cpu$"):
        net(X, torch.zeros(4))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda w, c: w[0], r"Returns must return a weight of shape \[2, 1, 3, 3\], got shape \[1, 3, 3\]"),
        (lambda w, c: None, "Returns must return a weight of shape .*, got NoneType"),
    ],
)
def test_a_transform_that_returns_another_shape(what: Any, message: str) -> None:
    net = wx.Conditioned(cnn(), Returns(what))
    with pytest.raises(ValueError, match=message):
        net(X, 0.5)


def test_no_condition_yet_and_a_batch_that_changes_inside() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    with pytest.raises(RuntimeError, match=r"no condition yet: call net\(inputs, condition\)"):
        net.model(X)
    with (
        net.at(torch.rand(3), batch=3),
        pytest.raises(RuntimeError, match="conditions for a batch of 3: the batch must"),
    ):
        net.model(X)
    with pytest.raises(ValueError, match="angle must be a number"):
        net.bake(torch.rand(4))


def test_a_form_that_is_not_there() -> None:
    net = wx.Conditioned(nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), wx.Rotate(), form="activation")
    with pytest.raises(RuntimeError, match="form='activation' is not there for Rotate on a ConvTranspose2d"):
        net(X, torch.rand(4))


def test_data_of_a_computed_weight() -> None:
    """The trap of the question: the assignment would cut the gradient and be lost."""
    net = wx.Conditioned(cnn(), wx.Rotate())
    with net.at(0.5):
        net.model[0].weight.data = torch.zeros(2, 1, 3, 3)
        with pytest.raises(
            RuntimeError, match=r"given another .data: no gradient goes through.*transform of wx.Conditioned\("
        ):
            net.model(X)


def test_a_frozen_base_in_the_optimizer() -> None:
    model = cnn()
    net = wx.Conditioned(model, wx.LearnedResidual())
    ours = list(net.transform_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = torch.optim.SGD(ours, 0.1)
        net(X, 0.5).sum().backward()
        optimizer.step()
        torch.optim.SGD(cnn().parameters(), 0.1).step()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"holds 6 parameters of the frozen base .* net.transform_parameters\(\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once
        net.unwrap()
        torch.optim.SGD(model.parameters(), 0.1).step()
