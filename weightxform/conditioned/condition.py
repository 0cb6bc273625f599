"""What a caller gave as condition, as tensors with a row for each distinct one."""

from __future__ import annotations

import itertools
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._torch import capture_of, fake_or_proxy_mode, functorch_active
from ..transform import describe

Needs = Mapping[str | None, tuple[int, ...] | None]


class Positive(tuple):
    """In ``needs``, the shape of a condition whose numbers must be greater than 0."""

    __slots__ = ()


ALONE = "the condition"  # the name of one that was given without any


class Given:
    """The conditions of one forward.

    Attributes:
        values: name -> [C, *shape].
        count: C.
        index: [B], which of the C each sample has; ``None``: all have the only one, or each its own in order.
        batch: B, where C > 1.
        key: equal for equal conditions; ``None`` where that is not known.
        once: only one forward is at these conditions, so that the weights' graphs need not outlast its backward.
        kept: what was computed at these conditions, for later calls at the same ones; ``None`` where a graph is wanted.
    """

    __slots__ = "_token", "batch", "count", "index", "kept", "key", "once", "values"

    def __init__(
        self, values: dict[str, Tensor], count: int, index: Tensor | None, batch: int, key: tuple | None = None
    ) -> None:
        self.values, self.count, self.index, self.batch, self.key = values, count, index, batch, key
        self.kept: dict[int, Any] | None = None
        self._token: Tensor | None = None
        self.once = False

    def tensors(self) -> tuple[Tensor, ...]:
        """What a weight at these conditions depends on, with one tensor that no other forward has: the caller's own may
        come again, with other values that no version counter saw, or where a graph is wanted and was not before."""
        if self._token is None:
            self._token = torch.empty(0)
        return *self.values.values(), self._token

    def keep(self) -> None:
        """From now on for later calls as well, whatever the caller writes into its tensors."""
        if self.kept is None:
            self.kept = {}
            with torch.inference_mode(False):
                self.values = {name: v.detach().clone() for name, v in self.values.items()}

    def needs_grad(self) -> bool:
        return any(v.requires_grad for v in self.values.values())

    def only(self, k: int) -> Given:
        """The k-th condition alone."""
        return Given({name: v[k : k + 1] for name, v in self.values.items()}, 1, None, 1)

    def rows(self) -> Tensor | None:
        """:attr:`index`, written out, where C > 1."""
        if self.count == 1 or self.index is not None:
            return self.index
        return torch.arange(self.count, device=next(iter(self.values.values())).device)


def batch_of(input: Any) -> int | None:
    """The first axis of the first tensor in a model's arguments that has one."""
    return next((x.shape[0] for x in tree_leaves(input) if isinstance(x, Tensor) and x.ndim), None)


def told(value: object) -> str:
    """What was given, for error messages: of a tensor not its numbers, of anything else not more than a line."""
    return describe(value) if isinstance(value, Tensor) else reprlib.repr(value)


def given(
    owner: str, condition: object, needs: Needs, batch: int | None, device: torch.device, dtype: torch.dtype, look: bool
) -> Given:
    """Check ``condition`` and bring it into form.

    Args:
        owner: for messages.
        condition: a number, a tensor, or a mapping of names to these.
        needs: name -> shape of one, as of ``FilterTransform.needs``.
        batch: B, where the input has a batch axis.
        device, dtype: of the weights' arithmetic; floating conditions are converted to this dtype.
        look: at the values of tensors, once: equal ones are computed once, NaN raises.

    Raises:
        TypeError, ValueError: naming the condition, what it must be and what it was.
    """
    look = look and not (torch.compiler.is_compiling() or functorch_active() or fake_or_proxy_mode())
    look = look and device.type != "meta" and capture_of(device.type) == 0
    named = _named(owner, condition, needs)
    if not named:
        return Given({}, 1, None, 1, ())
    rows: dict[str, Tensor] = {}
    many = False
    for name, value in named.items():
        shape = needs[name] if name in needs else needs.get(None)
        rows[name] = _rows(owner, name, value, shape, batch, device, dtype)
        many = many or rows[name].shape[0] > 1
    seen = {name: v.detach().cpu() for name, v in rows.items()} if look else {}
    for name, v in seen.items():
        if v.is_floating_point() and not bool(v.isfinite().all()):
            raise ValueError(f"{owner}: {name} must be finite, got {first(v, ~v.isfinite())}")
        if isinstance(needs.get(name), Positive) and not bool((v > 0).all()):
            raise ValueError(f"{owner}: {name} must be positive, got {first(v, v <= 0)}")
    if not many:
        return Given(rows, 1, None, 1, _key(seen) if look else None)
    assert batch is not None
    return _distinct(rows, seen, batch)


def _named(owner: str, condition: object, needs: Needs) -> dict[str, Any]:
    names = [n for n in needs if n is not None]
    if isinstance(condition, Mapping):
        for name in condition:
            if not isinstance(name, str):
                raise TypeError(f"{owner}: the names of conditions must be strings, got {name!r}")
            if name not in names and None not in needs:
                raise ValueError(f"{owner}: there is no condition {name!r}; expected {_listed(names)}")
        missing = [n for n in names if n not in condition]
        if missing:
            raise ValueError(f"{owner}: the condition {missing[0]!r} is missing; got {_listed(list(condition))}")
        if None in needs and not names and not condition:
            raise ValueError(f"{owner}: a condition is needed, got an empty mapping")
        return dict(condition)
    if not needs:
        if condition is not None:
            raise ValueError(f"{owner}: the transform takes no condition, got {told(condition)}")
        return {}
    if len(names) > 1:
        raise ValueError(f"{owner}: condition must be a mapping with {_listed(names)}, got {type(condition).__name__}")
    return {names[0] if names else ALONE: condition}


def _listed(names: list[str]) -> str:
    return " and ".join(map(repr, names)) if names else "none"


def _rows(
    owner: str,
    name: str,
    value: Any,
    shape: tuple[int, ...] | None,
    batch: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """``value`` as [1, *shape] or [B, *shape]."""
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)) and isinstance(value, numbers.Real):  # NumPy's
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{owner}: {name} must be a number or a Tensor, got {type(value).__name__}")
        if not torch.compiler.is_compiling() and not abs(value) <= torch.finfo(dtype).max:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{owner}: {name} must be finite in {kind}, got {told(value)}")
        if shape:
            raise ValueError(f"{owner}: {name} must be a tensor {_expected(shape, batch)}, got {value}")
        return torch.full((1,), value, dtype=dtype, device=device)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{owner}: {name} must be real numbers, got {describe(value)}")
    if value.device != device and not (value.is_cpu and value.ndim == 0):
        raise ValueError(f"{owner}: {name} must be on {device} as the model is, got {describe(value)}")
    value = value.to(device, dtype if shape is not None or value.is_floating_point() else value.dtype)
    if shape is None:  # any: an axis in front is that of the batch
        if value.ndim == 0:
            return value[None]
        fits = value.shape[0] in (1, batch)
    elif tuple(value.shape) == shape:
        return value[None]
    else:
        fits = tuple(value.shape[1:]) == shape and value.ndim > len(shape) and value.shape[0] in (1, batch)
    if not fits:
        raise ValueError(f"{owner}: {name} must be {_expected(shape, batch)}, got {describe(value)}")
    if value.shape[0] == 0:  # no samples, but a layer needs a weight
        return torch.cat([value, value.new_zeros(1, *value.shape[1:])])
    return value


def _expected(shape: tuple[int, ...] | None, batch: int | None) -> str:
    inner = "" if not shape else ", ".join(map(str, shape))
    rows = "" if batch is None else f" or [{', '.join([str(batch), *([inner] if inner else [])])}] (one a sample)"
    if shape is None:
        rows = f" or [{batch}, ...] (one a sample)" if batch is not None else ""
        return f"a number, or [1, ...] (one for all: condition[None] of a vector){rows}"
    return (f"[{inner}]" if inner else "a number") + rows


def first(values: Tensor, where: Tensor) -> float:
    """For error messages."""
    return float(values.detach()[where][0])


def _key(seen: Mapping[str, Tensor]) -> tuple:
    return tuple((name, v.dtype, tuple(v.shape), tuple(v.flatten().tolist())) for name, v in seen.items())


def _distinct(given: Mapping[str, Tensor], seen: Mapping[str, Tensor], batch: int) -> Given:
    """Equal rows once; not where a gradient goes to each sample's own."""
    if all(v.shape[0] == 1 or (v.stride(0) == 0 and not v.requires_grad) for v in given.values()):
        key = _key({n: v[:1] for n, v in seen.items()}) or None
        return Given({n: v[:1] for n, v in given.items()}, 1, None, 1, key)
    rows = {n: v if v.shape[0] == batch else v.expand(batch, *v.shape[1:]) for n, v in given.items()}
    if not seen or any(v.requires_grad for v in rows.values()):
        return Given(rows, batch, None, batch)
    flat = [v.expand(batch, *v.shape[1:]).reshape(batch, -1).tolist() for v in seen.values()]
    numbers: dict[tuple, int] = {}
    index = [numbers.setdefault(tuple(itertools.chain(*row)), len(numbers)) for row in zip(*flat, strict=True)]
    key = (_key(seen), batch)
    if len(numbers) == batch:
        return Given(rows, batch, None, batch, key)
    firsts = [index.index(k) for k in range(len(numbers))]
    device = next(iter(rows.values())).device
    where = torch.tensor(firsts, device=device)
    values = {n: v[where] for n, v in rows.items()}
    if len(numbers) == 1:
        return Given(values, 1, None, 1, _key({n: v[:1] for n, v in seen.items()}))
    return Given(values, len(numbers), torch.tensor(index, device=device), batch, key)
