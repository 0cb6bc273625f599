"""What a layer gives with another weight than its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def respond(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``layer``, a Linear or a convolution, gives with this weight, of any number of output channels."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight.flatten(1), bias)
    return layer._conv_forward(x, weight, bias)


def over_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """[..., channels] so that it fits the activations of ``layer``: [..., channels, 1, 1], or for a Linear as it is."""
    return values if isinstance(layer, nn.Linear) else values.reshape(*values.shape, *[1] * len(layer.kernel_size))  # type: ignore[arg-type]


def responds(layer: nn.Module) -> bool:
    """Whether :func:`respond` knows this kind of layer."""
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
