"""Spectral normalization: W / sigma(W), sigma by power iteration."""

from .checkpoint import torch_state_dict
from .drop_in import spectral_norm
from .module import SpectralNorm

__all__ = ["SpectralNorm", "spectral_norm", "torch_state_dict"]
