"""ComputedParameter: a weight that is computed from a raw tensor, in any ``nn.Module``; and the functions around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from . import evaluate, versions
from ._torch import is_dtensor
from .slot import Slot
from .swap import base_of, child_name, raw_view, set_slots, slots_of
from .transform import Transform


class ComputedParameter(nn.Parameter):
    """A weight that is computed, by assignment::

        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())

    From then on ``layer.weight`` reads the computed tensor. The raw tensor stays where it was: the same leaf under the
    same name in ``layer.parameters()`` and in the ``state_dict``, so that optimizers, checkpoints, DDP and
    ``functional_call`` go on as before. The transform becomes the submodule ``weight_transform``, and its state the
    keys ``weight_transform.*``.

    Args:
        raw: the raw tensor: an ``nn.Parameter``, or a leaf tensor, which is made one. A weight that is computed already
            may be given to add a transform on top: ``layer.weight = wx.ComputedParameter(layer.weight, second)``.
        transform: a :class:`Transform`, or any ``nn.Module`` whose call ``transform(raw)`` returns the weight, or an
            ``nn.Sequential`` of them.

    With one argument, a module that owns its parameters: ``layer.weight = wx.ComputedParameter(module)`` reads
    ``module()``, and the parameter that was there is gone.

    *When it is computed.* Once for each value of what it depends on, however many forwards and backwards there are: the
    raw tensor and the transform's tensors and options, train or eval mode, autocast. In training mode the state (a
    power iteration) takes one step for each value of the raw tensor; ``cache=False`` on the transform computes and
    advances at every read, as torch does. A write that no version counter sees (``p.data.add_``, a custom kernel; not
    ``p.data = x``, which is seen) and that no optimizer step follows needs :func:`invalidate`. Under ``torch.compile``
    each read is part of the graph and advances.

    *Gradients.* They go to the raw tensor, through any number of backwards, with no ``retain_graph``. A raw tensor that
    was written between a forward and its backward raises. Hooks on ``layer.weight`` live as long as this value of it:
    put lasting ones on ``wx.raw(layer)``.

    *Assigning.* ``layer.weight = nn.Parameter(x)`` sets the raw tensor; ``wx.assign(layer, "weight", x)`` makes the
    weight equal to x as nearly as the transform can; ``layer.weight = tensor`` raises torch's ``TypeError``.
    ``model.apply(init_fn)`` and ``layer.reset_parameters()`` see the raw tensor. A write into the computed tensor
    (``nn.init.zeros_(layer.weight)``) raises at the next read, but for one through ``layer.weight.data``, which nothing
    can see.

    Raises (the transform's own checks included, and before anything is changed):
        TypeError: an argument of another kind; a DTensor, for a transform that cannot take one.
        ValueError: a lazy or parametrized module, ``Embedding(max_norm=...)``, a name that is taken, a weight that is
            computed already.
    """

    raw: Tensor | None
    transform: nn.Module
    _wx_attaches = True

    def __new__(cls, raw: Tensor | nn.Module, transform: nn.Module | None = None) -> ComputedParameter:
        if isinstance(raw, nn.Module) and transform is None:
            raw, transform = None, raw  # type: ignore[assignment]
        elif not isinstance(raw, Tensor):
            raise TypeError(f"ComputedParameter: raw must be a Tensor, got {type(raw).__name__}")
        if not isinstance(transform, nn.Module):
            got = transform.__name__ if isinstance(transform, type) else type(transform).__name__
            raise TypeError(f"ComputedParameter: transform must be a Transform or an nn.Module instance, got {got}")
        marker: ComputedParameter = torch.Tensor._make_subclass(cls, torch.empty(0), False)
        marker.raw, marker.transform = raw, transform  # type: ignore[assignment]
        return marker

    def __init__(self, raw: Tensor | nn.Module, transform: nn.Module | None = None) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = "no raw tensor" if self.raw is None else f"raw {tuple(self.raw.shape)}"
        return f"ComputedParameter({shape}, {self.transform})"


def _on_registration(module: nn.Module, name: str, param: nn.Parameter) -> Any:
    if type(param) is ComputedParameter:
        return _attach(module, name, param)
    return None


register_module_parameter_registration_hook(_on_registration)


def _attach(module: nn.Module, name: str, marker: ComputedParameter) -> Any:
    """What goes into ``module._parameters[name]`` in place of ``marker``."""
    raw, transform = marker.raw, marker.transform
    slot = slots_of(module).get(name)
    if slot is not None:
        return _stack(module, name, slot, raw, transform)
    raw = as_raw(raw)
    refuse(module, name, raw, transform)
    evaluate.attach(transform, raw, module, name)
    install(module, name, raw, transform, new_slot(module, raw))
    if raw is None:
        _Vacancy(module)
    return marker if raw is None else raw


class _Vacancy(dict):
    """In place of ``module._parameters`` while torch registers a marker with no raw tensor: the name stays empty."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module._parameters)
        self.module, self.real = module, module._parameters
        module.__dict__["_parameters"] = self

    def __setitem__(self, name: str, value: object) -> None:
        self.module.__dict__["_parameters"] = self.real
        self.real[name] = None


def _stack(module: nn.Module, name: str, slot: Slot, raw: Tensor | None, transform: nn.Module) -> Tensor | None:
    """Another transform on top of those that are there."""
    value = slot.weight.value
    if value is None or raw is not value:
        raise ValueError(
            f"ComputedParameter: {type(module).__name__}.{name} is computed already; wx.bake it first, or give "
            f"module.{name} itself as raw to put the transform on top"
        )
    child = child_name(name)
    below = module._modules[child]
    assert below is not None
    evaluate.attach(transform, value.detach(), module, name)
    links = list(below) if type(below) is nn.Sequential else [below]
    transform.train(module.training)
    module._modules[child] = nn.Sequential(*links, transform).train(module.training)
    slot.forget()
    slot.bucket = None
    if slot.owner:
        _Vacancy(module)
        return raw
    slot.settle_in(module._parameters[name])
    return module._parameters[name]


def as_raw(raw: Tensor | None) -> nn.Parameter | None:
    """A leaf tensor as a Parameter; ``ValueError`` for one that is computed from others."""
    if raw is None or isinstance(raw, nn.Parameter):
        return raw
    if raw.grad_fn is not None:
        raise ValueError("ComputedParameter: raw must be a leaf (an nn.Parameter), got a tensor that was computed")
    return nn.Parameter(raw.detach(), requires_grad=raw.requires_grad or raw.is_floating_point() or raw.is_complex())


def refuse(module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module) -> None:
    """Raise where ``module`` cannot have a computed weight called ``name``."""
    where = f"ComputedParameter: {type(module).__name__}.{name}"
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{where}: a ScriptModule cannot have computed weights; script the model after wx.bake")
    if isinstance(module, LazyModuleMixin) or (raw is not None and is_lazy(raw)):
        raise ValueError(f"{where}: the module is lazy and has no weight yet; run one forward, then attach")
    if is_parametrized(module):
        raise ValueError(f"{where}: the module is parametrized by torch.nn.utils.parametrize; remove that first")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None and name == "weight":
        raise ValueError(f"{where}: max_norm must be None, got {module.max_norm}: it would write the computed tensor")
    if base_of(type(module)) is not type(module) and "__wx_base__" not in vars(type(module)):
        raise ValueError(f"{where}: attach every computed weight before the class is changed (by fully_shard, ...)")
    if is_dtensor(raw) and not getattr(transform, "tensor_parallel", False):
        raise TypeError(f"{where}: raw is a DTensor, {type(transform).__name__} takes none; attach before fully_shard")
    if hasattr(module, child_name(name)):
        raise ValueError(f"{where}: the module has a {child_name(name)!r} already, the name that the transform needs")


def new_slot(module: nn.Module, raw: Tensor | None) -> Slot:
    return Slot(owner=raw is None, always_caches=isinstance(module, nn.RNNBase))


def install(module: nn.Module, name: str, raw: Tensor | None, transform: nn.Module, slot: Slot) -> None:
    transform.train(module.training)
    module.add_module(child_name(name), transform)
    slot.settle_in(raw)
    set_slots(module, {**slots_of(module), name: slot})


# the functions around it


def is_computed(module: nn.Module, name: str | None = None) -> bool:
    """Whether ``module.<name>`` is computed; with no name, whether any tensor of ``module`` itself is."""
    slots = slots_of(module)
    return bool(slots) if name is None else name in slots


def _slot(function: str, module: nn.Module, name: str) -> Slot:
    slots = slots_of(module)
    if name not in slots:
        there = f"; computed: {', '.join(slots)}" if slots else ""
        raise ValueError(f"{function}: name must be a computed tensor of {type(module).__name__}, got {name!r}{there}")
    return slots[name]


def _transform(module: nn.Module, name: str) -> nn.Module:
    transform = module._modules[child_name(name)]
    assert transform is not None
    return transform


def raw(module: nn.Module, name: str = "weight") -> nn.Parameter:
    """The raw tensor that ``module.<name>`` is computed from.

    Raises:
        ValueError: it is not computed, or its transform owns its parameters.
    """
    if _slot("raw", module, name).owner:
        raise ValueError(f"raw: {name!r} has no raw tensor; its transform owns its parameters ({child_name(name)!r})")
    return module._parameters[name]  # type: ignore[return-value]


def _computed_in(module: nn.Module) -> Iterator[tuple[nn.Module, str, Slot]]:
    for m in list(module.modules()):
        for name, slot in list(slots_of(m).items()):
            yield m, name, slot


def bake(module: nn.Module, name: str | None = None) -> nn.Module:
    """Make computed weights plain: an ``nn.Parameter`` holding the computed value (state is not advanced).

    Args:
        module: returned.
        name: of one computed weight of ``module``; default, all of ``module`` and of its submodules.

    The Parameter is the raw one, so that an optimizer goes on with it, unless shape or dtype differ or another module
    shares it; tied weights stay tied if they are baked together.

    Raises:
        ValueError: ``name`` is not computed.
        RuntimeError: it follows a condition and there is none, or one for each sample (before anything is changed).
    """
    chosen = list(_computed_in(module)) if name is None else [(module, name, _slot("bake", module, name))]
    for m, n, _ in chosen:
        for link in _transform(m, n).modules():
            if isinstance(link, Transform):
                link.check_bake()
    baked: dict[Slot, nn.Parameter] = {}
    with torch.no_grad():
        for m, n, slot in chosen:
            if slot not in baked:
                users = sum(s is slot for _, _, s in chosen)
                baked[slot] = _baked(m, n, slot, shared=slot.users > users)
    for m, n, slot in chosen:
        slot.users -= 1
        slot.bucket = None
        slot.forget()
        del m._modules[child_name(n)]
        m._parameters[n] = baked[slot]
        set_slots(m, {k: s for k, s in slots_of(m).items() if k != n})
    return module


def _baked(module: nn.Module, name: str, slot: Slot, shared: bool) -> nn.Parameter:
    raw, transform = module._parameters.get(name), _transform(module, name)
    kind = "cpu" if raw is None else raw.device.type
    with torch.autocast(kind, enabled=False):
        value = evaluate.evaluate(transform, raw, False).detach().clone()
    if raw is None:
        return nn.Parameter(value, requires_grad=any(p.requires_grad for p in transform.parameters()))
    if shared or (raw.shape, raw.dtype) != (value.shape, value.dtype):
        return nn.Parameter(value, requires_grad=raw.requires_grad)
    raw.copy_(value)
    return raw


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Make ``module.<name>`` equal to ``value``, as nearly as its transform allows; the state is made to fit.

    The raw tensor is written in place with the transform's right inverse of ``value``. (Spectral normalization: value
    itself, so that value / sigma is read.)

    Raises:
        ValueError, TypeError: ``name`` is not computed, or ``value`` does not fit.
        RuntimeError: the transform has no right inverse.
    """
    slot, target = _slot("assign", module, name), raw(module, name)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"assign: value must be a floating-point Tensor, got {got}")
    transform = _transform(module, name)
    with torch.no_grad():
        inverse = evaluate.right_inverse(transform, value.detach())
        if inverse.shape != target.shape:
            raise ValueError(f"assign: value must give a raw {tuple(target.shape)}, got {tuple(inverse.shape)}")
        target.copy_(inverse)
    slot.renew(transform, target)


def tie(module: nn.Module, source: nn.Module, name: str = "weight", source_name: str | None = None) -> None:
    """Let ``module.<name>`` be the computed ``source.<source_name>``: one raw tensor, one state, computed once.

    Raises:
        ValueError: ``source`` has no such computed weight, or ``module`` has no parameter of that name and shape, or
            it is computed already.
    """
    source_name = source_name or name
    if name not in module._parameters:
        raise ValueError(f"tie: name must be a parameter of {type(module).__name__}, got {name!r}")
    slot = _slot("tie", source, source_name)
    if is_computed(module, name):
        raise ValueError(f"tie: {type(module).__name__}.{name} is computed already; wx.bake it first")
    old, new = module._parameters[name], source._parameters[source_name]
    if old is not None and new is not None and old.shape != new.shape:
        raise ValueError(f"tie: {name!r} must have shape {tuple(new.shape)}, got {tuple(old.shape)}")
    transform = _transform(source, source_name)
    refuse(module, name, new, transform)
    module._parameters[name] = new
    slot.users += 1
    install(module, name, new, transform, slot)


def invalidate(module: nn.Module) -> nn.Module:
    """Say that raw tensors of ``module`` and its submodules were written in a way that no version counter sees.

    Needed after ``p.data.add_(...)``, a NumPy write or a kernel of your own, where no optimizer step follows; and where
    a transform that is a plain module changed in what is no parameter or buffer (``module.rate = 2``). It also forgets
    writes into computed tensors. Returns ``module``.
    """
    for m, name, slot in _computed_in(module):
        slot.forget()
        tensors = [*_transform(m, name).parameters(), *_transform(m, name).buffers()]
        before = m._parameters.get(name)
        versions.bump(tensors if before is None else [before, *tensors])
        slot.settle_in(before)
    return module


def refresh(module: nn.Module) -> nn.Module:
    """Make the state of every transform of ``module`` and its submodules fit its raw tensor.

    For weights whose state was not trained with them: averaged weights, merged or edited ones. Returns ``module``.
    """
    for m, name, slot in _computed_in(module):
        with raw_view(m):
            slot.renew(_transform(m, name), m._parameters.get(name))
    return module
