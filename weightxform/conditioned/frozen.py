"""Conditioned models whose base is frozen, and a warning where an optimizer has it nevertheless."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .module import Conditioned

frozen: weakref.WeakSet[Conditioned] = weakref.WeakSet()
_warned: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    if not frozen or _warned.get(optimizer) == held:
        return
    _warned[optimizer] = held
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for net in list(frozen):
        count = sum(id(p) in ids and not p.requires_grad for _, p in net.base())
        if count:
            warnings.warn(
                f"the optimizer holds {count} parameters of the frozen base of a wx.Conditioned, which get no "
                "gradients: give it net.transform_parameters(), or make the net with freeze=False",
                stacklevel=3,
            )


register_optimizer_step_pre_hook(_before_step)
