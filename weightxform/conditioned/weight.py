"""ConditionedWeight: how one weight of a model follows the condition of its Conditioned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import versions
from .._torch import cast_by_autocast
from ..transform import Transform, configured_after
from .condition import ALONE
from .transform import FilterTransform

if TYPE_CHECKING:
    from .condition import Given
    from .module import Conditioned


class ConditionedWeight(Transform):
    """One weight of a :class:`Conditioned`: ``raw`` is the base's, the computed weight that at the present condition.

    With C > 1 conditions in the batch the computed weight is [C, *raw.shape], and the layer knows.
    """

    shares_state: ClassVar[bool] = False
    instead_of_writing: ClassVar[str] = (
        "It follows a condition: a map of the weight belongs in the transform of wx.Conditioned(model, transform), any "
        "nn.Module whose forward(weight, condition) returns the weight; the stored weight is wx.raw(layer)."
    )
    owner: Conditioned
    map: nn.Module | None

    def __init__(self, owner: Conditioned, map: FilterTransform | None, shape: tuple[int, ...] | None) -> None:
        """``map``: of this weight; ``None``: the one of all. ``shape``: as which the weight is seen."""
        super().__init__()
        self.__dict__["owner"] = owner  # not a submodule: it contains this one
        self.shape = shape
        self.register_module("map", map)
        self._seen: _Seen | None = None

    def transform(self) -> nn.Module:
        return self.map if self.map is not None else self.owner.transform  # type: ignore[return-value]

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        """A graph that goes on before the condition cannot be put behind a Function: its tensors would lose theirs."""
        given = self._given()
        return given is not None and (given.once or any(v.grad_fn is not None for v in given.values.values()))

    def _given(self) -> Given | None:
        return vars(self.owner).get("_given")

    def given(self) -> Given:
        given = self._given()
        if given is None:
            raise RuntimeError(
                "Conditioned: no condition yet: call net(inputs, condition), or read weights inside "
                "`with net.at(condition):`; wx.bake and torch.jit.trace want net.bake(condition). "
                f"{self.instead_of_writing}"
            )
        return given

    def check_bake(self) -> None:
        if self.given().count > 1:
            raise RuntimeError(
                "wx.bake: the weights follow a condition, and each sample has its own: "
                "net.bake(condition) gives a plain copy, net.unwrap() the plain model"
            )

    def raw(self, layer: nn.Module) -> Tensor:
        return layer._parameters["weight"]  # type: ignore[return-value]

    def seen(self, raw: Tensor) -> Tensor:
        """``raw`` as [O, I, *kernel]."""
        return raw if self.shape is None else raw.reshape(raw.shape[0], *self.shape)

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        given, dtype = self.given(), cast_by_autocast(raw)
        if given.kept is None or torch.compiler.is_compiling():
            return self._compute(raw, given, dtype)
        tensors, seen = (raw, *self.tensors()), self._seen
        assert seen is not None
        found = given.kept.get(id(self))
        if found is None or not found.is_of(tensors, dtype, seen):
            for t in tensors:
                versions.watch(t)
            facts, modes = _facts(tensors), seen.modes()  # before: a write by the transform itself would show
            held = [t.detach() for t in tensors]  # not themselves: swap_tensors wants no references
            with torch.inference_mode(False), torch.no_grad():  # it may serve where x takes a gradient
                found = given.kept[id(self)] = _Kept(self._compute(raw, given, dtype), held, facts, modes, dtype)
        return found.weight

    def _compute(self, raw: Tensor, given: Given, dtype: torch.dtype | None) -> Tensor:
        transform, weight = self.transform(), self.seen(raw)
        if isinstance(transform, FilterTransform):
            out = transform.whole(weight, given.values, dtype)
        else:
            out = _by_any(transform, weight, given)
        fits = out.shape[0] == 1 or out.shape[0] == given.count  # not `in`: the count may be a SymInt
        if tuple(out.shape[1:]) != tuple(weight.shape) or not fits:
            kind, expected = type(transform).__name__, [given.count, *weight.shape]
            raise ValueError(f"Conditioned: {kind} must return a weight of shape {expected}, got {list(out.shape)}")
        return out[0].reshape(raw.shape) if out.shape[0] == 1 else out.reshape(given.count, *raw.shape)

    def tensors(self) -> list[Tensor]:
        """What the transform has."""
        root, seen = self.transform(), self._seen  # looked up once: at every read it would cost more than the rest
        if seen is None or seen.root is not root or [m for d in seen.children for m in d.values()] != seen.inside:
            seen = self.__dict__["_seen"] = _Seen.of(root)  # as no option
        return [t for d in seen.tensors for t in d.values() if t is not None]

    def state(self) -> tuple[Tensor, ...]:
        if "_parameters" not in vars(self.owner):  # a copy or a pickle that is being put together
            return (torch.empty(0),)
        given = self._given()
        return (*self.tensors(), *(() if given is None else given.tensors()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__["_seen"] = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return "" if self.shape is None else f"seen as {['O', *self.shape]}".replace("'", "")


class _Seen(NamedTuple):
    """A transform's dicts of parameters and buffers, and what tells whether it has other modules by now."""

    root: nn.Module
    modules: list[nn.Module]
    children: list[dict]
    inside: list[nn.Module | None]
    tensors: list[dict]

    @staticmethod
    def of(root: nn.Module) -> _Seen:
        modules = list(root.modules())
        inside = [child for m in modules for child in m._modules.values()]
        tensors: list[dict] = [d for m in modules for d in (m._parameters, m._buffers)]
        return _Seen(root, modules, [m._modules for m in modules], inside, tensors)

    def modes(self) -> list[bool]:
        """Train or eval, of each: there may be dropout."""
        return [m.training for m in self.modules]


def _facts(tensors: Sequence[Tensor]) -> list[tuple]:
    """Writes, and places: ``p.data = x`` moves no version."""
    return [(versions.stamp(t), t.data_ptr(), t.stride()) for t in tensors]


class _Kept:
    """A weight, and what it was computed from, held: so no other tensor can come to lie there.

    Not seen: a tensor or Python attribute of a user's module that is neither parameter nor buffer; ``wx.invalidate``.
    """

    __slots__ = "dtype", "facts", "given_out", "held", "modes", "since", "weight"

    def __init__(
        self, weight: Tensor, held: list[Tensor], facts: list[tuple], modes: list[bool], dtype: torch.dtype | None
    ) -> None:
        self.weight, self.held, self.facts, self.modes, self.dtype = weight, held, facts, modes, dtype
        self.since = Transform.configured
        self.given_out = _facts([weight])  # whoever read it may have written it

    def is_of(self, tensors: Sequence[Tensor], dtype: torch.dtype | None, seen: _Seen) -> bool:
        if dtype is not self.dtype or _facts(tensors) != self.facts or seen.modes() != self.modes:
            return False
        if _facts([self.weight]) != self.given_out:
            return False
        if Transform.configured != self.since:
            if configured_after(seen.root, self.since):
                return False
            self.since = Transform.configured
        return True


def _by_any(transform: nn.Module, weight: Tensor, given: Given) -> Tensor:
    """A user's module, called for one condition after the other."""
    outs = []
    before = None if torch.compiler.is_compiling() else versions.stamp(weight)
    for k in range(given.count):
        conditions = {name: v[k] for name, v in given.values.items()}
        alone = next(iter(conditions.values())) if list(conditions) == [ALONE] else conditions
        out = transform(weight, alone)
        if not isinstance(out, Tensor) or out.shape != weight.shape:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"Conditioned: {type(transform).__name__} must return a weight of shape {list(weight.shape)}, got {got}"
            )
        outs.append(out)
    if before is not None and versions.stamp(weight) != before:
        raise RuntimeError(
            f"Conditioned: {type(transform).__name__} wrote into the weight that it was given, which is the model's "
            "own; return a new one (weight * a, not weight.mul_(a))"
        )
    return torch.stack(outs)
