"""Spectral normalization: W / sigma(W), sigma by power iteration."""

from .checkpoint import torch_state_dict
from .module import SpectralNorm, spectral_norm

__all__ = ["SpectralNorm", "spectral_norm", "torch_state_dict"]
