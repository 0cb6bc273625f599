"""The matrices of affine warps of a kernel [h, w], in plain torch (``filter_warp`` applies them).

Tap p stands at (x_p, y_p) from the middle of the kernel, in taps, y downwards. The warped kernel has at p what the
kernel had at T (dx x_p, dy y_p, 1), with T [2, 3] in the units of the input and (dy, dx) the distance of two taps (the
dilation), interpolated between its taps as ``grid_sample(align_corners=True)`` does. In taps, from the first one:

    s_x[p] = (T00 dx x_p + T01 dy y_p + T02) / dx + (w - 1) / 2
    s_y[p] = (T10 dx x_p + T11 dy y_p + T12) / dy + (h - 1) / 2
    A[p, (i, j)] = Y[p, i] X[p, j]

X[p, j] is how much of the tap in column j there is at s_x[p]. With n = floor(s), f = s - n the taps n + t have the
coefficients

    bilinear   t = 0, 1:         1 - f, f
    bicubic    t = -1, 0, 1, 2:  Keys' cubic with a = -3/4 (Keys 1981, equation 4)

Taps outside the kernel count as zero (``"zeros"``) or as the nearest one inside (``"border"``); the row of a position
that is not finite is NaN. So

    ds_x[p] = sum over i, j of dA[p, (i, j)] Y[p, i] X'[p, j]      and the same for s_y,

X' with the derivatives of the coefficients in f: from the right where s is on a tap, as in ``grid_sample``. T follows
from the ``params`` of a kind:

    affine   T row by row
    rotate   (angle): [cos, -sin, 0; sin, cos, 0]: turns the kernel counterclockwise, as rot90 does for pi/2
    scale    (s_x, s_y): [1/s_x, 0, 0; 0, 1/s_y, 0]: enlarges
    shear    (m_x, m_y): [1, m_x, 0; m_y, 1, 0]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = {"affine": 6, "rotate": 1, "scale": 2, "shear": 2}  # how many numbers each has
INTERPOLATIONS = ("bilinear", "bicubic")
PADDINGS = ("zeros", "border")
MOST_TAPS = 4096  # along an axis: kernels count them in 32 bits


def matrix(params: Tensor, kind: str) -> Tensor:
    """T [B, 6], row by row."""
    zero, one = torch.zeros_like(params[:, 0]), torch.ones_like(params[:, 0])
    if kind == "rotate":
        cos, sin = params[:, 0].cos(), params[:, 0].sin()
        return torch.stack([cos, -sin, zero, sin, cos, zero], 1)
    if kind == "scale":
        return torch.stack([1 / params[:, 0], zero, zero, zero, 1 / params[:, 1], zero], 1)
    if kind == "shear":
        return torch.stack([one, params[:, 0], zero, params[:, 1], one, zero], 1)
    return params


def _of_params(dt: Tensor, params: Tensor, kind: str) -> Tensor:
    """dparams of dT [B, 6]."""
    if kind == "rotate":
        cos, sin = params[:, 0].cos(), params[:, 0].sin()
        return ((dt[:, 3] - dt[:, 1]) * cos - (dt[:, 0] + dt[:, 4]) * sin)[:, None]
    if kind == "scale":
        return -dt[:, [0, 4]] / params**2
    return dt[:, [1, 3]] if kind == "shear" else dt


def _per_tap(height: int, width: int, dy: float, dx: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """What T is multiplied with to give (s_x, s_y): two [3, K]."""
    options: Any = {"dtype": like.dtype, "device": like.device}
    y = (torch.arange(height, **options) - (height - 1) / 2)[:, None].expand(height, width).reshape(-1)
    x = (torch.arange(width, **options) - (width - 1) / 2).repeat(height)
    one = torch.ones_like(x)
    return torch.stack([x, y * (dy / dx), one / dx]), torch.stack([x * (dx / dy), y, one / dy])


def _coefficients(f: Tensor, interpolation: str) -> tuple[int, list[Tensor], list[Tensor]]:
    """(the first t, the coefficients, their derivatives)."""
    if interpolation == "bilinear":
        one = torch.ones_like(f)
        return 0, [1 - f, f], [-one, one]
    g = 1 - f
    values = [
        -0.75 * f * g * g,
        (1.25 * f - 2.25) * f * f + 1,
        (1.25 * g - 2.25) * g * g + 1,
        -0.75 * g * f * f,
    ]
    slopes = [
        -0.75 * g * (g - 2 * f),
        (3.75 * f - 4.5) * f,
        -(3.75 * g - 4.5) * g,
        -0.75 * f * (2 * g - f),
    ]
    return -1, values, slopes


def _along(s: Tensor, size: int, interpolation: str, padding: str) -> tuple[Tensor, Tensor]:
    """(X, X') of one axis, [B, K, size]."""
    n = s.detach().floor()
    first, values, slopes = _coefficients(s - n, interpolation)
    taps = torch.arange(size, dtype=s.dtype, device=s.device)
    rest = 0 * n[..., None]  # 0, but NaN where s is not finite
    of_values: Tensor = s.new_zeros(())
    of_slopes: Tensor = s.new_zeros(())
    for t, (value, slope) in enumerate(zip(values, slopes, strict=True), first):
        at = n + t
        hit = (at.clamp(0, size - 1) if padding == "border" else at)[..., None] == taps
        of_values = of_values + torch.where(hit, value[..., None], rest)
        of_slopes = of_slopes + torch.where(hit, slope[..., None], rest)
    return of_values, of_slopes


def _axes(params, kind, height, width, dy, dx, interpolation, padding):
    t = matrix(params, kind)
    to_x, to_y = _per_tap(height, width, dy, dx, params)
    x, dx_ds = _along(t[:, :3] @ to_x + (width - 1) / 2, width, interpolation, padding)
    y, dy_ds = _along(t[:, 3:] @ to_y + (height - 1) / 2, height, interpolation, padding)
    return x, dx_ds, y, dy_ds, to_x, to_y


def forward(
    params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str, padding: str
) -> Tensor:
    """A [B, K, K], K = height * width; differentiable to any order."""
    x, _, y, _, _, _ = _axes(params, kind, height, width, dy, dx, interpolation, padding)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def backward(
    grad: Tensor, params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str,
    padding: str,
) -> Tensor:  # fmt: skip
    """dparams, of the shape of ``params``; differentiable to any order."""
    x, dx_ds, y, dy_ds, to_x, to_y = _axes(params, kind, height, width, dy, dx, interpolation, padding)
    g = grad.unflatten(-1, (height, width))
    ds_x = (g * y[..., :, None] * dx_ds[..., None, :]).sum((-1, -2))
    ds_y = (g * dy_ds[..., :, None] * x[..., None, :]).sum((-1, -2))
    return _of_params(torch.cat([ds_x @ to_x.T, ds_y @ to_y.T], 1), params, kind)


def tangent(
    params_t: Tensor, params: Tensor, kind: str, height: int, width: int, dy: float, dx: float, interpolation: str,
    padding: str,
) -> Tensor:  # fmt: skip
    """The derivative of A along ``params_t``."""
    x, dx_ds, y, dy_ds, to_x, to_y = _axes(params, kind, height, width, dy, dx, interpolation, padding)
    cos, sin = params[:, 0].cos(), params[:, 0].sin()
    zero = torch.zeros_like(params[:, 0])
    if kind == "rotate":
        t = torch.stack([-sin, -cos, zero, cos, -sin, zero], 1) * params_t
    elif kind == "scale":
        rate = -params_t / params**2
        t = torch.stack([rate[:, 0], zero, zero, zero, rate[:, 1], zero], 1)
    elif kind == "shear":
        t = torch.stack([zero, params_t[:, 0], zero, params_t[:, 1], zero, zero], 1)
    else:
        t = params_t
    x_t, y_t = (t[:, :3] @ to_x)[..., None] * dx_ds, (t[:, 3:] @ to_y)[..., None] * dy_ds
    return (y_t[..., :, None] * x[..., None, :] + y[..., :, None] * x_t[..., None, :]).flatten(-2)
