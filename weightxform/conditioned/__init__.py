"""Weights that follow a condition: warps, hypernetworks, and whole models with them."""

from .experts import Experts
from .hypernets import AffineHypernet, FilterMLP, LowRank
from .learned import Learned, LearnedResidual
from .permutations import Flip, Permute
from .steerable import Steerable
from .transform import FilterTransform, Warp
from .warps import Affine, Rotate, Scale, Shear

__all__ = [
    "Affine",
    "AffineHypernet",
    "Experts",
    "FilterMLP",
    "FilterTransform",
    "Flip",
    "Learned",
    "LearnedResidual",
    "LowRank",
    "Permute",
    "Rotate",
    "Scale",
    "Shear",
    "Steerable",
    "Warp",
]
