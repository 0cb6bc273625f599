"""weightxform: kernels for weights that are computed."""

from . import functional
from ._load import load_kernels
from .backends import backend, force_from_environment
from .spectral_norm import SpectralNorm, spectral_norm
from .transform import Transform

load_kernels()
force_from_environment()

__all__ = ["SpectralNorm", "Transform", "backend", "functional", "spectral_norm"]
