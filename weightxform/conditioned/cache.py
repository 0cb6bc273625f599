"""The conditions whose weights are kept for later calls, and what may not be kept."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .condition import Given


class Cache:
    """The last calls' conditions, ``size`` in all: each keeps a copy of the weights."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: OrderedDict[tuple, Given] = OrderedDict()

    def known(self, key: tuple, given: Given) -> Given:
        """The one of an earlier call at the same conditions, or ``given`` itself, which is kept from now on."""
        if given.count > self.size:
            return given
        known = self._known.pop(key, given)
        known.keep()
        self._known[key] = known
        while sum(k.count for k in self._known.values()) > self.size:
            self._known.popitem(last=False)
        return known

    def clear(self) -> None:
        self._known.clear()

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]


def may_be_random(transform: nn.Module) -> bool:
    """Whether it may give other weights at the next call, as dropout does: one in training mode that is not ours."""
    if not transform.training:
        return False
    parts = getattr(transform, "parts", None)
    if parts is not None:
        return any(map(may_be_random, parts))
    return not type(transform).__module__.startswith(__name__.rpartition(".")[0])
