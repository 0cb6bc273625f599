"""Convolutions in which each sample has its own weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ._torch import autocast_dtype
from .checks import require_int
from .transform import describe, require_float


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """y [B, O, ...] of x [B, I, H, W] and weight [B, O, I / groups, *kernel], in one call: a group for each sample."""
    batch, out = weight.shape[:2]
    if batch == 1:
        return F.conv2d(x, weight[0], bias, stride, padding, dilation, groups)
    if batch == 0:  # torch has no convolution with no groups
        return F.conv2d(x, weight.new_zeros(weight.shape[1:]), bias, stride, padding, dilation, groups)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    y = y.reshape(batch, out, *y.shape[2:])
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def pair(owner: str, name: str, value: object, least: int) -> tuple[int, int]:
    """An int or two of them as two; ``TypeError`` or ``ValueError`` for anything else."""
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{owner}: {name} must be an int or two of them, got {value!r}")
    for number in both:
        require_int(owner, name, number, least)
    return both[0], both[1]


def padding_of(owner: str, value: object, stride: tuple[int, int]) -> tuple[int, int] | str:
    """As torch's ``padding``: an int, two of them, ``"valid"`` or ``"same"``."""
    if isinstance(value, str):
        if value not in ("valid", "same") or (value == "same" and stride != (1, 1)):
            allowed = "'valid'" if stride != (1, 1) else "'valid' or 'same'"
            raise ValueError(f"{owner}: padding must be an int, two of them or {allowed}, got {value!r}")
        return value
    return pair(owner, "padding", value, 0)


def require_images(owner: str, x: object, channels: int, weight: Tensor) -> None:
    """Raise unless x is [B, channels, H, W], where ``weight`` is."""
    require_float(owner, "x", x)
    assert isinstance(x, Tensor)
    if x.ndim != 4 or x.shape[1] != channels or x.device != weight.device:
        raise ValueError(f"{owner}: x must be [B, {channels}, H, W] on {weight.device}, got {describe(x)}")
    if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(f"{owner}: x must be {weight.dtype} as the weight is, got {describe(x)}")
