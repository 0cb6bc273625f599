"""What a small network is told of a condition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import outside_autocast
from ..checks import require_int
from .transform import Conditions, numbers


class Features(NamedTuple):
    """Of an angle the cosines and sines of its multiples; else the numbers themselves."""

    owner: str
    condition: str | None
    size: int | None  # how many numbers; None: one, without an axis
    harmonics: int | None

    @staticmethod
    def checked(owner: str, condition: object, size: object, harmonics: object) -> Features:
        """Raises ``TypeError`` or ``ValueError`` for what does not fit together."""
        if condition is not None and not isinstance(condition, str):
            raise TypeError(f"{owner}: condition must be the name of a condition or None, got {condition!r}")
        if size is not None:
            require_int(owner, "size", size, 1)
        if harmonics is not None:
            require_int(owner, "harmonics", harmonics, 1)
            if size is not None:
                raise ValueError(
                    f"{owner}: size must be None where harmonics are taken of an angle, got {size}; "
                    "harmonics=None takes the numbers as they are"
                )
        return Features(owner, condition, size, harmonics)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one condition."""
        return () if self.size is None else (self.size,)

    @property
    def width(self) -> int:
        return self.size or 1 if self.harmonics is None else 2 * self.harmonics

    def of(self, conditions: Conditions, like: Tensor) -> Tensor:
        """[C, width] in the opmath dtype of ``like``: cos c, cos 2c, ..., sin c, sin 2c, ..., or the numbers."""
        c = numbers(self.owner, conditions, self.condition, self.shape, like)
        if self.harmonics is None:
            return c.reshape(c.shape[0], self.width)
        angles = c[:, None] * torch.arange(1, self.harmonics + 1, dtype=c.dtype, device=c.device)
        return torch.cat([angles.cos(), angles.sin()], 1)


class Net(nn.Module):
    """A linear map of n features, or with ``hidden`` units (silu) two; computed in the dtype of the features.

    ``zero``: the outputs are zero at first.
    """

    def __init__(self, n: int, hidden: int, outputs: int, options: Any, zero: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(n, hidden, **options) if hidden else None
        self.last = nn.Linear(hidden or n, outputs, **options)
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    @outside_autocast
    def forward(self, f: Tensor) -> Tensor:
        if self.first is not None:
            f = F.silu(F.linear(f, self.first.weight.to(f.dtype), self.first.bias.to(f.dtype)))
        return F.linear(f, self.last.weight.to(f.dtype), self.last.bias.to(f.dtype))
