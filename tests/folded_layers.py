"""Folded layers and their unfolded twins, for the tests of weightxform.nn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from computed_oracle import generator, randn, randn_like, unsettle
from torch import Tensor, nn

import weightxform as wx
from weightxform import nn as folding
from weightxform.numerics import relative_error

KINDS: dict[str, tuple[type[nn.Module], tuple, dict[str, Any], tuple[int, ...]]] = {  # class, arguments, input shape
    "rides": (nn.Linear, (20, 30), {}, (3, 20)),  # the rank-one term is a row of the operands
    "few_rows": (nn.Linear, (40, 30), {}, (3, 40)),  # the product itself is kept where x takes no gradient
    "batch_above_outputs": (nn.Linear, (20, 10), {}, (9, 20)),  # it is added to the product
    "batch_above_weight": (nn.Linear, (6, 4), {}, (50, 6)),  # <G, W> from the weight
    "one_row": (nn.Linear, (1, 7), {}, (3, 1)),
    "no_bias": (nn.Linear, (20, 30), {"bias": False}, (3, 20)),
    "many_axes": (nn.Linear, (20, 30), {}, (2, 1, 2, 20)),
    "vector": (nn.Linear, (20, 30), {}, (20,)),
    "empty_batch": (nn.Linear, (20, 30), {}, (0, 20)),
    "conv1d": (nn.Conv1d, (12, 14, 3), {"padding": 1}, (2, 12, 4)),
    "conv2d": (nn.Conv2d, (12, 14, 3), {"padding": 1}, (2, 12, 3, 4)),
    "conv3d": (nn.Conv3d, (6, 8, 3), {"padding": 1}, (1, 6, 3, 2, 3)),
    "conv_no_bias": (nn.Conv2d, (12, 14, 3), {"bias": False}, (2, 12, 4, 3)),
    "conv_unbatched": (nn.Conv2d, (12, 14, 3), {}, (12, 4, 3)),
    "conv_empty_batch": (nn.Conv2d, (12, 14, 3), {}, (0, 12, 4, 3)),
    "conv_strides": (
        nn.Conv2d, (12, 14, (3, 2)), {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 3)}, (2, 12, 4, 5),
    ),
    "conv_groups": (nn.Conv2d, (24, 24, 3), {"groups": 2, "padding": 1}, (2, 24, 3, 4)),
    "conv_same": (nn.Conv2d, (12, 14, (3, 4)), {"padding": "same"}, (2, 12, 3, 4)),
    "conv_valid": (nn.Conv2d, (12, 14, (3, 2)), {"padding": "valid"}, (2, 12, 3, 4)),
    "conv_circular": (nn.Conv2d, (12, 14, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 12, 3, 4)),
    "conv_reflect": (nn.Conv1d, (12, 14, 3), {"padding": 2, "padding_mode": "reflect"}, (2, 12, 4)),
    "conv_replicate": (nn.Conv3d, (6, 8, 3), {"padding": 1, "padding_mode": "replicate"}, (1, 6, 2, 3, 2)),
}  # fmt: skip
FOLDED = {nn.Linear: folding.SpectralLinear, nn.Conv1d: folding.SpectralConv1d}
FOLDED |= {nn.Conv2d: folding.SpectralConv2d, nn.Conv3d: folding.SpectralConv3d}


def unfolded(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A torch layer with a computed weight, u and v not converged."""
    cls, args, kwargs, _ = KINDS[kind]
    torch.manual_seed(0)
    layer = cls(*args, **kwargs, dtype=dtype)
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm(**options))
    return unsettle(layer)


def folded_twin(layer: nn.Module) -> nn.Module:
    """A copy that folds."""
    twin = copy.deepcopy(layer)
    assert folding.fold_layer(twin)
    return twin


def pair(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(folded, unfolded) with equal numbers."""
    layer = unfolded(kind, dtype, **options)
    return folded_twin(layer), layer


def linear(inputs: int = 20, outputs: int = 30, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return unsettle(wx.nn.SpectralLinear(inputs, outputs, dtype=dtype, **options))


def input_for(kind: str, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return randn(*KINDS[kind][3], seed=seed, dtype=dtype)


def upstream(y: Tensor, seed: int = 4) -> Tensor:
    """A random gradient of y with a part along it: <dy, y> does not cancel, and its error can be bounded."""
    return y.detach() + torch.randn(y.shape, generator=generator(seed), dtype=torch.float64).to(y.dtype)


def step(layer: nn.Module, x: Tensor, seed: int = 4, call: Any = None, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward, from a random gradient of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    y.backward(randn_like(y, seed) if dy is None else dy)
    grads = {f"d {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def update(layer: nn.Module) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert list(actual) == list(expected), f"{list(actual)} and {list(expected)}"
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert relative_error(actual[name], value) <= tolerance, name


@pytest.fixture(autouse=True)
def small_ones_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SMALLEST", 0)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a layer ran folded: one entry a forward."""
    calls: list[str] = []
    apply = folding.folded.apply

    def counted(*args: Any) -> Tensor:
        calls.append("numbers" if args[-1] is not None else "tensors")
        return apply(*args)

    monkeypatch.setattr(folding.folded, "apply", counted)
    return calls


@pytest.fixture(params=["numbers", "tensors"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the CPU a matrix product takes its factors as numbers; elsewhere as tensors."""
    if request.param == "tensors":
        real = folding._apply
        monkeypatch.setattr(folding, "_apply", lambda layer, x, dtype, _, conv: real(layer, x, dtype, False, conv))
    return request.param
