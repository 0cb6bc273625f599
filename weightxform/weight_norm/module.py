"""WeightNorm: the transform."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..checks import require_dim, require_int
from ..numerics import opmath
from ..transform import Transform, describe, require_float
from . import reference
from .function import apply


class WeightNorm(Transform):
    """Gives every row of a weight a norm of its own that is learned (Salimans and Kingma 2016).

    The weight [..., h, ...] is read as a matrix [h, w], axis ``dim`` in front; row i becomes ``g[i] v[i] / |v[i]|``.
    At first ``g = |v|``, so that the computed weight is the one that was there.

    Args:
        dim: the axis whose slices have a norm each.

    Parameter: ``g`` [h], float32 for half weights, else of the weight's dtype. A row of zeros gives zeros and passes
    the gradient.

    Raises:
        TypeError, IndexError, ValueError: naming the argument, what it must be and what it was.
    """

    keeps_graph: ClassVar[bool] = True
    g: nn.Parameter | None

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        require_int("WeightNorm", "dim", dim)
        self.dim = dim
        self.register_parameter("g", None)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        require_float("WeightNorm", "the weight", raw)
        dim = require_dim("WeightNorm", self.dim, raw.ndim, describe(raw))
        if self.g is not None:
            raise ValueError("WeightNorm: this instance serves another weight already; give each weight its own")
        self.dim = dim
        self.g = nn.Parameter(self._norms(raw))

    def _norms(self, raw: Tensor) -> Tensor:
        with torch.no_grad():
            return reference.row_norms(raw.to(opmath(raw.dtype)), self.dim)

    def reset(self, raw: Tensor) -> None:
        """g = |raw|: the computed weight is ``raw`` itself."""
        assert self.g is not None
        self.g.data = self._norms(raw)

    def right_inverse(self, value: Tensor) -> Tensor:
        """``value`` itself; :meth:`reset` sets g."""
        return value

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        if self.g is None:
            raise RuntimeError("WeightNorm: not attached to a weight yet; use wx.ComputedParameter or attach(weight)")
        return apply(raw, self.g.to(opmath(raw.dtype)), self.dim, None)[0]
