"""Every transform that follows a condition, once, for what holds for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weightxform.conditioned import (
    Affine,
    AffineHypernet,
    Experts,
    FilterMLP,
    FilterTransform,
    Flip,
    Learned,
    LearnedResidual,
    LowRank,
    Permute,
    Rotate,
    Scale,
    Shear,
    Steerable,
)

D = torch.float64


class Entry(NamedTuple):
    make: Callable[[], FilterTransform]
    conditions: Callable[[], dict[str, Tensor]]  # C = 3


def _angle() -> dict[str, Tensor]:
    return {"angle": torch.tensor([0.3, -1.1, 2.5], dtype=D)}


def _scale() -> dict[str, Tensor]:
    return {"scale": torch.tensor([0.8, 1.3, 1.1], dtype=D)}


def _vector() -> dict[str, Tensor]:
    return {"c": torch.randn(3, 2, dtype=D)}


def _affine() -> dict[str, Tensor]:
    return {"matrix": torch.eye(2, 3, dtype=D) + 0.2 * torch.randn(3, 2, 3, dtype=D)}


def _factors() -> dict[str, Tensor]:
    sizes = {"expert": 2, "spatial": 9, "input": 2, "output": 3}
    return {name: torch.rand(3, n, dtype=D) for name, n in sizes.items()}


ZOO: dict[str, Entry] = {
    "rotate": Entry(Rotate, _angle),
    "rotate_bicubic": Entry(lambda: Rotate(interpolation="bicubic", padding="border"), _angle),
    "scale": Entry(Scale, _scale),
    "scale_xy": Entry(lambda: Scale(isotropic=False), lambda: {"scale": torch.rand(3, 2, dtype=D) + 0.6}),
    "shear": Entry(Shear, lambda: {"shear": torch.rand(3, 2, dtype=D) - 0.5}),
    "affine": Entry(Affine, _affine),
    "flip": Entry(lambda: Flip(-1, "how_much"), lambda: {"how_much": torch.tensor([0.0, 0.3, 1.0], dtype=D)}),
    "permute": Entry(lambda: Permute("orn8"), lambda: {"index": torch.tensor([0, 3, 7])}),
    "steerable": Entry(Steerable, _angle),
    "steerable_keep": Entry(lambda: Steerable(residual="keep"), _angle),
    "learned": Entry(lambda: Learned(hidden=5), _angle),
    "learned_raw": Entry(lambda: Learned(size=2, harmonics=None, hidden=0), _vector),
    "residual": Entry(lambda: LearnedResidual(hidden=5), _angle),
    "rotate_and_residual": Entry(lambda: Rotate() + LearnedResidual(hidden=5), _angle),
    "flip_of_rotated": Entry(lambda: Flip(0) @ Rotate(), _angle),
    "filter_mlp": Entry(lambda: FilterMLP(hidden=7, activation="silu"), _angle),
    "filter_mlp_alone": Entry(lambda: FilterMLP(hidden=7, size=2, harmonics=None, residual=False), _vector),
    "low_rank": Entry(lambda: LowRank(2, hidden=4), _angle),
    "hypernet": Entry(lambda: AffineHypernet(hidden=4), _angle),
    "experts": Entry(lambda: Experts(3), lambda: {"r": torch.rand(3, 3, dtype=D)}),
    "experts_factors": Entry(lambda: Experts(2, ("expert", "spatial", "input", "output")), _factors),
    "experts_net": Entry(lambda: Experts(3, ("expert", "input"), size=2, hidden=4), _vector),
    "mixed_sum": Entry(lambda: Rotate() + LowRank(2) + FilterMLP(hidden=5, activation="tanh"), _angle),
    "mixed_chain": Entry(lambda: Rotate() @ LowRank(2), _angle),
    "hypernet_of_rotated": Entry(lambda: FilterMLP(hidden=5, activation="silu") @ Rotate(), _angle),
}


def shaken(transform: FilterTransform) -> FilterTransform:
    """With parameters that are not those of the beginning, where much is zero."""
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return transform


def attached(name: str, layer: nn.Module) -> FilterTransform:
    transform = ZOO[name].make()
    transform.attach(layer.weight, layer)
    return shaken(transform)


def conv(dtype: torch.dtype = D, **options) -> nn.Conv2d:
    return nn.Conv2d(2, 3, 3, dtype=dtype, **options)


def turned(t: Tensor, weight: Tensor, d: tuple[float, float] = (1, 1), interpolation="bilinear", padding="zeros"):
    """The kernels of ``weight`` [O, I, h, w] sampled at ``t`` [2, 3] by torch's ``grid_sample``; d = (dy, dx)."""
    height, width = weight.shape[2:]
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=t.dtype) - (height - 1) / 2) * d[0],
        (torch.arange(width, dtype=t.dtype) - (width - 1) / 2) * d[1],
        indexing="ij",
    )
    at = torch.stack([x, y, torch.ones_like(x)], -1) @ t.T  # of the input: x and y
    grid = at / torch.tensor([d[1] * (width - 1) / 2, d[0] * (height - 1) / 2], dtype=t.dtype)
    images = weight.flatten(0, 1)[:, None]
    sampled = nn.functional.grid_sample(
        images, grid.expand(len(images), -1, -1, -1), interpolation, padding, align_corners=True
    )
    return sampled.reshape(weight.shape)


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0]], dtype=D)
