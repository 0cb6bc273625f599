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
        self.wide, self.small = nn.Linear(3, 3), nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.body = body

    def map(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(x).relu(), 3)

    def tokens(self, x: Tensor) -> Tensor:
        return self.map(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


X = torch.randn(4, 1, 7, 7)


def net(body: Any, features: int, **options: Any) -> wx.Conditioned:
    return wx.Conditioned(Traced(body, features).eval(), wx.Rotate(), sample=X, **options)


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
        (lambda m, x: m.fc(m.map(x).softmax(1).flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(m.map(x)[:].flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(m.map(x)[:, 1:, ..., :2].flatten(1)), 18, {"fc": (3, 3, 2)}),
        (lambda m, x: m.fc(m.map(x)[torch.tensor([1, 0])].flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(F.max_pool2d(m.map(x), 2, 1, return_indices=True)[0].flatten(1)), 16, {"fc": (4, 2, 2)}),
        (lambda m, x: m.fc(torch.cat([m.map(x), m.map(-x)], -3).flatten(1)), 72, {"fc": (8, 3, 3)}),
        (lambda m, x: m.fc(torch.cat(m.map(x).chunk(2, 1), 1).flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(torch.cat([m.map(x).flatten(1), m.map(-x).flatten(1)], -1)), 72, {"fc": (8, 3, 3)}),
        (lambda m, x: m.fc(m.map(x).flatten(2).flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(torch.where(x.mean() > 0, m.map(x), m.map(x)).flatten(1)), 36, {"fc": (4, 3, 3)}),
        (lambda m, x: m.fc(m.map(x).lerp(m.map(-x), 0.5).data.flatten(1)), 36, {"fc": (4, 3, 3)}),
        # its outputs are of no places
        (lambda m, x: m.fc(m.wide(m.map(x)).flatten(1)), 36, {}),
        # one number a channel is of no place
        (lambda m, x: m.fc(m.map(x).mean((2, 3))), 4, {}),
        (lambda m, x: m.fc(m.map(x).mean(3).mean(2)), 4, {}),
        (lambda m, x: m.fc(m.map(x).flatten(2).max(2).values), 4, {}),
        (lambda m, x: m.fc(m.map(x)[:, :, 0, 0]), 4, {}),
        (lambda m, x: m.fc(F.adaptive_avg_pool2d(m.map(x), 1).permute(0, 2, 3, 1).flatten(1)), 4, {}),
        (lambda m, x: m.fc((m.map(x) * m.map(x).mean((2, 3), keepdim=True)).mean((2, 3))), 4, {}),
        (
            lambda m, x: m.fc((m.map(x) * m.small(m.map(x).mean((2, 3)))[..., None, None]).flatten(1)),
            36,
            {"fc": (4, 3, 3)},
        ),
        # tokens and sequences
        (lambda m, x: m.fc(m.tokens(x)[:, 0]), 4, {}),
        (lambda m, x: m.fc(m.attend(m.tokens(x) + 1).flatten(1)), 36, {}),
        (lambda m, x: m.fc(m.attend(m.tokens(x)).mean(1)), 4, {}),
        (lambda m, x: m.fc(m.lstm(m.tokens(x))[0].flatten(1)), 36, {}),
        (lambda m, x: m.fc(m.small(m.tokens(x).reshape(-1, 4))), 4, {}),
    ],
)
def test_only_maps_in_their_order_are_found(body: Any, features: int, found: dict[str, Any]) -> None:
    """And of the rest there is no warning: it has no places."""
    conditioned = net(body, features)
    assert set(conditioned.names) == {"conv", *found}
    for name, shape in found.items():
        assert conditioned.model.get_submodule(name).weight_transform.shape == shape


@pytest.mark.parametrize(
    ("body", "features"),
    [
        (lambda m, x: m.fc(m.map(x).permute(0, 2, 3, 1).flatten(1)), 36),
        (lambda m, x: m.fc(m.map(x).transpose(2, 3).contiguous().view(len(x), 36)), 36),
        (lambda m, x: m.fc(m.tokens(x).reshape(len(x), -1).relu()), 36),
        (lambda m, x: m.fc(m.map(x).mT.flatten(1)), 36),
        (lambda m, x: m.fc(m.map(x).flatten(1)[:, torch.randperm(36)]), 36),
        (lambda m, x: m.fc(m.map(x).flatten(1).flip(1)), 36),
        (lambda m, x: m.fc(m.map(x).roll(1, 3).flatten(1)), 36),
        (lambda m, x: m.fc(torch.stack([m.map(x), m.map(-x)]).mean(0).flatten(1)), 36),
        (lambda m, x: m.fc(torch.cat([m.map(x).flatten(1), x.flatten(1)[:, :4]], 1)), 40),
        (lambda m, x: m.fc(torch.cat([m.map(x).flatten(1), m.small(m.map(x).mean((2, 3)))], 1)), 40),
        (lambda m, x: m.fc(m.map(x).flatten(1)) + m.fc(m.map(x).transpose(2, 3).flatten(1)), 36),
    ],
)
def test_a_map_in_another_order_is_told(body: Any, features: int) -> None:
    with pytest.warns(UserWarning, match=r"Conditioned: fc reads .* give flattened=\{'fc': \(channels"):
        assert net(body, features).names == ("conv",)
    if features == 36:
        assert net(body, features, flattened={"fc": (4, 3, 3)}).names == ("conv", "fc")
    assert net(body, features, layers=["conv"]).names == ("conv",)  # by hand: no question


def test_what_needs_no_kernel_is_not_told() -> None:
    model = Traced(lambda m, x: m.fc(m.map(x).permute(0, 2, 3, 1).flatten(1)), 36)
    assert wx.Conditioned(model, wx.LowRank(1), sample=X).names == ("conv",)


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(50, 3)

    def forward(self, batch: Any = None, time: Any = None) -> Tensor:
        x = batch["image"] if isinstance(batch, dict) else batch[0]
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.parametrize("sample", [({"image": X},), ([X],), [X], {"batch": {"image": X}}])
def test_samples_that_hold_tensors(sample: Any) -> None:
    assert wx.Conditioned(OfDict(), wx.Rotate(), sample=sample).names == ("conv", "fc")


def test_a_number_as_tensor_is_no_batch() -> None:
    net = wx.Conditioned(OfDict(), wx.Rotate(), sample={"time": torch.tensor(3.0), "batch": [X]})
    angles = torch.rand(4)
    assert torch.equal(net(time=torch.tensor(1.0), batch=[X], condition=angles), net([X], angles))
    with pytest.raises(ValueError, match=r"sample must have a batch axis, got float32\[\] on cpu"):
        wx.Conditioned(OfDict(), wx.Rotate(), sample=torch.tensor(3.0))
