"""The intrinsic dimension of a task: the smallest d that reaches a share of the full model's score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..checks import require_int, require_positive
from .module import Subspace
from .projections import Projection, projection_of


@dataclass(frozen=True)
class IntrinsicDimension:
    """What :func:`intrinsic_dimension` found.

    Attributes:
        dim: the smallest tried d whose score reached ``threshold``; ``None`` if none did.
        threshold: ``share`` of ``baseline``.
        baseline: the score of the full model.
        scores: of every d that was tried.
        total: D, the weights that take part.
    """

    dim: int | None
    threshold: float
    baseline: float
    scores: dict[int, float]
    total: int


def intrinsic_dimension(
    make_model: Callable[[], nn.Module],
    train: Callable[[nn.Module], float],
    *,
    share: float = 0.9,
    baseline: float | None = None,
    dims: Sequence[int] | None = None,
    start: int = 16,
    tolerance: float = 0.1,
    projection: str | Projection = "block_hadamard",
    seed: int = 0,
    **options: object,
) -> IntrinsicDimension:
    """The smallest d at which training in a subspace reaches ``share`` of the full model's score (d_int90 for 0.9).

    Args:
        make_model: a fresh model, the same one each time (set the seed in it).
        train: trains what it is given, a plain model or a :class:`Subspace` of one, in the same way, and returns its
            score on held-out data: larger is better, and positive.
        share: of the full model's score.
        baseline: the full model's score; default, ``train(make_model())``.
        dims: what to try, in ascending order, until one reaches the threshold. Default: doubling from ``start``, then
            bisection, which takes the score to grow with d.
        tolerance: bisection ends when d is known up to this share of it.
        projection, seed, **options: of the :class:`Subspace`.

    Source: Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018, section 2.

    Raises:
        TypeError, ValueError: an argument out of range; a score that is not a finite number; those of ``Subspace``.
    """
    owner = "intrinsic_dimension"
    for name, function in (("make_model", make_model), ("train", train)):
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"{owner}: {name} must be a function, got {type(function).__name__}")
    require_positive(owner, "share", share)
    require_positive(owner, "tolerance", tolerance)
    require_int(owner, "start", start, 1)
    projection = projection_of(owner, projection)
    if dims is not None:
        if not dims or list(dims) != sorted(set(dims)):
            raise ValueError(f"{owner}: dims must ascend and not be empty, got {list(dims)}")
        for dim in dims:
            require_int(owner, "dims", dim, 1)

    def wrap(dim: int) -> Subspace:
        return Subspace(make_model(), dim, projection, seed, **options)  # type: ignore[arg-type]

    total = sum(t.numel() for t in wrap(1)._theta0())
    full = _score(owner, "train", train(make_model())) if baseline is None else _score(owner, "baseline", baseline)
    threshold = share * full
    scores: dict[int, float] = {}

    def reaches(dim: int) -> bool:
        if dim not in scores:
            scores[dim] = _score(owner, "train", train(wrap(dim)))
        return scores[dim] >= threshold

    if dims is not None:
        found = next((d for d in dims if reaches(d)), None)
    else:
        found = _bisect(reaches, min(start, total), total, tolerance)
    return IntrinsicDimension(found, threshold, full, scores, total)


def _bisect(reaches: Callable[[int], bool], start: int, total: int, tolerance: float) -> int | None:
    low, high = 0, start  # low does not reach, high may
    while not reaches(high):
        if high == total:
            return None
        low, high = high, min(2 * high, total)
    while high - low > max(1, math.floor(tolerance * high)):
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return high


def _score(owner: str, name: str, score: object) -> float:
    try:
        value = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise TypeError(f"{owner}: {name} must give a number, got {score!r}") from e
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must give a finite number, got {value}")
    return value
