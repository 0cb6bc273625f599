"""Weights that follow a condition: warps, hypernetworks, and whole models with them."""

from .learned import Learned, LearnedResidual
from .transform import FilterTransform
from .warps import Rotate

__all__ = ["FilterTransform", "Learned", "LearnedResidual", "Rotate"]
