"""The task of the filters pillar: small CNNs that learn upright digits, and digits turned by twelve angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .subspace_task import Digits, split

BATCH = 64
RATE = 3e-3  # the highest of a run, of the upright training
ANGLES = tuple(math.radians(30 * k) for k in range(12))

Classifier = Callable[[Tensor, float], Tensor]  # images, angle -> logits


@dataclass(frozen=True)
class Head:
    """``reference``: mean accuracies over the angles that others measured, by the names of ``filters_rows``."""

    name: str
    flattened: dict[str, tuple[int, int, int]]
    reference: dict[str, float]

    def make(self, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return flat() if self.flattened else pooled()


def _conv(into: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 5, padding=2), nn.ReLU()]


def pooled() -> nn.Sequential:
    """Three convolutions, and the mean over what is left of the image: 65,354 weights."""
    return nn.Sequential(
        *_conv(1, 16), nn.MaxPool2d(2), *_conv(16, 32), nn.MaxPool2d(2), *_conv(32, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def flat() -> nn.Sequential:
    """Two convolutions and a Linear that reads their 32 maps of 7 x 7: rows of filters, which must turn as well."""
    return nn.Sequential(
        *_conv(1, 16), nn.MaxPool2d(2), *_conv(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 10)
    )


_ROWS = "frozen", "oracle", "analytic", "literal", "mlp", "learned", "residual"
POOLED = Head("global pooling", {}, dict(zip(_ROWS, (35.2, 95.1, 90.1, 46.6, 59.9, 79.5, 94.6), strict=True)))
FLAT = Head(
    "flatten", {"7": (32, 7, 7)}, dict(zip(_ROWS, (36.9, 98.0, 97.2, 76.1, 86.3, 95.6, 97.6), strict=True))
)  # fmt: skip


def turn(images: Tensor, angle: Tensor | float) -> Tensor:
    """Counterclockwise, bilinear. ``angle``: radians, one for all or [n]."""
    angle = torch.as_tensor(angle, dtype=images.dtype, device=images.device).expand(len(images))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_upright(model: nn.Module, digits: Digits, steps: int, seed: int) -> nn.Module:
    """Adam, one cycle of the rate."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(digits), (BATCH,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(digits.images[index]), digits.labels[index]).backward()
        optimizer.step()
        cycle.step()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracies(classify: Classifier, digits: Digits) -> list[float]:
    """In percent, at each of ``ANGLES``."""
    found = []
    for angle in ANGLES:
        right = classify(turn(digits.images, angle), angle).argmax(1) == digits.labels
        found.append(100 * float(right.double().mean()))
    return found


def oracle(model: nn.Module) -> Classifier:
    """The image is turned back: nothing that knows the angle can be expected to do better."""
    return lambda images, angle: model(turn(images, -angle))


__all__ = ["ANGLES", "BATCH", "FLAT", "POOLED", "Classifier", "Digits", "Head", "accuracies", "oracle", "split", "turn"]
