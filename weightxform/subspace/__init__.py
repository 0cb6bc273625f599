"""Weights in a subspace: theta = theta0 + P z with a P that is never stored."""

from . import op

__all__ = ["op"]
