"""Conditioned: a model, usually pre-trained and frozen, whose weights follow a condition."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._torch import functorch_active, in_backward
from ..checks import require_bool, require_choice, require_int
from ..computed import install, new_slot, refuse
from ..numerics import opmath
from ..swap import slots_of
from .condition import Given, Needs, given
from .forms import FORMS
from .layers import follow, leave
from .select import Layer, choose, trace
from .transform import FilterTransform, Warp
from .weight import ConditionedWeight

_frozen: weakref.WeakSet[Conditioned] = weakref.WeakSet()
_warned: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


class Conditioned(nn.Module):
    """``model`` with filters that follow a condition: ``net(inputs, condition)``.

    The layers' weights are computed from those that are stored, by a transform, at the condition of each call; what is
    trained are the parameters of the transform. The model keeps its structure, names and ``state_dict`` keys.

    Args:
        model: changed in place; also :attr:`model`.
        transform: a ``wx.FilterTransform`` (``wx.Rotate() + wx.LearnedResidual()``), of which each layer gets a copy
            with parameters of its own, in ``layer.weight_transform.map``; or any ``nn.Module`` called as
            ``transform(weight, condition) -> weight``, one for all layers, :attr:`transform`. That gets one condition
            at a time (a mapping of them as a dict).
        layers: shell patterns for names of layers (``["conv1", "layer2.*"]``). Default: all convolutions (for warps
            those with more than one tap) and the Linear layers that ``sample`` or ``flattened`` says are spatial.
        sample: an input of the model (or a tuple or mapping of its arguments), to find by one forward, in eval mode,
            the Linear layers that read a flattened map: their weights are kernels as well and must turn too.
        flattened: the same by hand: ``{"fc": (channels, height, width)}``.
        freeze: the model's parameters take no gradients, and its batch normalization stays in eval mode.
        form: how a batch with several conditions is computed: ``"loop"`` (one plain layer for each condition),
            ``"grouped"`` (one convolution with a group for each sample), ``"activation"`` (the condition acts on the
            activations), or ``"auto"``, by shape. The numbers are the same.
        deduplicate: look at the values of conditions, once a call (on a GPU: one synchronization): equal ones are
            computed once, NaN raises. Not where a gradient goes to each sample's condition, and not under
            ``torch.compile``.
        cache_size: for how many conditions the weights are kept where no gradients are wanted (``torch.no_grad()``,
            or nothing to train); they take one copy of the weights each. 0 keeps those of the last call only.

    The condition: a number, a tensor, or a mapping of names to these. One for the whole batch (a number or of the
    shape of one), or with the batch in front one for each sample. Angles in radians. Gradients reach conditions, the
    transform, and the base where it is not frozen.

    Raises (before anything is changed):
        TypeError: an argument of another kind.
        ValueError: a pattern that matches nothing, a layer with no spatial kernel, a weight that is computed already,
            one that the transform refuses.

    Source: the question https://discuss.pytorch.org/t/learning-to-transform-cnn-filter-weights/127906; conditional
    filters: Yang et al. 2019 (CondConv); rotated ones: Pu et al. 2023 (ARC).
    """

    transform: nn.Module | None
    _layers: list[nn.Module]

    def __init__(
        self,
        model: nn.Module,
        transform: nn.Module,
        layers: Sequence[str] | None = None,
        sample: Any = None,
        flattened: Mapping[str, Sequence[int]] | None = None,
        freeze: bool = True,
        form: str = "auto",
        deduplicate: bool = True,
        cache_size: int = 16,
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("transform", transform)):
            if not isinstance(value, nn.Module):
                got = value.__name__ if isinstance(value, type) else type(value).__name__
                raise TypeError(f"Conditioned: {name} must be an nn.Module instance, got {got}")
        require_bool("Conditioned", "freeze", freeze)
        require_bool("Conditioned", "deduplicate", deduplicate)
        require_choice("Conditioned", "form", form, FORMS)
        require_int("Conditioned", "cache_size", cache_size, 0)
        ours = isinstance(transform, FilterTransform)
        found = {} if sample is None else trace("Conditioned", model, sample)
        chosen = choose("Conditioned", model, layers, flattened, found, ours, ours and _only_warps(transform))
        maps = [copy.deepcopy(transform) if isinstance(transform, FilterTransform) else None for _ in chosen]
        weights = [ConditionedWeight(self, None, layer.shape) for layer in chosen]
        for layer, own, weight in zip(chosen, maps, weights, strict=True):
            refuse(layer.module, "weight", layer.raw, weight)
            if own is not None:
                try:
                    own.check(weight.seen(layer.raw), layer.module)
                except (TypeError, ValueError) as e:
                    raise type(e)(f"Conditioned: {layer.path}: {e}") from e

        self.form, self.deduplicate, self.cache_size = form, deduplicate, cache_size
        self.frozen = freeze
        self.names = tuple(layer.path for layer in chosen)
        self.__dict__["_layers"] = [layer.module for layer in chosen]  # not submodules: the model has them
        self.model = model
        self.transform = None if ours else transform
        self._needs: Needs = transform.needs() if isinstance(transform, FilterTransform) else {None: None}
        self._given: Given | None = None
        self._kept: OrderedDict[tuple, Given] = OrderedDict()
        self._thawed = [name for name, p in model.named_parameters() if p.requires_grad]
        self._install(chosen, weights, maps)
        if freeze:
            names = {name for name, _ in self._base()}
            for name, p in model.named_parameters():
                if name in names:
                    p.requires_grad_(False)
            _frozen.add(self)
        self.train(model.training)

    def _install(self, chosen: Sequence[Layer], weights: Sequence[ConditionedWeight], maps: Sequence[Any]) -> None:
        slots: dict[int, tuple[Any, ConditionedWeight]] = {}
        for layer, own, weight in zip(chosen, maps, weights, strict=True):
            raw = layer.raw
            if id(raw) in slots:  # tied layers
                slot, weight = slots[id(raw)]
                slot.users += 1
            else:
                if own is not None:
                    own.create(weight.seen(raw), layer.module)
                    weight.map = own
                slot = new_slot(layer.module, raw)
                slots[id(raw)] = slot, weight
            follow(layer.module)
            install(layer.module, "weight", raw, weight, slot)

    def _base(self) -> list[tuple[str, nn.Parameter]]:
        """The model's own parameters, by their names in :attr:`model`."""
        ours = {id(p) for p in self.transform_parameters()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) not in ours]

    def _weights(self) -> list[ConditionedWeight]:
        return [m for m in self.model.modules() if isinstance(m, ConditionedWeight)]

    def transform_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the parameters of the transform, for an optimizer."""
        seen: set[int] = set()
        for module in (self.transform, *(w.map for w in self._weights())):
            for p in () if module is None else module.parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p

    def train(self, mode: bool = True) -> Conditioned:
        super().train(mode)
        if mode and self.frozen:
            for module in self.model.modules():
                if isinstance(module, _NormBase):
                    module.training = False
        return self

    def extra_repr(self) -> str:
        return f"{len(self.names)} layers, frozen={self.frozen}, form={self.form!r}"

    # computing

    def forward(self, input: Any, condition: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``model(input, *args, **kwargs)`` at ``condition``; the first axis of ``input`` is that of the batch."""
        batch = input.shape[0] if isinstance(input, Tensor) and input.ndim else None
        here = self._given = self._find(condition, batch)
        output = self.model(input, *args, **kwargs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or functorch_active():
            return output
        return _returning_to(self, here, output)

    @contextmanager
    def at(self, condition: Any, batch: int | None = None) -> Iterator[Conditioned]:
        """Inside, the layers' weights are those at ``condition``: to look at them, or to call ``net.model`` itself.

        ``batch``: for a condition for each sample, how many there are.
        """
        with self.using(self._find(condition, batch)):
            yield self

    @contextmanager
    def using(self, here: Given) -> Iterator[None]:
        before, self._given = self._given, here
        try:
            yield
        finally:
            self._given = before

    def _find(self, condition: Any, batch: int | None) -> Given:
        first = next(iter(self.model.parameters()))
        found = given("Conditioned", condition, self._needs, batch, first.device, opmath(first.dtype), self.deduplicate)
        if torch.compiler.is_compiling() or found.key is None or self._wants_graph(found):
            return found
        key = found.key, first.device, first.dtype
        known = self._kept.pop(key, found)
        if known.kept is None:
            known.kept = {}
        self._kept[key] = known
        while len(self._kept) > max(self.cache_size, 1):
            self._kept.popitem(last=False)
        return known

    def _wants_graph(self, found: Given) -> bool:
        if in_backward() or functorch_active():
            return True
        if not torch.is_grad_enabled():
            return False
        return found.needs_grad() or any(t.requires_grad for layer in self._layers for t in _tensors_of(layer))

    # what a user does with it

    def bake(self, condition: Any = None) -> nn.Module:
        """A plain copy of the model with the weights at ``condition`` (one condition)."""
        with torch.no_grad(), self.at(condition):
            kind = next(iter(self.model.parameters())).device.type
            with torch.autocast(kind, enabled=False):
                values = [
                    m.weight.detach().clone()  # type: ignore[operator]
                    for m in self.model.modules()
                    if _own(m) is not None
                ]
            plain = copy.deepcopy(self)._leave()
        layers = [m for m in plain.modules() if "_wx_was" in m.__dict__]
        with torch.no_grad():
            for layer, value in zip(layers, values, strict=True):
                del layer.__dict__["_wx_was"]
                layer._parameters["weight"].copy_(value)  # type: ignore[union-attr]
        return plain

    def unwrap(self) -> nn.Module:
        """The model as it was before, in place; its parameters require gradients as they did."""
        model = self._leave()
        for m in model.modules():
            m.__dict__.pop("_wx_was", None)
        return model

    def _leave(self) -> nn.Module:
        for module in list(self.model.modules()):
            if _own(module) is not None:
                leave(module)
                module.__dict__["_wx_was"] = True
        thawed = set(self._thawed)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in thawed)
        _frozen.discard(self)
        self._given = None
        self._kept.clear()
        return self.model

    # copies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "_kept": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.frozen:
            _frozen.add(self)


def _own(module: nn.Module) -> ConditionedWeight | None:
    own = module._modules.get("weight_transform") if "weight" in slots_of(module) else None
    return own if isinstance(own, ConditionedWeight) else None


def _tensors_of(layer: nn.Module) -> Iterator[Tensor]:
    """What its weight is computed from, besides the condition."""
    own = _own(layer)
    if own is not None:
        yield from own.tensors()
    yield layer._parameters["weight"]  # type: ignore[misc]


def _only_warps(transform: nn.Module) -> bool:
    parts = getattr(transform, "parts", None)
    return isinstance(transform, Warp) if parts is None else all(map(_only_warps, parts))


class _Return(torch.autograd.Function):
    """Nothing, but its backward comes first in that of a forward: it brings back the condition of this forward, for
    what an activation checkpoint computes again."""

    @staticmethod
    def forward(ctx: Any, net: Conditioned, here: Given, output: Tensor) -> Tensor:
        ctx.net, ctx.here = net, here
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        ctx.net._given = ctx.here
        return None, None, grad


def _returning_to(net: Conditioned, here: Given, output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
        return output
    leaves = [_Return.apply(net, here, x) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
    return tree_unflatten(leaves, spec)


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    if not _frozen or _warned.get(optimizer) == held:
        return
    _warned[optimizer] = held
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for net in list(_frozen):
        count = sum(id(p) in ids and not p.requires_grad for _, p in net._base())
        if count:
            warnings.warn(
                f"the optimizer holds {count} parameters of the frozen base of a wx.Conditioned, which get no "
                "gradients: give it net.transform_parameters(), or make the net with freeze=False",
                stacklevel=3,
            )


register_optimizer_step_pre_hook(_before_step)
