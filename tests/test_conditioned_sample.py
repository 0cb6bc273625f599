"""wx.Conditioned(sample=...): which Linear layers read a flattened map in its order, and so have kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightxform as wx


class Traced(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.fc, self.square = nn.Conv2d(1, 4, 3), nn.Linear(features, 5), nn.Linear(36, 36)
        self.body = body

    def map(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(x).relu(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    ("body", "features", "found"),
    [
        (lambda m, x: m.fc(m.map(x).view(len(x), -1)), 36, {"fc": (4, 3, 3)}),
        (
            lambda m, x: m.fc(F.dropout(m.map(x.to(memory_format=torch.channels_last)).flatten(1))),
            36,
            {"fc": (4, 3, 3)},
        ),
        (lambda m, x: m.fc(torch.cat([m.map(x), m.map(-x)], 1).flatten(1)), 72, {"fc": (8, 3, 3)}),
        (lambda m, x: m.fc((m.map(x) + m.map(-x)).sigmoid().flatten(1) * 2), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(m.square(m.map(x).flatten(1)).relu()), 36, {"square": (4, 3, 3)}),
        (lambda m, x: m.fc(m.map(x).permute(0, 2, 3, 1).flatten(1)), 36, {}),
        (lambda m, x: m.fc(m.map(x).transpose(2, 3).contiguous().view(len(x), 36)), 36, {}),
        (lambda m, x: m.fc(m.map(x).flatten(2).transpose(1, 2).reshape(len(x), -1)), 36, {}),
        (lambda m, x: m.fc(m.map(x).flatten(1)[:, torch.randperm(36)]), 36, {}),
        (lambda m, x: m.fc(m.map(x).flatten(1).flip(1)), 36, {}),
        (lambda m, x: m.fc(torch.cat([m.map(x).flatten(1), x.flatten(1)[:, :4]], 1)), 40, {}),
        (lambda m, x: m.fc(m.map(x).flatten(1)) + m.fc(m.map(x).transpose(2, 3).flatten(1)), 36, {}),
        (lambda m, x: m.fc(m.map(x).mean((2, 3))), 4, {}),
    ],
)
def test_only_maps_in_their_order_are_found(body: Any, features: int, found: dict[str, Any]) -> None:
    model = Traced(body, features).eval()
    assert set(wx.Conditioned(model, wx.Rotate(), sample=torch.randn(4, 1, 7, 7)).names) == {"conv", *found}
    for name, shape in found.items():
        assert model.get_submodule(name).weight_transform.shape == shape
