"""The baselines: each transform as one writes it in plain torch, from its formula. All are differentiable in any dtype.

``weight`` is [O, I, k, k]; C conditions give [C, O, I, k, k].
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import weightxform as wx

EPS = 1e-8


def rotation(angle: Tensor) -> Tensor:
    """[C] -> [C, 2, 3]."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], -1).view(-1, 2, 3)


def scaling(factors: Tensor) -> Tensor:
    """[C, 2] -> [C, 2, 3]."""
    x, y = (1 / factors).unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([x, zero, zero, zero, y, zero], -1).view(-1, 2, 3)


def shearing(slopes: Tensor) -> Tensor:
    """[C, 2] -> [C, 2, 3]."""
    x, y = slopes.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([one, x, zero, y, one, zero], -1).view(-1, 2, 3)


def grid_sample(weight: Tensor, theta: Tensor, padding: str) -> Tensor:
    """The filters as O * I channels of an image. ``theta``: [C, 2, 3], translations in taps."""
    o, i, *size = weight.shape
    half = (size[-1] - 1) / 2  # of the kernel's width: grid_sample's coordinates run from -1 to 1
    theta = torch.cat([theta[..., :2], theta[..., 2:] / half], -1)
    grid = F.affine_grid(theta, [len(theta), o * i, *size], align_corners=True)
    images = weight.view(1, o * i, *size).expand(len(theta), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=True).view(-1, o, i, *size)


def warp_matrix(theta: Tensor, k: int, padding: str) -> Tensor:
    """A [C, k * k, k * k] of bilinear warps: phi(s_x - x_q) phi(s_y - y_q) with phi(t) = max(0, 1 - |t|)."""
    line = torch.arange(k, dtype=theta.dtype, device=theta.device) - (k - 1) / 2
    y, x = (t.flatten() for t in torch.meshgrid(line, line, indexing="ij"))
    s = theta @ torch.stack([x, y, torch.ones_like(x)])
    if padding == "border":
        s = s.clamp(-(k - 1) / 2, (k - 1) / 2)
    s_x, s_y = s.unbind(1)
    return (1 - (s_x[..., None] - x).abs()).clamp_min(0) * (1 - (s_y[..., None] - y).abs()).clamp_min(0)


def matmul(weight: Tensor, matrix: Tensor) -> Tensor:
    """W A' for each of A [C, K, K]."""
    taps = matrix.shape[-1]
    return torch.matmul(weight.view(-1, taps), matrix.transpose(1, 2)).view(len(matrix), *weight.shape)


def arc_matrix(angle: Tensor) -> Tensor:
    """[C, 9, 9] of 3 x 3 kernels in ARC's closed form (Pu et al., ICCV 2023), right to 45 degrees either way.

    A corner and the edge after it are written down; the other rows follow by quarter turns of the kernel.
    """
    x, y = angle.cos(), angle.sin()
    a, b, c = x - y, x * y, x + y
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    left = {0: {0: a, 1: 1 - a}, 1: {1: x - b, 2: b, 4: 1 - c + b, 5: y - b}, 4: {4: one}}
    right = {0: {0: c, 3: 1 - c}, 1: {0: -b, 1: x + b, 3: b - y, 4: 1 - a - b}, 4: {4: one}}
    turn = (2, 5, 8, 1, 4, 7, 0, 3, 6)  # where a quarter turn takes each tap
    both = []
    for rows in (left, right):
        for p in (0, 2, 8, 1, 5, 7):
            rows[turn[p]] = {turn[q]: entry for q, entry in rows[p].items()}
        both.append(torch.stack([torch.stack([rows[p].get(q, zero) for q in range(9)], -1) for p in range(9)], -2))
    return torch.where((angle >= 0)[:, None, None], both[0], both[1])


def arc(weight: Tensor, angle: Tensor) -> Tensor:
    """The taps first, as ARC has them: [9, O I], turned for each sample, then brought into the order of a kernel."""
    o, i, k, _ = weight.shape
    taps_first = weight.permute(2, 3, 0, 1).reshape(k * k, o * i)
    turned = torch.matmul(arc_matrix(angle), taps_first)
    return turned.view(-1, k, k, o, i).permute(0, 3, 4, 1, 2).contiguous()


def modulated(weight: Tensor, style: Tensor) -> Tensor:
    """A factor for each sample and input channel."""
    return weight[None] * style[:, None, :, None, None]


def demodulated(weight: Tensor, style: Tensor) -> Tensor:
    """StyleGAN2 (Karras et al. 2020, equations 1 and 3)."""
    w = weight[None] * style[:, None, :, None, None]
    d = (w.square().sum((2, 3, 4)) + EPS).rsqrt()
    return w * d[:, :, None, None, None]


def filter_mlp(weight: Tensor, condition: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """w + MLP([w, c]) for every filter w of k * k taps."""
    taps = weight.shape[2:].numel()
    filters = weight.view(1, -1, taps).expand(len(condition), -1, -1)
    conditions = condition[:, None].expand(-1, filters.shape[1], -1)
    hidden = F.relu(F.linear(torch.cat([filters, conditions], -1), w1, b1))
    return (filters + F.linear(hidden, w2, b2)).view(-1, *weight.shape)


def experts(weight: Tensor, routing: Tensor) -> Tensor:
    """sum over e of r_e W_e (CondConv, Yang et al. 2019). ``weight``: [E, O, I, k, k]."""
    return (routing @ weight.flatten(1)).view(-1, *weight.shape[1:])


def low_rank(weight: Tensor, params: Tensor, u: Tensor, v: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """W + U diag(g) V with U [O, r], V [r, I k k], g a linear map of the condition."""
    gains = F.linear(params, gain, bias)
    return weight + ((u * gains[:, None, :]) @ v).view(-1, *weight.shape)


def affine_hypernet(weight: Tensor, params: Tensor, rows: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """W + h H, with h hidden units of the condition."""
    return weight + (F.silu(F.linear(params, w1, b1)) @ rows).view(-1, *weight.shape)


def flipped(weight: Tensor, params: Tensor) -> Tensor:
    """(1 - c) W + c W, mirrored."""
    c = params[:, None, None, None, None]
    return (1 - c) * weight + c * weight.flip(-1)


def quarters(weight: Tensor, params: Tensor) -> Tensor:
    """W after 0 to 3 quarter turns."""
    return torch.stack([weight.rot90(int(k), (2, 3)) for k in params.tolist()])


@functools.cache
def _harmonics(k: int, dtype: torch.dtype) -> Tensor:
    """Of 1, cos, ..., sin, ..., and of what the harmonics cannot hold, [., K, K]: found once, as a user would."""
    steerable = wx.Steerable()
    steerable.attach(torch.empty(1, 1, k, k, dtype=dtype))
    assert steerable.constants is not None
    return steerable.constants.view(-1, k * k, k * k)


def steered(weight: Tensor, params: Tensor) -> Tensor:
    """The harmonics turned exactly, the rest bilinearly."""
    k = weight.shape[-1]
    *constants, rest = _harmonics(k, weight.dtype).to(weight.device).unbind()
    multiples = params[:, None] * torch.arange(1, len(constants) // 2 + 1, dtype=params.dtype, device=params.device)
    of_angle = torch.cat([torch.ones_like(params)[:, None], multiples.cos(), multiples.sin()], 1)
    steering = torch.einsum("cm,mpq->cpq", of_angle, torch.stack(constants))
    return matmul(weight, steering + warp_matrix(rotation(params), k, "zeros") @ rest)
