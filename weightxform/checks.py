"""Checks of arguments. Every message gives the argument, what it must be and what it was."""

from __future__ import annotations

from collections.abc import Sequence

_LARGEST = 3.4028234663852886e38  # float32


def require_int(owner: str, name: str, value: object, least: int | None = None) -> None:
    """Raise ``TypeError`` unless ``value`` is an int (a bool is none), ``ValueError`` if it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{owner}: {name} must fit into 64 bits, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def require_number(owner: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is an int or a float, ``ValueError`` unless it is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{owner}: {name} must be finite in float32, got {value}")


def require_positive(owner: str, name: str, value: object) -> None:
    """:func:`require_number`, and ``ValueError`` unless ``value`` > 0."""
    require_number(owner, name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{owner}: {name} must be positive, got {value}")


def require_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def require_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def require_dim(owner: str, dim: object, ndim: int, of: str) -> int:
    """``dim`` counted from the front; ``TypeError`` or ``IndexError`` if it is no axis of ``ndim``."""
    require_int(owner, "dim", dim)
    assert isinstance(dim, int)
    if not -ndim <= dim < ndim:
        raise IndexError(f"{owner}: dim must be in [{-ndim}, {ndim - 1}] for {of}, got {dim}")
    return dim % ndim
