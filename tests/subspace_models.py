"""Small models and helpers of the subspace tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightxform.subspace.maps import ImplicitMap, Map
from weightxform.subspace.plan import make_plan
from weightxform.subspace.reference import KINDS

TOY = {"a.weight": 45, "a.bias": 5, "b.weight": 1980, "b.bias": 11, "c.weight": 33, "c.bias": 3, "one": 1}
SMALL = {"a.weight": 45, "a.bias": 5, "b.weight": 148, "b.bias": 11, "c": 1}
EXACT = {"rtol": 1e-11, "atol": 1e-12}
NAMES = ("block_hadamard", "one_hot", "sparse", "rademacher", "gaussian", "fastfood", "kronecker")
__all__ = ["KINDS", "NAMES"]


def implicit(kind: str, sizes: Mapping[str, int] = TOY, dim: int = 29, seed: int = 5, **options: object) -> ImplicitMap:
    return ImplicitMap(make_plan(kind, sizes, dim, seed, **options))


def zeros(p: Map, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.zeros(sizes[name], dtype=dtype) for name in p.names]


def matrix(p: Map, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64, step: Tensor | None = None) -> Tensor:
    """P as the room computes it, [D, d], in the order of ``p.names``."""
    eye = torch.eye(p.dim, dtype=dtype)
    parts = p.project(eye, zeros(p, sizes, dtype), range(len(p.names)), None, step)
    return torch.cat([part.flatten(1) for part in parts], 1).T


def apply(p: Map, sizes: Mapping[str, int], z: Tensor, step: Tensor | None = None) -> Tensor:
    """P z, [D]."""
    return torch.cat(p.project(z, zeros(p, sizes, z.dtype), range(len(p.names)), None, step))


def transpose(p: Map, sizes: Mapping[str, int], g: Tensor, step: Tensor | None = None) -> Tensor:
    """P' g, [d]."""
    return p.adjoint(g.split([sizes[name] for name in p.names]), range(len(p.names)), None, step)
