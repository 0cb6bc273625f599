"""ModulatedConv2d: a convolution whose input channels a style scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import per_sample
from .._torch import autocast_off, cast_by_autocast
from ..checks import require_bool, require_choice, require_int, require_positive
from ..numerics import opmath
from ..transform import describe, require_float
from . import function

FORMS = ("auto", "materialised", "activation")


def _with_rms_1(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x`` over its root mean square; zeros stay zeros."""
    squares = x.square().mean(axes, keepdim=True)
    return x * squares.where(squares > 0, 1).rsqrt()


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels a style scales, for each sample; each output's filter then has norm 1.

    ``W'[b, o, i, p] = W[o, i, p] s[b, i] d[b, o]`` with ``s = affine(style)`` and ``d`` the inverse norm over i and p
    (Karras et al. 2020, equations 1 and 3; ``weightxform/modulation/reference.py``).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as ``nn.Conv2d``.
        style_features: how many numbers a style has.
        demodulate: divide by the norm.
        form: ``"materialised"``: a weight for each sample, and one convolution with a group for each. ``"activation"``:
            ``d conv(s x, W)``, one convolution for all, and no weight for each sample. ``"auto"``: the latter, but for
            one sample or few channels. The numbers are the same.
        eps: added to the square of the norm.
        prenormalize: ``"rms"``: first divide each output's filter and each sample's s by its root mean square, as
            StyleGAN3 (which takes one of s for the batch), so that eps is small beside it; zeros stay zeros. It needs
            ``demodulate``.
        device, dtype: of the parameters.

    Parameters: ``weight`` [O, I, *kernel], ``bias`` [O], ``affine`` (a Linear; its bias is 1 at first). s and d are in
    float32 or wider, and a half type is kept in range: the filters and s are scaled to norm and size 1 at most before,
    and the output back.

    In a model that :class:`weightxform.Conditioned` is given it stays as it is: its weight follows the style.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        style_features: int,
        demodulate: bool = True,
        form: str = "auto",
        eps: float = 1e-8,
        prenormalize: str | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "ModulatedConv2d"
        for name, number in {
            "in_channels": in_channels, "out_channels": out_channels, "style_features": style_features
        }.items():  # fmt: skip
            require_int(owner, name, number, 1)
        require_bool(owner, "demodulate", demodulate)
        require_choice(owner, "form", form, FORMS)
        require_positive(owner, "eps", eps)
        if prenormalize is not None:
            require_choice(owner, "prenormalize", prenormalize, ("rms",))
            if not demodulate:
                raise ValueError(f"{owner}: prenormalize must be None without demodulate, got {prenormalize!r}")
        require_bool(owner, "bias", bias)
        self.in_channels, self.out_channels, self.style_features = in_channels, out_channels, style_features
        self.kernel_size = per_sample.pair(owner, "kernel_size", kernel_size, 1)
        self.stride = per_sample.pair(owner, "stride", stride, 1)
        self.dilation = per_sample.pair(owner, "dilation", dilation, 1)
        self.padding = per_sample.padding_of(owner, padding, self.stride)
        self.demodulate, self.form, self.eps, self.prenormalize = demodulate, form, eps, prenormalize
        options: Any = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.affine = nn.Linear(style_features, in_channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Filters of norm 1 on average, no bias, and styles of 1 for a style vector of zeros."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.affine.reset_parameters()
        nn.init.ones_(self.affine.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"style_features={self.style_features}, demodulate={self.demodulate}, form={self.form!r}, "
            f"prenormalize={self.prenormalize!r}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}"
        )

    def styles(self, style: Tensor) -> Tensor:
        """s [B, I] of styles [B, style_features], float32 or wider."""
        require_float("ModulatedConv2d", "style", style)
        if style.ndim != 2 or style.shape[1] != self.style_features or style.device != self.weight.device:
            expected = f"[B, {self.style_features}] on {self.weight.device}"
            raise ValueError(f"ModulatedConv2d: style must be {expected}, got {describe(style)}")
        with autocast_off(style.device.type):
            wide = opmath(self.weight.dtype)
            return F.linear(style.to(wide), self.affine.weight.to(wide), self.affine.bias.to(wide))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """y [B, O, H', W'] of x [B, I, H, W] and style [B, style_features]."""
        per_sample.require_images("ModulatedConv2d", x, self.in_channels, self.weight)
        s = self.styles(style)
        if s.shape[0] != x.shape[0]:
            raise ValueError(
                f"ModulatedConv2d: style must have a row for each of {x.shape[0]} images, got {s.shape[0]}"
            )
        dtype = cast_by_autocast(self.weight) or self.weight.dtype
        weight: Tensor = self.weight
        with autocast_off(x.device.type):
            if self.prenormalize == "rms":
                weight, s = _with_rms_1(weight.to(s.dtype), (1, 2, 3)), _with_rms_1(s, (1,))
            form = self._form(x) if self.form == "auto" else self.form
            y = (self._activation if form == "activation" else self._materialised)(x.to(dtype), weight, s)
            return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _form(self, x: Tensor) -> str:
        """One sample is a plain convolution either way; and with few channels (measured on a CPU: 16, forward and
        backward) the scaling of the activations weighs more than that groups are slower than one convolution."""
        few = max(self.in_channels, self.out_channels) <= 16
        return "materialised" if x.shape[0] == 1 or few else "activation"

    def _materialised(self, x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        flat = weight.flatten(2)
        weights = function.apply(flat, s, self.demodulate, self.eps, x.dtype).reshape(-1, *weight.shape)
        return per_sample.conv2d(x, weights, None, self.stride, self.padding, self.dilation, 1)

    def _activation(self, x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        after: Tensor | None = None
        if self.demodulate:
            energy = weight.flatten(2).to(s.dtype).square().sum(2)
            after = torch.addmm(s.new_full((1, 1), self.eps), s.square(), energy.T).rsqrt()  # d [B, O]
        if x.dtype != s.dtype:  # a half type: no s is larger than 1 in the convolution, no filter has a larger norm
            with torch.no_grad():
                of_s, of_w = s.abs().amax(1, keepdim=True), weight.abs().amax((1, 2, 3)).to(s.dtype)
                of_w = of_w * weight[0].numel() ** 0.5
                of_s, of_w = of_s.where(of_s > 0, 1), of_w.where(of_w > 0, 1)
            s, weight = s / of_s, weight.to(s.dtype) / of_w[:, None, None, None]
            after = of_s * of_w if after is None else after * of_s * of_w
        y = F.conv2d(
            x * s.to(x.dtype)[:, :, None, None], weight.to(x.dtype), None, self.stride, self.padding, self.dilation
        )
        return y if after is None else (y * after[:, :, None, None]).to(y.dtype)  # after may be beyond a half type
