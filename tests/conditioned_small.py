"""A small model for the tests of wx.Conditioned, and what it gives in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightxform as wx

F64 = torch.float64
X = torch.randn(4, 1, 7, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
ANGLES = torch.tensor([0.1, 0.9, -1.2, 2.0], dtype=F64)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3)).double().eval()


def turned(weight: Tensor, angle: Tensor) -> Tensor:
    zero = torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = F.affine_grid(theta[None], [1, 1, *weight.shape[2:]], align_corners=True)
    flat = weight.reshape(1, -1, *weight.shape[2:])
    return F.grid_sample(flat, grid, align_corners=True).reshape(weight.shape)


def plain(model: nn.Module, x: Tensor, angles: Any) -> Tensor:
    """``model`` with its kernels turned, one sample after the other."""
    angles = torch.as_tensor(angles, dtype=F64)
    outs = []
    for k, angle in enumerate(angles.expand(len(x))):
        bent = {n: turned(p, angle) if p.ndim == 4 else p for n, p in model.named_parameters()}
        outs.append(torch.func.functional_call(model, bent, (x[k : k + 1],)))
    return torch.cat(outs)


def learning(model: nn.Module | None = None, **options: Any) -> wx.Conditioned:
    net = wx.Conditioned(cnn() if model is None else model, wx.Rotate() + wx.LearnedResidual(), **options)
    generator = torch.Generator().manual_seed(0)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    return net


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
        return weights * torch.exp(self.rate * condition)
