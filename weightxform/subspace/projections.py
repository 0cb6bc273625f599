"""The projections by name: what a user chooses, and how a :class:`~.maps.Map` of a model's tensors is made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import require_bool, require_choice, require_int
from ..transform import describe, require_float
from .maps import ImplicitMap, KroneckerMap, Map, StoredMap
from .plan import TILE, in_order, make_plan, require_dim

NORMALIZE = ("global", "per_tensor", "init")


class Projection(ABC):
    """Base class: which P. ``map_of`` makes it for named tensors."""

    kind: ClassVar[str]
    redraws: ClassVar[bool] = True  # whether there is another P for every step
    normalizes: ClassVar[bool] = True
    shards: ClassVar[bool] = True  # whether a rank can compute its own rows alone

    @abstractmethod
    def map_of(self, sizes: Mapping[str, int], dim: int, seed: int, normalize: str, sigmas: Mapping[str, float]) -> Map:
        """``sizes``: elements of each tensor, in the order of the model."""

    def within(self, dim: int) -> Projection:
        """The same for a tensor that has only ``dim`` coordinates of its own."""
        return self

    def options(self) -> dict[str, Any]:
        """What an adapter file says of it, besides its kind."""
        return {}


class _Implicit(Projection):
    def _kind(self) -> str:
        return self.kind

    def _plan_options(self) -> dict[str, Any]:
        return {}

    def map_of(self, sizes: Mapping[str, int], dim: int, seed: int, normalize: str, sigmas: Mapping[str, float]) -> Map:
        options = self._plan_options()
        return ImplicitMap(make_plan(self._kind(), sizes, dim, seed, normalize=normalize, sigmas=sigmas, **options))


@dataclass(frozen=True)
class _Tiled(_Implicit):
    """``tile``: a power of two from 64 to 16384; ``columns``: see :func:`~.plan.make_plan`."""

    tile: int = TILE
    columns: str = "auto"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_int(owner, "tile", self.tile)
        if self.tile not in (64 << k for k in range(9)):
            raise ValueError(f"{owner}: tile must be a power of two from 64 to 16384, got {self.tile}")
        require_choice(owner, "columns", self.columns, ("auto", "name", "packed"))

    def _plan_options(self) -> dict[str, Any]:
        return {"tile": self.tile, "columns": self.columns}

    def options(self) -> dict[str, Any]:
        return {"tile": self.tile, "columns": self.columns}


@dataclass(frozen=True)
class BlockHadamard(_Tiled):
    """Each tile of a weight is a signed Hadamard transform of a window of z: exactly isometric for every d and D.

    Every weight depends on min(tile, d) coordinates. One pass over memory; the default.
    """

    kind: ClassVar[str] = "block_hadamard"


@dataclass(frozen=True)
class OneHot(_Tiled):
    """Each weight follows one coordinate, up to a sign: exactly isometric, and the cheapest.

    Args:
        signed: ``False`` leaves the signs out (Uni-LoRA, Li et al. 2025; HashedNets, Chen et al. 2015).
    """

    kind: ClassVar[str] = "one_hot"
    signed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("OneHot", "signed", self.signed)

    def _kind(self) -> str:
        return "one_hot" if self.signed else "one_hot_unsigned"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "form": "signed" if self.signed else "unsigned"}


@dataclass(frozen=True)
class Sparse(_Tiled):
    """A few signed entries in each row, one in each stratum of columns; density 1/sqrt(D) (Li, Hastie, Church 2006).

    Args:
        nonzeros: in a row; default d/sqrt(D), at least 1.
    """

    kind: ClassVar[str] = "sparse"
    nonzeros: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonzeros is not None:
            require_int("Sparse", "nonzeros", self.nonzeros, 1)

    def within(self, dim: int) -> Sparse:
        return self if self.nonzeros is None else replace(self, nonzeros=min(self.nonzeros, dim))

    def _plan_options(self) -> dict[str, Any]:
        return {**super()._plan_options(), "nonzeros": self.nonzeros}

    def options(self) -> dict[str, Any]:
        return {**super().options(), "K": self.nonzeros}


@dataclass(frozen=True)
class Rademacher(_Implicit):
    """Independent signs over sqrt(D). Time grows with D d."""

    kind: ClassVar[str] = "rademacher"


@dataclass(frozen=True)
class Gaussian(_Implicit):
    """Independent, nearly normal entries of variance 1/D: centred sums of 31 coins, exact in floating point.

    Kurtosis 2.94, no entry beyond 5.57 standard deviations. Time grows with D d.
    """

    kind: ClassVar[str] = "gaussian"


@dataclass(frozen=True)
class Fastfood(_Implicit):
    """H G Pi H B (Le, Sarlos, Smola 2013), for comparison with the literature; ``BlockHadamard`` is faster and exact.

    Args:
        form: ``"global"``: one transform over all weights (Li et al. 2018); ``"stacked"``: independent blocks of the
            next power of two of d.
        diagonal: G, ``"sign"`` or ``"binomial"`` (nearly normal, as published).

    Unlike those of the other kinds its entries depend on all the tensors, and it cannot be sharded.
    """

    kind: ClassVar[str] = "fastfood"
    shards: ClassVar[bool] = False
    form: str = "global"
    diagonal: str = "sign"

    def __post_init__(self) -> None:
        require_choice("Fastfood", "form", self.form, ("global", "stacked"))
        require_choice("Fastfood", "diagonal", self.diagonal, ("sign", "binomial"))

    def _kind(self) -> str:
        return f"fastfood_{self.form}_{self.diagonal}"

    def map_of(self, sizes: Mapping[str, int], dim: int, seed: int, normalize: str, sigmas: Mapping[str, float]) -> Map:
        total = sum(sizes.values())
        if self.form == "global" and total > 2**30:
            raise ValueError(f"Fastfood: form='global' takes at most 2^30 weights, got {total}; use 'stacked'")
        if self.form == "stacked" and dim > 2**15:
            raise ValueError(f"Fastfood: form='stacked' takes dim up to 32768, got {dim}; use 'global'")
        return super().map_of(sizes, dim, seed, normalize, sigmas)

    def options(self) -> dict[str, Any]:
        return {"form": self.form, "diag": self.diagonal}


@dataclass(frozen=True)
class Kronecker(Projection):
    """P1 (x) P2 of two stored, exactly orthonormal factors, 2 sqrt(D d) numbers; two matrix products."""

    kind: ClassVar[str] = "kronecker"
    redraws: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    def map_of(self, sizes: Mapping[str, int], dim: int, seed: int, normalize: str, sigmas: Mapping[str, float]) -> Map:
        names = list(sizes)
        require_dim(dim, sum(sizes.values()))
        return KroneckerMap({names[i]: sizes[names[i]] for i in in_order(names)}, dim, seed)


class Dense(Projection):
    """A matrix of your own.

    Args:
        basis: [D, d], float32, bfloat16, float16 or float64. Its rows are the weights in the order in which
            ``torch.nn.utils.parameters_to_vector`` lays out the parameters that take part.

    It is read once for each projection, in either direction; entries are widened to the precision of the computation.
    It is not written into adapter files: give it again to ``Subspace.load``.
    """

    kind: ClassVar[str] = "dense"
    redraws: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def __init__(self, basis: Tensor) -> None:
        owner = type(self).__name__
        require_float(owner, "basis", basis)
        if basis.ndim != 2:
            raise ValueError(f"{owner}: basis must be a matrix [D, d], got {describe(basis)}")
        if not bool(torch.isfinite(basis).all()):
            raise ValueError(f"{owner}: basis must be finite, it has NaN or infinite entries")
        self.basis = basis.detach()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.basis)})"

    def map_of(self, sizes: Mapping[str, int], dim: int, seed: int, normalize: str, sigmas: Mapping[str, float]) -> Map:
        expected = sum(sizes.values()), dim
        if tuple(self.basis.shape) != expected:
            raise ValueError(
                f"{type(self).__name__}: basis must be [D, dim] = {list(expected)} for these parameters, got "
                f"{list(self.basis.shape)}"
            )
        return StoredMap(self.basis, sizes)


class Learned(Dense):
    """A stored basis that was found in data; orthonormal columns. It travels in the adapter file.

    The constructors :meth:`from_trajectory`, :meth:`from_weights` and :meth:`from_gradient` make one.
    """

    kind: ClassVar[str] = "learned"

    @classmethod
    def from_trajectory(cls, checkpoints: Iterable[Mapping[str, Tensor]], names: Sequence[str], dim: int) -> Learned:
        """The first ``dim`` principal components of weights along a training run (DLDR, Li et al. 2022).

        Args:
            checkpoints: ``state_dict``s, more than ``dim`` of them.
            names: of the parameters that take part, in the order of the model (``sub.names`` of any Subspace, or the
                names in ``model.named_parameters()``).
            dim: d.

        Raises:
            ValueError: too few checkpoints, a name that one does not have, or fewer independent directions than
                ``dim``.
        """
        require_int("Learned", "dim", dim, 1)
        if not names:
            raise ValueError("Learned: names must be at least one, got none")
        rows = []
        for number, checkpoint in enumerate(checkpoints):
            missing = [name for name in names if name not in checkpoint]
            if missing:
                raise ValueError(f"Learned: checkpoint {number} has no {missing[0]!r}")
            rows.append(torch.cat([checkpoint[name].detach().flatten().float() for name in names]))
        if len(rows) <= dim:
            raise ValueError(f"Learned: checkpoints must be more than dim = {dim}, got {len(rows)}")
        snapshots = torch.stack(rows)
        if not bool(torch.isfinite(snapshots).all()):
            raise ValueError("Learned: checkpoints must be finite, one has NaN or infinite values")
        _, s, v = torch.linalg.svd(snapshots - snapshots.mean(0), full_matrices=False)
        if not bool(s[dim - 1] > s[0] * 1e-6):
            raise ValueError(f"Learned: the checkpoints span fewer than dim = {dim} directions")
        return cls(v[:dim].T.contiguous())

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], dim: int) -> Learned:
        """The ``dim`` strongest singular directions u v' of the weights, over all tensors (as TinyLoRA, LoRA-XS).

        Args:
            weights: name -> tensor of every parameter that takes part, in the order of the model. A tensor [h, ...] is
                read as a matrix of h rows, a vector as one column.
            dim: d; at most the sum of the ranks.
        """
        return cls._strongest(weights, dim)

    @classmethod
    def from_gradient(cls, gradients: Mapping[str, Tensor], dim: int) -> Learned:
        """The ``dim`` strongest singular directions of one gradient (LoRA-One, Zhang et al. 2025); as from_weights."""
        return cls._strongest(gradients, dim)

    @classmethod
    def _strongest(cls, tensors: Mapping[str, Tensor], dim: int) -> Learned:
        require_int("Learned", "dim", dim, 1)
        total = sum(t.numel() for t in tensors.values())
        found: list[tuple[float, int, Tensor, Tensor]] = []
        start = 0
        for name, tensor in tensors.items():
            matrix = tensor.detach().float()
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"Learned: {name} must be finite, it has NaN or infinite values")
            matrix = matrix.flatten(1) if matrix.ndim > 1 else matrix.reshape(-1, 1)
            if matrix.numel():
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                found += [(float(s[k]), start, u[:, k], v[k]) for k in range(len(s)) if s[k] > 0]
            start += tensor.numel()
        if len(found) < dim:
            raise ValueError(f"Learned: the tensors have {len(found)} singular directions, fewer than dim = {dim}")
        found.sort(key=lambda direction: -direction[0])
        basis = torch.zeros(total, dim)
        for column, (_, start, u, v) in enumerate(found[:dim]):
            basis[start : start + len(u) * len(v), column] = torch.outer(u, v).flatten()
        return cls(basis)


NAMED: dict[str, type[Projection]] = {
    p.kind: p for p in (BlockHadamard, OneHot, Sparse, Rademacher, Gaussian, Fastfood, Kronecker)
}


def projection_of(owner: str, projection: object) -> Projection:
    """A projection, or the one of that name with its default options."""
    if isinstance(projection, Projection):
        return projection
    if isinstance(projection, str):
        if projection in NAMED:
            return NAMED[projection]()
        names = ", ".join(map(repr, NAMED))
        raise ValueError(
            f"{owner}: projection must be one of {names}, or wx.subspace.Dense(basis) or Learned(basis); "
            f"got {projection!r}"
        )
    got = projection.__name__ if isinstance(projection, type) else type(projection).__name__
    raise TypeError(f"{owner}: projection must be a name or a projection of wx.subspace, got {got}")


def of_file(kind: str, options: Mapping[str, Any], basis: Tensor | None) -> Projection:
    """The projection that an adapter file speaks of."""
    if kind in (Dense.kind, Learned.kind):
        assert basis is not None
        return Learned(basis) if kind == Learned.kind else Dense(basis)
    tiled = {"tile": options["tile"], "columns": options["columns"]}
    if kind == "one_hot":
        return OneHot(**tiled, signed=options["form"] == "signed")
    if kind == "sparse":
        return Sparse(**tiled, nonzeros=options["K"])
    if kind == "block_hadamard":
        return BlockHadamard(**tiled)
    if kind == "fastfood":
        return Fastfood(options["form"], options["diag"])
    return NAMED[kind]()
