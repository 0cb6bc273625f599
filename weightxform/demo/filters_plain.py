"""The same trainings in plain torch: new weights at each step, the frozen model by ``torch.func.functional_call``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def features(angle: Tensor, harmonics: int = 1) -> Tensor:
    """cos c, cos 2c, ..., sin c, sin 2c, ..."""
    angles = angle * torch.arange(1, harmonics + 1, dtype=angle.dtype)
    return torch.cat([angles.cos(), angles.sin()])


def rotated(weight: Tensor, angle: Tensor) -> Tensor:
    """[O, I, k, k] with its filters as the channels of an image."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero]).view(1, 2, 3)
    o, i, *size = weight.shape
    grid = F.affine_grid(theta, [1, o * i, *size], align_corners=True)
    return F.grid_sample(weight.view(1, o * i, *size), grid, align_corners=True).view(weight.shape)


class Turned(nn.Module):
    """The filter turned by the angle; nothing is trained."""

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        return rotated(weight, angle)


class Literal(nn.Module):
    """The question's own network: Linear([w, angle]) for each filter w."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        taps = weight.shape[2:].numel()
        self.linear = nn.Linear(taps + 1, taps, bias=False, dtype=weight.dtype)

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        filters = weight.flatten(2).flatten(0, 1)
        return self.linear(torch.cat([filters, angle.expand(len(filters), 1)], 1)).view(weight.shape)


class PerFilter(nn.Module):
    """w + s MLP(w / s, cos, sin) for each filter w; s is the root mean square of the layer's weight."""

    def __init__(self, weight: Tensor, hidden: int) -> None:
        super().__init__()
        taps = weight.shape[2:].numel()
        self.first = nn.Linear(taps + 2, hidden, dtype=weight.dtype)
        self.second = nn.Linear(hidden, taps, dtype=weight.dtype)
        self.scale = float(weight.square().mean().sqrt())

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        filters = weight.flatten(2).flatten(0, 1)
        with_angle = torch.cat([filters / self.scale, features(angle).expand(len(filters), 2)], 1)
        change = self.second(F.relu(self.first(with_angle)))
        return (filters + self.scale * change).view(weight.shape)


class Map(nn.Module):
    """A(c) = L [1, f] + MLP(f), K x K, with f the features of the angle; ``analytic`` adds the filter, turned."""

    def __init__(self, weight: Tensor, hidden: int, harmonics: int, analytic: bool) -> None:
        super().__init__()
        self.taps = taps = weight.shape[2:].numel()
        self.harmonics, self.analytic = harmonics, analytic

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(weight.new_zeros(shape))

        self.L = zeros(1 + 2 * harmonics, taps * taps)
        self.w1, self.b1, self.w2 = zeros(hidden, 2 * harmonics), zeros(hidden), zeros(taps * taps, hidden)

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        f = features(angle, self.harmonics)
        a = torch.cat([torch.ones_like(f[:1]), f]) @ self.L + self.w2 @ F.silu(self.w1 @ f + self.b1)
        out = (weight.flatten(2) @ a.view(self.taps, self.taps).T).view(weight.shape)
        return out + rotated(weight, angle) if self.analytic else out


class PlainConditioned(nn.Module):
    """``model`` with the weight of layer n computed by ``maps[n]``.

    Args:
        model: frozen.
        maps: layer name -> module (weight [O, I, *k], angle) -> weight.
        flattened: layer name -> (I, k, k), for a Linear.
    """

    def __init__(
        self, model: nn.Module, maps: dict[str, nn.Module], flattened: dict[str, tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.names = list(maps)
        self.maps = nn.ModuleList(maps.values())
        self.shapes: dict[str, Sequence[int]] = dict(flattened)

    def forward(self, images: Tensor, angle: float) -> Tensor:
        c = torch.tensor(angle, dtype=images.dtype)
        weights = {}
        for name, of_layer in zip(self.names, self.maps, strict=True):
            raw: Tensor = self.model.get_submodule(name).weight  # type: ignore[assignment]
            weight = raw.view(raw.shape[0], *self.shapes[name]) if name in self.shapes else raw
            weights[f"{name}.weight"] = of_layer(weight, c).view(raw.shape)
        return torch.func.functional_call(self.model, weights, (images,))
