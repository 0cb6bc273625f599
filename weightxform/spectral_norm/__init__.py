"""Spectral normalization: W / sigma(W), sigma by power iteration."""

from .module import SpectralNorm, spectral_norm

__all__ = ["SpectralNorm", "spectral_norm"]
