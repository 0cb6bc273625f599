"""ProjectedWeight: how one weight of a model belongs to its Subspace."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..transform import Transform

if TYPE_CHECKING:
    from .module import Subspace


class ProjectedWeight(Transform):
    """One weight of a :class:`Subspace`: ``raw`` is theta0, the computed weight theta."""

    groupable: ClassVar[bool] = True
    keeps_graph: ClassVar[bool] = True
    shares_state: ClassVar[bool] = True
    owner: Subspace

    def __init__(self, owner: Subspace, member: int) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a submodule: it contains this one
        self.member = member
        super().train(False)

    @property
    def cache(self) -> bool:  # type: ignore[override]
        """Not for coordinates that ``functional_call`` puts in: whoever handed them in may write them unseen."""
        return self._is_whole() and isinstance(self.owner._parameters["coordinates"], nn.Parameter)

    def _is_whole(self) -> bool:
        """Not while a copy or a pickle is put together, when an RNN asks for its weights."""
        return "_parameters" in vars(self.owner)

    def train(self, mode: bool = True) -> ProjectedWeight:
        return self  # nothing depends on the mode, so a change of it must not cost a computation

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        if not self._is_whole():
            return raw
        if self.owner._gathered.get(self.member):
            return self.owner._attach(self.member, raw)
        return self.owner._compute([self.member], [raw])[0]

    @classmethod
    def compute_group(cls, transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]) -> list[Tensor]:
        return transforms[0].owner._compute([t.member for t in transforms], raws)

    def group_key(self, raw: Tensor) -> Hashable:
        return id(self.owner), raw.dtype, raw.device

    def state(self) -> tuple[Tensor, ...]:
        return self.owner._state() if self._is_whole() else (torch.empty(0),)  # another at the next read

    def extra_repr(self) -> str:
        return f"{self.owner.names[self.member]}, {self.owner.kind}"
