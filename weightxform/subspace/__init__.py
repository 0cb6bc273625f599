"""Weights in a subspace: theta = theta0 + P z with a P that is never stored."""

from . import op as _op  # the ops are there from the import on

__all__: list[str] = []
