"""Weights that follow a condition: warps, hypernetworks, and whole models with them."""

from .learned import Learned, LearnedResidual
from .permutations import Flip, Permute
from .steerable import Steerable
from .transform import FilterTransform
from .warps import Affine, Rotate, Scale, Shear

__all__ = [
    "Affine",
    "FilterTransform",
    "Flip",
    "Learned",
    "LearnedResidual",
    "Permute",
    "Rotate",
    "Scale",
    "Shear",
    "Steerable",
]
