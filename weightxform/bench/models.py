"""The models whose weights are benchmarked, small enough to read; any room may use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(cin: int, cout: int, k: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)


class Residual(nn.Module):
    """conv-bn-relu ..., plus the input (He et al. 2016)."""

    def __init__(self, cin: int, widths: Sequence[int], kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        at_stride = kernels.index(3)
        ins = (cin, *widths[:-1])
        self.convs = nn.ModuleList(
            _conv(i, o, k, stride if n == at_stride else 1)
            for n, (i, o, k) in enumerate(zip(ins, widths, kernels, strict=True))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths)
        self.shortcut = _conv(cin, widths[-1], 1, stride) if stride > 1 or cin != widths[-1] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if n == 0 else F.relu(y)))
        return F.relu(y + self.shortcut(x))


def _resnet(depths: Sequence[int], bottleneck: bool) -> nn.Sequential:
    blocks: list[nn.Module] = [_conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    cin = 64
    for stage, depth in enumerate(depths):
        w = 64 << stage
        widths, kernels = ((w, w, 4 * w), (1, 3, 1)) if bottleneck else ((w, w), (3, 3))
        for n in range(depth):
            blocks.append(Residual(cin, widths, kernels, 2 if stage and n == 0 else 1))
            cin = widths[-1]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))


def resnet18() -> nn.Module:
    return _resnet((2, 2, 2, 2), False)


def resnet50() -> nn.Module:
    return _resnet((3, 4, 6, 3), True)


def sngan_discriminator() -> nn.Module:
    """The 32 x 32 network of Miyato et al. 2018, table 3."""
    parts: list[nn.Module] = []
    widths = 3, 64, 64, 128, 128, 256, 256, 512
    for n, (cin, cout) in enumerate(itertools.pairwise(widths)):
        parts += [nn.Conv2d(cin, cout, 3 + n % 2, 1 + n % 2, 1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512 * 4 * 4, 1))


class DownBlock(nn.Module):
    """relu-conv-relu-conv-pool, plus a 1 x 1 shortcut (Brock et al. 2019, figure 15)."""

    def __init__(self, cin: int, cout: int, pool: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()
        self.first = nn.Conv2d(cin, cout, 3, padding=1)
        self.second = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.second(F.relu(self.first(F.relu(x)))) + self.shortcut(x))


def biggan_discriminator(ch: int = 64) -> nn.Module:
    """The residual blocks of BigGAN's 128 x 128 discriminator; no attention, no classes."""
    widths = [3, ch, 2 * ch, 4 * ch, 8 * ch, 16 * ch, 16 * ch]
    blocks = [DownBlock(i, o, n < 5) for n, (i, o) in enumerate(itertools.pairwise(widths))]
    return nn.Sequential(*blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 * ch, 1))


class Block(nn.Module):
    """A pre-norm transformer block of four linear layers."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(depth: int = 12, d: int = 768, heads: int = 12) -> nn.Module:
    return nn.Sequential(*(Block(d, heads) for _ in range(depth)))


def mlp(depth: int = 64, d: int = 64) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(d, d), nn.ReLU())))


def linear(h: int, w: int) -> nn.Module:
    with torch.no_grad():
        return nn.Sequential(nn.Linear(w, h, bias=False))


def widths(total: int, count: int = 16) -> nn.Module:
    """``count`` linear layers with ``total`` weights together: squares, and the rest, a column."""
    side = math.isqrt(total // count)
    rest = total - (count - 1) * side * side
    parts = [nn.Linear(side, side, bias=False) for _ in range(count - 1)]
    return nn.Sequential(*parts, nn.Linear(1, rest, bias=False))
