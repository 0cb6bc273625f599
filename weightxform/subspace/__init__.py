"""Weights in a subspace: theta = theta0 + P z with a P that is never stored. See ``reference.py`` for the maths."""

from .dimension import IntrinsicDimension, intrinsic_dimension
from .gradients import SubspaceProjection, project_gradients
from .module import Subspace
from .projections import (
    BlockHadamard,
    Dense,
    Fastfood,
    Gaussian,
    Kronecker,
    Learned,
    OneHot,
    Projection,
    Rademacher,
    Sparse,
)

__all__ = [
    "BlockHadamard",
    "Dense",
    "Fastfood",
    "Gaussian",
    "IntrinsicDimension",
    "Kronecker",
    "Learned",
    "OneHot",
    "Projection",
    "Rademacher",
    "Sparse",
    "Subspace",
    "SubspaceProjection",
    "intrinsic_dimension",
    "project_gradients",
]
