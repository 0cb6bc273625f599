"""Conditioned: a model, usually pre-trained and frozen, whose weights follow a condition."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from .._torch import after_backward, current_backward, in_backward, special_mode
from ..checks import require_bool, require_choice, require_int
from ..computed import install, new_slot, refuse
from ..numerics import opmath
from ..swap import slots_of
from .cache import Cache, may_be_random
from .condition import Given, Needs, batch_of, given
from .forms import FORMS
from .frozen import frozen
from .layers import check_tied, follow, leave, own_of, refuse_more
from .select import Layer, choose
from .tracing import trace
from .transform import FilterTransform
from .weight import ConditionedWeight


class Conditioned(nn.Module):
    """``model`` with filters that follow a condition: ``net(inputs, condition)``.

    The layers' weights are computed from those that are stored, by a transform, at the condition of each call; what is
    trained are the parameters of the transform. The model keeps its structure, names and ``state_dict`` keys.

    Args:
        model: changed in place; also :attr:`model`.
        transform: a ``wx.FilterTransform`` (``wx.Rotate() + wx.LearnedResidual()``), of which each layer gets a copy
            with parameters of its own, in ``layer.weight_transform.map`` (an ``nn.Parameter`` that you give it, as in
            ``wx.Rotate(angle=parameter)``, is that of all); or any ``nn.Module`` called as
            ``transform(weight, condition) -> weight``, one for all layers, :attr:`transform`. That gets one condition
            at a time (a mapping of them as a dict).
        layers: shell patterns for names of layers (``["conv1", "layer2.*"]``). Default: all convolutions (for warps
            those with more than one tap; not the router of an ``AdaptiveRotatedConv2d``) and the Linear layers that
            ``sample`` says are spatial.
        sample: an input of the model (or a tuple or mapping of its arguments), to find by one forward, in eval mode,
            the Linear layers that read a flattened map: their weights are kernels as well and must turn too. It warns
            of one whose map was put in another order on the way.
        flattened: the same by hand, whatever ``layers`` says: ``{"fc": (channels, height, width)}``.
        freeze: the model's parameters take no gradients, and its batch normalization stays in eval mode (dropout
            does not: it is no statistic of the base).
        form: how a batch with several conditions is computed: ``"loop"`` (one plain layer for each condition),
            ``"grouped"`` (one convolution with a group for each sample), ``"activation"`` (the condition acts on the
            activations; a layer or transform that has no such form raises), or ``"auto"``, by shape. The numbers are
            the same.
        deduplicate: look at the values of conditions, once a call (on a GPU: one synchronization): equal ones are
            computed once (unless a gradient goes to each sample's own), and NaN raises. Not under ``torch.compile``.
        cache_size: for how many conditions, in all, the weights are kept where no gradients are wanted
            (``torch.no_grad()``, or nothing to train); each takes one copy of the weights. A batch with more different
            ones keeps none of them.

    The condition: a number, a tensor, or a mapping of names to these. One for the whole batch (a number or of the
    shape of one; for an own module [1, ...]), or with the batch in front one for each sample. Angles in radians.
    Gradients reach conditions, the transform, and the base where it is not frozen. Outside of a call the model has no
    condition, and to call it or to read its weights raises: see :meth:`at`.

    Raises (before anything is changed):
        TypeError: an argument of another kind.
        ValueError: a pattern that matches nothing, a layer with no spatial kernel, a weight that is computed already
            (here, or by torch: parametrized, pruned), one that the transform refuses, layers that share one and are
            not alike.

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
        chosen = choose("Conditioned", model, layers, flattened, found, transform)
        shared = {id(p): p for p in transform.parameters()}  # the user's own, as in wx.Rotate(angle=parameter)
        weights = [ConditionedWeight(self, None, layer.shape) for layer in chosen]
        first: dict[int, Layer] = {}  # of those that share a weight
        for layer, weight in zip(chosen, weights, strict=True):
            refuse(layer.module, "weight", layer.raw, weight)
            if ours:
                check_tied(first.setdefault(id(layer.raw), layer), layer)
                try:
                    transform.check(weight.seen(layer.raw), layer.module)  # type: ignore[operator]
                except (TypeError, ValueError) as e:
                    raise type(e)(f"Conditioned: {layer.path}: {e}") from e
        for layer, weight in zip(chosen, weights, strict=True):
            if first.get(id(layer.raw)) is layer:
                own: Any = copy.deepcopy(transform, dict(shared))
                own.create(weight.seen(layer.raw), layer.module)
                weight.map = own

        self.form, self.deduplicate = form, deduplicate
        self.frozen = freeze
        self.names = tuple(layer.path for layer in chosen)
        self.__dict__["_layers"] = [layer.module for layer in chosen]  # not submodules: the model has them
        self.model = model
        self.transform = None if ours else transform
        self._needs: Needs = transform.needs() if isinstance(transform, FilterTransform) else {None: None}
        self._given: Given | None = None
        self._kept = Cache(cache_size)
        self._turn = threading.RLock()
        self._inside = 0  # how many at() and forwards are open
        self._returned: int | None = None  # the backward in which the condition of a forward was brought back
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._stilled: list[nn.Module] = []
        self._install(chosen, weights)
        if freeze:
            for _, p in self.base():
                p.requires_grad_(False)
            frozen.add(self)
        self.training = model.training
        if self.transform is not None:
            self.transform.train(model.training)
        self._still()

    def _install(self, chosen: Sequence[Layer], weights: Sequence[ConditionedWeight]) -> None:
        slots: dict[int, tuple[Any, ConditionedWeight]] = {}
        for layer, weight in zip(chosen, weights, strict=True):
            raw = layer.raw
            if id(raw) in slots:  # tied layers
                slot, weight = slots[id(raw)]
                slot.users += 1
            else:
                slot = new_slot(layer.module, raw)
                slots[id(raw)] = slot, weight
            follow(layer.module)
            install(layer.module, "weight", raw, weight, slot)

    def base(self) -> list[tuple[str, nn.Parameter]]:
        """The model's own parameters, by their names in :attr:`model`."""
        ours = {id(p) for weight in self._weights() for p in weight.parameters()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) not in ours]

    def _weights(self) -> list[ConditionedWeight]:
        return [m for m in self.model.modules() if isinstance(m, ConditionedWeight) and m.owner is self]

    def transform_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the parameters of the transform, for an optimizer.

        Not the model's, where the transform knows the model.
        """
        seen = {id(p) for _, p in self.base()}
        for module in (self.transform, *(w.map for w in self._weights())):
            for p in () if module is None else module.parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p

    def train(self, mode: bool = True) -> Conditioned:
        super().train(mode)
        self._still()
        return self

    def _still(self) -> None:
        """The batch normalization of a frozen model (not that of a transform) goes to eval mode."""
        ours = {m for weight in self._weights() for m in weight.modules()}
        norms = [m for m in self.model.modules() if isinstance(m, _NormBase) and m not in ours]
        self.__dict__["_stilled"] = [m for m in norms if m.training] if self.frozen else []
        for module in self._stilled:
            module.training = False

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("Conditioned: not under nn.DataParallel; use DistributedDataParallel")

    def extra_repr(self) -> str:
        return f"{len(self.names)} layers, frozen={self.frozen}, form={self.form!r}"

    # computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``net(input, condition, ...)``, or ``net(..., condition=condition)``: the model's output for its arguments.

        The first axis of the input, or of the first tensor in it (a tuple, list or dict), is that of the batch. Calls
        from several threads take turns.
        """
        condition = None
        if "condition" in kwargs:
            condition = kwargs.pop("condition")
        elif len(args) > 1:
            condition, args = args[1], (args[0], *args[2:])
        batch = batch_of((args, kwargs))
        if torch.compiler.is_compiling():
            before, self._given = self._given, self._find(condition, batch)
            output = self.model(*args, **kwargs)
            self._given = before
            return output
        with self._turn:
            here = self._find(condition, batch)
            here.once = here.kept is None
            before, self._given = self._given, here
            self._inside += 1
            try:
                output = self.model(*args, **kwargs)
            finally:
                self._inside -= 1
                self._given = before
        if torch.is_grad_enabled() and not special_mode():
            self._return_in_backward(here, output)
        return output

    def _return_in_backward(self, here: Given, output: Any) -> None:
        """Let the backward of ``output`` begin with its condition brought back, for checkpoints inside the model."""

        def back(grads: Any) -> None:
            task = current_backward()
            with self._turn:  # not in the middle of another thread's forward
                if self._returned != task:  # once a backward
                    before = self._given, self._returned
                    after_backward(lambda: self._after_backward(*before))
                    self._returned = task
                self._given = here

        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                for tensor in (x, x._base):  # a write into a view takes its node out of the graph
                    if tensor is not None and tensor.grad_fn is not None:
                        tensor.grad_fn.register_prehook(back)

    def _after_backward(self, given: Given | None, returned: int | None) -> None:
        with self._turn:
            self._given, self._returned = given, returned

    def check_checkpoint(self) -> None:
        """Raise where a checkpoint inside the model computes again, and nothing says at which condition."""
        if in_backward() and self._returned is None and not self._inside:
            raise RuntimeError(
                "Conditioned: an activation checkpoint computes a layer again, and its condition is not known: this "
                "backward did not come through tensors that net(...) returned (itself, or in tuples, lists and dicts); "
                "call forward and backward inside `with net.at(condition):`"
            )

    @contextmanager
    def at(self, condition: Any, batch: int | None = None) -> Iterator[Conditioned]:
        """Inside, the layers' weights are those at ``condition``: to look at them, or to call ``net.model`` itself.

        ``batch``: for a condition for each sample, how many there are.
        """
        with self.using(self._find(condition, batch)):
            self._inside += 1
            try:
                yield self
            finally:
                self._inside -= 1

    @contextmanager
    def using(self, here: Given) -> Iterator[None]:
        before, self._given = self._given, here
        try:
            yield
        finally:
            self._given = before

    def _find(self, condition: Any, batch: int | None) -> Given:
        for path, layer in zip(self.names, self._layers, strict=True):
            refuse_more(layer, path)
            if not self._follows(layer):
                raise RuntimeError(
                    f"Conditioned: {path}.weight does not follow the condition any more (unwrap() or wx.bake() was "
                    "called): call the model itself, or wrap it anew"
                )
        raws: list[Any] = [layer._parameters["weight"] for layer in self._layers]
        first, wide = raws[0], any(w.dtype is torch.float64 for w in raws)
        dtype = torch.float64 if wide else opmath(first.dtype)
        found = given("Conditioned", condition, self._needs, batch, first.device, dtype, self.deduplicate)
        if torch.compiler.is_compiling() or found.key is None:
            return found
        if self._keeps(found):
            return self._kept.known((found.key, first.device, dtype), found)
        if torch.is_grad_enabled():  # in training, where memory is short, and what is kept is soon old
            self._kept.clear()
        return found

    def _keeps(self, found: Given) -> bool:
        """Whether what is computed may serve later calls: without a graph, and where nothing is random."""
        if in_backward() or special_mode():
            return False
        if any(slots_of(layer)["weight"].managed for layer in self._layers):  # FSDP2 writes unseen
            return False
        if torch.is_grad_enabled() and (
            found.needs_grad() or any(t.requires_grad for layer in self._layers for t in _tensors_of(layer))
        ):
            return False
        return not any(map(may_be_random, self._roots()))

    def _roots(self) -> Iterator[nn.Module]:
        if self.transform is not None:
            yield self.transform
        else:
            yield from (own.map for layer in self._layers if (own := own_of(layer)) is not None and own.map is not None)

    def _follows(self, module: nn.Module) -> bool:
        own = own_of(module)
        return own is not None and own.owner is self

    # what a user does with it

    def bake(self, condition: Any = None) -> nn.Module:
        """A plain copy of the model with the weights at ``condition`` (one condition)."""
        with torch.inference_mode(False), torch.no_grad(), self.at(condition):
            kind = next(iter(self.model.parameters())).device.type
            with torch.autocast(kind, enabled=False):
                values = [
                    m.weight.detach().clone()  # type: ignore[operator]
                    for m in self.model.modules()
                    if self._follows(m)
                ]
            plain = copy.deepcopy(self)._leave()
        layers = [m for m in plain.modules() if "_wx_was" in m.__dict__]
        with torch.no_grad():
            for layer, value in zip(layers, values, strict=True):
                del layer.__dict__["_wx_was"]
                layer._parameters["weight"].copy_(value)  # type: ignore[union-attr]
        return plain

    def unwrap(self) -> nn.Module:
        """The model as it was before, in place; its parameters require gradients as they did.

        Those that were added since stay as they are.
        """
        model = self._leave()
        for m in model.modules():
            m.__dict__.pop("_wx_was", None)
        return model

    def _leave(self) -> nn.Module:
        for module in list(self.model.modules()):
            if self._follows(module):
                leave(module)
                module.__dict__["_wx_was"] = True
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._required.get(name, p.requires_grad))
        for module in self._stilled:
            module.training = True
        frozen.discard(self)
        self._given = None
        self._kept.clear()
        return self.model

    # copies

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_given": None, "_inside": 0, "_returned": None}
        del state["_turn"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._turn = threading.RLock()
        if self.frozen:
            frozen.add(self)


def _tensors_of(layer: nn.Module) -> Iterator[Tensor]:
    """What its weight is computed from, besides the condition."""
    own = own_of(layer)
    if own is not None:
        yield from own.tensors()
    yield layer._parameters["weight"]  # type: ignore[misc]
