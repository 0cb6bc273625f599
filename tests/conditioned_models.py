"""The model of the tests of wx.Conditioned, and what plain torch makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightxform as wx


class Digits(nn.Module):
    """Two convolutions, the second grouped and strided, batch normalization, and a Linear on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 5)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.point(torch.relu(self.second(x))), 2)
        return self.fc(self.drop(torch.flatten(x, 1)))


def turned(weight: Tensor, angle: Tensor) -> Tensor:
    """[O, I, k, k], by grid_sample."""
    zero = torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = F.affine_grid(theta[None], [1, 1, *weight.shape[2:]], align_corners=True)
    flat = weight.reshape(1, -1, *weight.shape[2:])
    return F.grid_sample(flat, grid, align_corners=True).reshape(weight.shape)


def plain(model: nn.Module, x: Tensor, angles: Tensor) -> Tensor:
    """``model`` with its kernels turned, one sample after the other."""
    weights = dict(model.named_parameters())
    outs = []
    for k, angle in enumerate(angles):
        bent = dict(weights)
        for name in ("first.weight", "second.weight"):
            bent[name] = turned(weights[name], angle)
        bent["fc.weight"] = turned(weights["fc.weight"].reshape(5, 4, 3, 3), angle).reshape(5, 36)
        outs.append(torch.func.functional_call(model, bent, (x[k : k + 1],)))
    return torch.cat(outs)


@pytest.fixture
def digits() -> nn.Module:
    torch.manual_seed(0)
    model = Digits().double()
    model(torch.randn(16, 1, 17, 17, dtype=torch.float64))  # statistics
    return model.eval()


def inputs(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 17, 17, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64) * 6 - 3


def conditioned(model: nn.Module, **options: Any) -> wx.Conditioned:
    return wx.Conditioned(copy.deepcopy(model), wx.Rotate(), sample=inputs(2)[0], **options)
