"""AdaptiveRotatedConv2d: a convolution that turns its kernels by angles that it reads off its input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import per_sample
from .._torch import autocast_off, cast_by_autocast
from ..checks import require_bool, require_choice, require_int, require_positive
from ..numerics import opmath
from ..warp_matrix import function as warp_matrix
from ..warp_matrix.reference import INTERPOLATIONS, PADDINGS
from . import function as filter_warp


class Router(nn.Module):
    """Angles and gates [B, n] of images [B, C, H, W].

    A depthwise 3x3 convolution, a norm over each sample, relu, the mean over the image, and a linear map for each. An
    angle is ``max_angle softsign(z)``, or without a limit the angle of (1 + z_1, z_2), so that it begins near 0 and can
    turn for ever; a gate is ``sigmoid(z)``. Both in float32 or wider. A few channels, as of the first layer, become
    at least 16 features: the mean of one or three filtered images does not say how they lie.
    """

    def __init__(self, channels: int, n: int, max_angle: float | None, options: Any) -> None:
        super().__init__()
        self.n, self.max_angle = n, max_angle
        features = channels * math.ceil(16 / channels)
        self.depthwise = nn.Conv2d(channels, features, 3, padding=1, groups=channels, bias=False, **options)
        self.norm = nn.GroupNorm(1, features, **options)
        self.angle = nn.Linear(features, n if max_angle is not None else 2 * n, bias=max_angle is None, **options)
        self.gate = nn.Linear(features, n, **options)
        for head in (self.angle, self.gate):
            nn.init.trunc_normal_(head.weight, std=0.02)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.relu(self.norm(self.depthwise(x))).mean((2, 3))
        with autocast_off(x.device.type):  # a half type has 0.2 degrees at 90
            f = pooled.to(opmath(pooled.dtype))
            z, g = (F.linear(f, m.weight.to(f.dtype), _like(m.bias, f)) for m in (self.angle, self.gate))
            if self.max_angle is not None:
                return self.max_angle * F.softsign(z), g.sigmoid()
            real, imaginary = z.split(self.n, 1)
            return torch.atan2(imaginary, 1 + real), g.sigmoid()


def _like(bias: Tensor | None, f: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(f.dtype)


class AdaptiveRotatedConv2d(nn.Module):
    """A convolution with n kernels that turn by angles, and weigh in by gates, that are predicted for each sample.

    ``W'_b = sum over n of gate[b, n] rotated(W_n, angle[b, n])``; Pu et al., "Adaptive Rotated Convolution for Rotated
    Object Detection", ICCV 2023, for kernels of any size and, with ``max_angle=None``, the full circle.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``nn.Conv2d``.
        n_kernels: how many kernels there are.
        max_angle: in radians: no kernel turns further (the paper's 40 degrees); ``None``: the full circle.
        interpolation, padding_of_kernel: as ``interpolation`` and ``padding`` of :class:`weightxform.Rotate`. Bilinear
            with ``"border"`` is the paper's matrix, which holds for 3x3 taps and up to 45 degrees.
        router: a module that gives (angles [B, n], gates [B, n]) of x; ``None``: the paper's, :class:`Router`.
        device, dtype: of the parameters.

    Parameters: ``weight`` [n, O, I / groups, *kernel], ``bias`` [O], and those of ``router``.

    In a model that :class:`weightxform.Conditioned` is given it stays as it is, unless ``layers`` names the convolution
    of its router: its kernels follow its own input.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        n_kernels: int = 1,
        max_angle: float | None = math.radians(40),
        interpolation: str = "bilinear",
        padding_of_kernel: str = "border",
        router: nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "AdaptiveRotatedConv2d"
        for name, number in {
            "in_channels": in_channels, "out_channels": out_channels, "groups": groups, "n_kernels": n_kernels
        }.items():  # fmt: skip
            require_int(owner, name, number, 1)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{owner}: groups must divide {in_channels} and {out_channels}, got {groups}")
        require_bool(owner, "bias", bias)
        if max_angle is not None:
            require_positive(owner, "max_angle", max_angle)
        require_choice(owner, "interpolation", interpolation, INTERPOLATIONS)
        require_choice(owner, "padding_of_kernel", padding_of_kernel, PADDINGS)
        if router is not None and not isinstance(router, nn.Module):
            raise TypeError(f"{owner}: router must be an nn.Module or None, got {type(router).__name__}")
        self.in_channels, self.out_channels, self.groups, self.n_kernels = in_channels, out_channels, groups, n_kernels
        self.kernel_size = per_sample.pair(owner, "kernel_size", kernel_size, 1)
        self.stride = per_sample.pair(owner, "stride", stride, 1)
        self.dilation = per_sample.pair(owner, "dilation", dilation, 1)
        self.padding = per_sample.padding_of(owner, padding, self.stride)
        self.max_angle, self.interpolation, self.padding_of_kernel = max_angle, interpolation, padding_of_kernel
        options: Any = {"device": device, "dtype": dtype}
        shape = (n_kernels, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.router = Router(in_channels, n_kernels, max_angle, options) if router is None else router
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The kernels and the bias as ``nn.Conv2d`` begins."""
        bound = self.weight[0, 0].numel() ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"n_kernels={self.n_kernels}, max_angle={self.max_angle}"
        )

    def angles(self, x: Tensor) -> Tensor:
        """The angle [B, n] in radians, counterclockwise, by which each kernel is turned for each sample of x."""
        return self.routes(x)[0]

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(angles [B, n], gates [B, n]) of x [B, I, H, W]."""
        owner = "AdaptiveRotatedConv2d"
        per_sample.require_images(owner, x, self.in_channels, self.weight)
        angles, gates = self.router(x)
        for name, tensor in (("angles", angles), ("gates", gates)):
            if tuple(tensor.shape) != (x.shape[0], self.n_kernels):
                expected, got = [x.shape[0], self.n_kernels], list(tensor.shape)
                raise ValueError(f"{owner}: router must give {name} of shape {expected}, got {got}")
        return angles, gates

    def weights(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W' [B, O, I / groups, *kernel] for x [B, I, H, W]; in ``dtype``, or that of the weight."""
        angles, gates = self.routes(x)
        (height, width), (dy, dx) = self.kernel_size, self.dilation
        options = warp_matrix.Options(
            "rotate", height, width, float(dy), float(dx), self.interpolation, self.padding_of_kernel
        )
        wide, taps = opmath(self.weight.dtype), height * width
        with autocast_off(x.device.type):
            a = warp_matrix.apply(angles.to(wide).reshape(-1, 1), options).reshape(*angles.shape, taps, taps)
            a = a * gates.to(wide)[:, :, None, None]
            out = filter_warp.apply(self.weight.reshape(self.n_kernels, -1, taps), a, dtype)
        return out.reshape(x.shape[0], *self.weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """y [B, O, H', W'] of x [B, I, H, W]."""
        weights = self.weights(x, cast_by_autocast(self.weight))
        return per_sample.conv2d(x, weights, self.bias, self.stride, self.padding, self.dilation, self.groups)
