"""The class that a module gets with its first computed weight: its own class, and a property for each name.

Torch is not patched. The class keeps the name of its base (so that a pickle and ``torch.fx`` see ``nn.Linear``), and
there is one for each (base, names), as ``torch.func.stack_module_state`` wants. ``__setattr__`` is left alone: FSDP2
leaves its fast path otherwise, and every attribute write would pay.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import versions
from ._torch import is_dtensor, loading_strictly, not_compiled_alone
from .slot import Slot
from .transform import Transform

_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def child_name(name: str) -> str:
    """Under which name the transform of the weight ``name`` is a submodule."""
    return f"{name}_transform"


def slots_of(module: nn.Module) -> dict[str, Slot]:
    return module.__dict__.get("_wx", {})


def base_of(cls: type) -> type:
    """The class without computed weights."""
    return getattr(cls, "__wx_base__", cls)


def plain_of(base: type) -> type:
    """The class for no computed weights at all: torch's own in the place of a folded layer's (``weightxform.nn``)."""
    return vars(base).get("__wx_plain__", base)


@contextmanager
def raw_view(module: nn.Module) -> Iterator[bool]:
    """Inside, ``module.weight`` is the raw tensor. Yields whether it was so already."""
    state = module.__dict__
    outer = "_wx_raw" in state
    state["_wx_raw"] = True
    try:
        yield outer
    finally:
        if not outer:
            del state["_wx_raw"]


def set_slots(module: nn.Module, slots: dict[str, Slot]) -> None:
    """Give ``module`` these computed weights and the class for them; none: its own class back."""
    base = base_of(type(module))
    if slots:
        module.__dict__["_wx"] = slots
        module.__dict__.pop("_flat_weights", None)
        module.__class__ = swapped(base, tuple(sorted(slots)))
        return
    del module.__dict__["_wx"]
    module.__class__ = plain_of(base)
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]


def swapped(base: type, names: tuple[str, ...]) -> type:
    key = base, names
    if key not in _classes:
        members = {
            "__module__": plain_of(base).__module__,  # by which torch.fx knows a leaf
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__wx_base__": base,
            **{name: _weight(name) for name in names},
            **_methods(base, names),
        }
        if issubclass(base, nn.RNNBase):
            members |= {"_flat_weights": _flat_weights()}
            members |= {"flatten_parameters": _nothing, "_update_flat_weights": _nothing}
            if base.__setattr__ is nn.RNNBase.__setattr__:  # it reads _flat_weights, and so every weight
                members["__setattr__"] = nn.Module.__setattr__
        if issubclass(base, nn.MultiheadAttention):
            members["forward"] = _reading_once(base)
        _classes[key] = type(base.__name__, (base,), members)
    return _classes[key]


def _reading_once(base: Any) -> Callable:
    """Attention asks for its weight several times in a forward, and under ``torch.compile`` each read would advance."""

    @wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return base.forward(self, *args, **kwargs)
        slots = slots_of(self)
        for slot in slots.values():
            slot.in_forward, slot.traced_value = True, None
        output = base.forward(self, *args, **kwargs)
        for slot in slots.values():
            slot.in_forward, slot.traced_value = False, None
        return output

    return forward


def _rebuild(base: type, names: tuple[str, ...]) -> nn.Module:
    cls = swapped(base, names)
    return cls.__new__(cls)  # type: ignore[call-overload]


def _weight(name: str) -> property:
    child = child_name(name)

    def read(self: nn.Module) -> Tensor | None:
        state = self.__dict__
        if "_wx_raw" in state:
            return self._parameters.get(name)
        try:
            return state["_wx"][name].read(self, name, child)
        except (AttributeError, KeyError) as e:
            # An AttributeError would make Python ask nn.Module.__getattr__, which returns the raw tensor.
            raise RuntimeError(f"computing {type(self).__name__}.{name}: {type(e).__name__}: {e}") from e

    def write(self: nn.Module, value: object) -> None:
        if "_is_replica" in self.__dict__:  # DataParallel keeps the tensor in _former_parameters
            return
        raise RuntimeError(
            f"{type(self).__name__}.{name} is computed: wx.assign(module, {name!r}, value) sets it, wx.bake(module, "
            f"{name!r}) makes it plain. If this came from an old hook (torch.nn.utils.weight_norm, spectral_norm), "
            "that hook has removed the parameter already and the module is broken."
        )

    return property(not_compiled_alone(read), write, doc=f"computed by {child}")


def _flat_weights() -> property:
    """RNNBase keeps a list of its weights, which would go stale."""

    def read(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, n, None) for n in self._flat_weights_names]

    return property(not_compiled_alone(read), lambda self, value: None)


def _nothing(self: nn.RNNBase) -> None:
    """The list is never stale (looking, as a copy does, would compute and iterate); and computed weights cannot be laid
    out in one buffer: cuDNN copies them."""


def _methods(base: Any, names: tuple[str, ...]) -> dict[str, Callable]:
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        slot, before = slots_of(self).get(name), self._parameters.get(name)
        if slot is not None and slot.owner and not hasattr(param, "_wx_attaches"):
            set_slots(self, {n: s for n, s in slots_of(self).items() if n != name})
            del self._modules[child_name(name)]
            setattr(self, name, param)
            return
        with raw_view(self) as inner:  # register_parameter asks hasattr(self, name)
            base.register_parameter(self, name, param)
        after = self._parameters.get(name)
        if slot is not None and slots_of(self).get(name) is slot and after is not before:
            if slot.users > 1 and after is not None and not is_dtensor(after):
                slot = _untie(self, name, slot)
            slot.forget()
            slot.settle_in(after)
            if not inner and after is not None:
                fits = before is None or after.shape == before.shape
                slot.pending = "eval" if fits else "always"
                if is_dtensor(after):
                    slot._watch_forwards(self)

    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with raw_view(self):
            result = base.reset_parameters(self, *args, **kwargs)
        for name, slot in slots_of(self).items():
            slot.renew(self._modules[child_name(name)], self._parameters.get(name))  # type: ignore[arg-type]
        return result

    def apply(self: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
        before = {n: _copy(self._parameters.get(n)) for n in slots_of(self)}
        with raw_view(self):
            base.apply(self, fn)
        for name, slot in slots_of(self).items():
            raw = self._parameters.get(name)
            if _differs(raw, before.get(name)):  # by value: init functions write through .data
                slot.renew(self._modules[child_name(name)], raw)  # type: ignore[arg-type]
        return self

    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        _forget(self)
        with raw_view(self):
            base._apply(self, *args, **kwargs)
        _settle_in(self)
        return self

    def _load_from_state_dict(
        self: nn.Module, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        _forget(self)
        for name in slots_of(self):
            adopt = getattr(self._modules[child_name(name)], "adopt_state_dict", None)
            if adopt is not None:
                adopt(state_dict, prefix, name)
        known = len(errors)
        with raw_view(self):
            base._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)
        _settle_in(self)
        if len(errors) == known:
            for name in slots_of(self):
                _after_load(self, name, state_dict, prefix)

    def __delattr__(self: nn.Module, name: str) -> None:
        if name in names:
            slots_of(self)[name].forget()  # torch's register_parametrization has written into it already
            raise AttributeError(f"{type(self).__name__}.{name} is computed: wx.bake(module, {name!r}) first")
        base.__delattr__(self, name)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        # The state is the third item, and not an argument, so that cycles through it are possible.
        get = getattr(self, "__getstate__", None)
        state = self.__dict__.copy() if get is None else get()
        return _rebuild, (base_of(type(self)), names), state

    def __setstate__(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)
        if "_parameters" in self.__dict__:
            _settle_in(self)

    def __prepare_scriptable__(self: nn.Module) -> nn.Module:
        raise RuntimeError(f"torch.jit.script: {', '.join(names)} is computed: wx.bake(model) first, or torch.export")

    methods: list[Any] = [
        register_parameter,
        apply,
        _apply,
        _load_from_state_dict,
        __delattr__,
        __reduce_ex__,
        __setstate__,
    ]
    methods += [__prepare_scriptable__]
    if hasattr(base, "reset_parameters"):
        methods.append(reset_parameters)
    return {m.__name__: m for m in methods}


def _untie(module: nn.Module, name: str, slot: Slot) -> Slot:
    """``module`` got a raw tensor of its own: its own slot and state as well, which begin as those that were shared."""
    slot.users -= 1
    own = Slot(slot.owner, slot.always_caches)
    child = child_name(name)
    module._modules[child] = copy.deepcopy(module._modules[child])
    set_slots(module, {**slots_of(module), name: own})
    return own


def _forget(module: nn.Module) -> None:
    for slot in slots_of(module).values():
        slot.forget()


def _settle_in(module: nn.Module) -> None:
    for name, slot in slots_of(module).items():
        slot.settle_in(module._parameters.get(name))


def _copy(raw: Tensor | None) -> Tensor | None:
    return None if raw is None or raw.is_meta or is_dtensor(raw) else raw.detach().clone()


def _differs(raw: Tensor | None, before: Tensor | None) -> bool:
    if raw is None or before is None:
        return raw is not None and not raw.is_meta
    if (raw.shape, raw.dtype, raw.device) != (before.shape, before.dtype, before.device):
        return True
    return not torch.equal(raw, before)


def _after_load(module: nn.Module, name: str, state_dict: dict, prefix: str) -> None:
    """A checkpoint without the state of the transform, a plain one, is no error: the state is made to fit.

    Parameters that the transform's ``reset`` does not write were trained, and nothing gives them back: they stay
    missing, as a module's own.
    """
    child = child_name(name)
    transform = module._modules[child]
    assert transform is not None
    absent = [key for key in transform.state_dict() if f"{prefix}{child}.{key}" not in state_dict]
    if not absent or prefix + name not in state_dict:
        return
    raw = module._parameters.get(name)
    later = is_dtensor(raw) and any(map(_has_reset, transform.modules()))  # once the whole tensor is there
    before = {} if is_dtensor(raw) else _held(transform)
    slots_of(module)[name].renew(transform, raw)
    after = before if is_dtensor(raw) else _held(transform)
    fits = [key for key in absent if later or after.get(key, (key,))[0] != before.get(key, (key,))[0]]
    trained = {key for key, _ in transform.named_parameters(remove_duplicate=False)}
    absent = [key for key in absent if key in fits or key not in trained]
    if absent and loading_strictly():
        state_dict.update({f"{prefix}{child}.{key}": transform.state_dict()[key] for key in absent})
        keys = ", ".join(f"{prefix}{child}.{key}" for key in absent)
        what = "the state was estimated from the weight" if fits else "it stays as it is"
        warnings.warn(f"the checkpoint has no {keys}: {what}", stacklevel=2)


def _has_reset(link: nn.Module) -> bool:
    return isinstance(link, Transform) and type(link).reset is not Transform.reset


def _held(transform: nn.Module) -> dict[str, tuple]:
    """Facts of each tensor, others after a write in place or by ``.data =``; and its memory, so that it stays taken."""
    parameters, buffers = transform.named_parameters, transform.named_buffers
    tensors = {**dict(parameters(remove_duplicate=False)), **dict(buffers(remove_duplicate=False))}
    return {
        key: ((id(t), versions.stamp(t), t.untyped_storage()._cdata), t.detach())
        for key, t in tensors.items()
        if not is_lazy(t) and t.layout is torch.strided
    }
