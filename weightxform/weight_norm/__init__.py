"""Weight normalization: g v / |v|, a norm for each output."""

from .module import WeightNorm

__all__ = ["WeightNorm"]
