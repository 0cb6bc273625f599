"""What a projection of given tensors is made of: keys, order, column counts and scales. On the host, in float64."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox as draw
from .reference import FASTFOOD, TILED, Row, runs, stratum, tile_scale, windows

VERSION = 1
TILE = 4096
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The qualified name of a parameter without what DDP, FSDP, torch.compile and checkpoint wrappers put in it."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), last])


def tensor_key(seed: int, kind: str, name: str) -> draw.Key:
    """The 64-bit key of a tensor: of its name, not of its place, so that other tensors may come and go."""
    what = b"weightxform.subspace\0" + struct.pack("<Iq", VERSION, seed) + kind.encode() + b"\0" + name.encode()
    return struct.unpack("<II", hashlib.sha256(what).digest()[:8])


def in_order(names: Sequence[str]) -> list[int]:
    """The canonical order of tensors: by the bytes of their names."""
    return sorted(range(len(names)), key=lambda i: names[i].encode())


def require_dim(dim: int, total: int) -> None:
    """Raise ``ValueError`` unless there are from 1 to D coordinates."""
    if not 1 <= dim <= total:
        raise ValueError(f"Subspace: dim must be from 1 to {total}, the elements of the tensors, got {dim}")


@dataclass(frozen=True, eq=False)
class Plan:
    """An implicit projection of named tensors. ``layout`` to ``packed`` are arguments of the ops, see ``reference.py``.

    Attributes:
        names, sizes: of the tensors, in canonical order.
        dim: d.
        counts: N_k [d], how often each column is read (weighted with the squared factors); ``None`` for kinds without.
        c: [d], float64: the scale of each column; ``None`` for ones.
    """

    kind: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dim: int
    layout: Tensor
    factors: Tensor
    tile: int
    strata: int
    packed: bool
    counts: Tensor | None
    c: Tensor | None

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def columns_in(self, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
        """``c`` as a kernel wants it."""
        return None if self.c is None else self.c.to(device, dtype)


def make_plan(
    kind: str,
    tensors: Mapping[str, int],
    dim: int,
    seed: int = 0,
    *,
    tile: int = TILE,
    columns: str = "auto",
    normalize: str = "global",
    sigmas: Mapping[str, float] | None = None,
    nonzeros: int | None = None,
    key_kind: str | None = None,
) -> Plan:
    """The projection of ``tensors`` (names and numbers of elements).

    Args:
        kind: one of ``reference.KINDS``.
        dim: d, from 1 to D.
        tile: a power of two from 64 to 16384.
        columns: ``"name"``: which columns a block reads depends on the tensor's own name; ``"packed"``: windows follow
            one another through all tensors, so that every column is read for every d up to D; ``"auto"``: by name if
            some tensor has d elements or more.
        normalize: ``"global"``: columns of norm 1 over all tensors; ``"per_tensor"``: over each one; ``"init"``: rows
            in proportion to ``sigmas``, columns of norm 1.
        sigmas: of each tensor, for ``"init"``.
        nonzeros: in a row of ``sparse``; default d/sqrt(D), at least 1.
        key_kind: what goes into the keys in the place of ``kind``.

    Raises:
        ValueError: ``dim`` out of range, two equal keys, a column that no tensor reads.
    """
    names = [list(tensors)[i] for i in in_order(list(tensors))]
    sizes = [tensors[name] for name in names]
    total = sum(sizes)
    require_dim(dim, total)
    if columns == "auto":
        columns = "name" if max(sizes) >= dim else "packed"
    if kind in FASTFOOD:
        keys = [tensor_key(seed, "fastfood", "")] * len(names)
    else:
        keys = [tensor_key(seed, key_kind or kind.removesuffix("_unsigned"), name) for name in names]
        if len(set(keys)) < len(keys):
            raise ValueError("Subspace: two tensors have the same key; rename one, or take another seed")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    layout = torch.tensor([[n, g, *key] for n, g, key in zip(sizes, starts, keys, strict=True)], dtype=torch.int64)
    strata = (nonzeros or max(1, round(dim / math.sqrt(total)))) if kind == "sparse" else 1
    if not 1 <= strata <= dim:
        raise ValueError(f"Subspace: nonzeros must be from 1 to dim = {dim}, got {strata}")

    a = [1.0] * len(names)
    if normalize == "init":
        assert sigmas is not None
        mean = math.sqrt(sum(n * sigmas[name] ** 2 for n, name in zip(sizes, names, strict=True)) / total)
        a = [sigmas[name] / mean for name in names]
    elif normalize == "per_tensor":
        a = [math.sqrt((dim / strata if kind in TILED else total) / n) for n in sizes]
    factors = torch.tensor(a, dtype=torch.float64)
    packed = columns == "packed"
    counts = c = None
    if kind in TILED:
        counts = _counts(layout, factors, dim, tile, strata, packed)
        if normalize != "per_tensor":
            if not bool((counts > 0).all()):
                missing = int((counts == 0).sum())
                raise ValueError(
                    f"Subspace: columns='name' leaves {missing} of {dim} coordinates without a weight, because no "
                    f"tensor has {dim} elements; take columns='packed' or 'auto', or a smaller dim"
                )
            c = 1 / counts.sqrt()
    else:
        factors = factors * tile_scale(kind, total, dim)
    return Plan(kind, tuple(names), tuple(sizes), dim, layout, factors, tile, strata, packed, counts, c)


def _counts(layout: Tensor, factors: Tensor, dim: int, tile: int, strata: int, packed: bool) -> Tensor:
    """N_k = sum over blocks of factor^2 [column k is read], in O(blocks + d): integers for each tensor first."""
    total = torch.zeros(dim, dtype=torch.float64)
    for member, factor in enumerate(factors.tolist()):
        row = Row.of(layout, member)
        counts = torch.zeros(dim, dtype=torch.int64)
        for r in range(strata):
            low, high = stratum(dim, strata, r)
            counts[low:high] = _counts_of(row, high - low, tile, packed, r)
        total += factor**2 * counts.double()
    return total


def _counts_of(row: Row, width: int, tile: int, packed: bool, r: int) -> Tensor:
    steps = torch.zeros(2 * width + 1, dtype=torch.int64)  # of the counts, unrolled once around the circle
    everywhere = 0
    for run in runs(row.numel, tile, 0, row.numel):
        whole, rest = divmod(run.length, width)
        everywhere += whole * len(run.starts)
        o = windows(run.starts, row.key, row.start, width, tile, packed, r)
        ones = torch.ones_like(o)
        steps.index_add_(0, o, ones).index_add_(0, o + rest, -ones)
    counts = steps.cumsum(0)
    return counts[:width] + counts[width : 2 * width] + everywhere
