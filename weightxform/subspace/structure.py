"""Which coordinates a weight follows: those of all weights, scaled for each one, or its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .maps import Map
from .plan import require_dim
from .projections import Learned, Projection
from .select import Member, initial_sigmas

STRUCTURES = ("shared", "said", "per_tensor")


def coordinates_of(chosen: Sequence[Member], dim: int, structure: str) -> int:
    """How many coordinates there are."""
    return sum(min(dim, m.parameter.numel()) for m in chosen) if structure == "per_tensor" else dim


def maps_of(
    chosen: Sequence[Member], dim: int, projection: Projection, seed: int, normalize: str, structure: str
) -> list[Map]:
    """P of all members, or for ``structure="per_tensor"`` one for each."""
    sizes = {m.name: m.parameter.numel() for m in chosen}
    if not projection.normalizes and normalize != "global":
        raise ValueError(f"Subspace: normalize must be 'global' for {projection.kind}, got {normalize!r}")
    sigmas = initial_sigmas(chosen)
    if structure != "per_tensor":
        return [projection.map_of(sizes, dim, seed, normalize, sigmas)]
    if isinstance(projection, Learned) or projection.kind in ("dense", "fastfood"):
        raise ValueError(f"Subspace: structure must be 'shared' or 'said' for {projection.kind}, got 'per_tensor'")
    if normalize != "global":
        raise ValueError(f"Subspace: normalize must be 'global' for structure='per_tensor', got {normalize!r}")
    require_dim(dim, sum(sizes.values()))
    dims = {n: min(dim, k) for n, k in sizes.items()}
    return [projection.within(dims[n]).map_of({n: k}, dims[n], seed, "global", sigmas) for n, k in sizes.items()]


def difference(text: bytes, described: dict[str, Any]) -> str | None:
    """Which entry of a description differs from that in ``text`` (JSON)."""
    try:
        theirs = json.loads(text)
    except ValueError:
        return "its description"
    if not isinstance(theirs, dict):
        return "its description"
    different = [key for key in (*described, *theirs) if key not in theirs or theirs[key] != described.get(key)]
    return different[0] if different else None
