"""weightxform: kernels for weights that are computed."""

from . import functional, nn, subspace
from ._load import load_kernels
from ._version import __version__
from .backends import backend, force_from_environment
from .computed import ComputedParameter, assign, bake, invalidate, is_computed, raw, refresh, tie
from .conditioned import (
    Affine,
    AffineHypernet,
    Experts,
    FilterMLP,
    FilterTransform,
    Flip,
    Learned,
    LearnedResidual,
    LowRank,
    Permute,
    Rotate,
    Scale,
    Shear,
    Steerable,
)
from .conditioned.module import Conditioned
from .filter_warp.module import AdaptiveRotatedConv2d
from .grouping import constrain
from .info import info
from .modulation.module import ModulatedConv2d
from .spectral_norm import SpectralNorm, spectral_norm, torch_state_dict
from .subspace import Subspace, SubspaceProjection, intrinsic_dimension, project_gradients
from .transform import Transform
from .weight_norm import WeightNorm

load_kernels()
force_from_environment()

__all__ = [
    "AdaptiveRotatedConv2d",
    "Affine",
    "AffineHypernet",
    "ComputedParameter",
    "Conditioned",
    "Experts",
    "FilterMLP",
    "FilterTransform",
    "Flip",
    "Learned",
    "LearnedResidual",
    "LowRank",
    "ModulatedConv2d",
    "Permute",
    "Rotate",
    "Scale",
    "Shear",
    "SpectralNorm",
    "Steerable",
    "Subspace",
    "SubspaceProjection",
    "Transform",
    "WeightNorm",
    "__version__",
    "assign",
    "backend",
    "bake",
    "constrain",
    "functional",
    "info",
    "intrinsic_dimension",
    "invalidate",
    "is_computed",
    "nn",
    "project_gradients",
    "raw",
    "refresh",
    "spectral_norm",
    "subspace",
    "tie",
    "torch_state_dict",
]
