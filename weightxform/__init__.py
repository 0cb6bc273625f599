"""weightxform: kernels for weights that are computed."""

from . import functional
from ._load import load_kernels
from ._version import __version__
from .backends import backend, force_from_environment
from .info import info
from .spectral_norm import SpectralNorm, spectral_norm, torch_state_dict
from .transform import Transform

load_kernels()
force_from_environment()

__all__ = [
    "SpectralNorm",
    "Transform",
    "__version__",
    "backend",
    "functional",
    "info",
    "spectral_norm",
    "torch_state_dict",
]
