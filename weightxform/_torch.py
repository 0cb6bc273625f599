"""The names of torch that are not public, in one place."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch
from torch._C import _TorchDispatchModeKey as _Mode
from torch.autograd import forward_ad as _forward_ad
from torch.fx import _symbolic_trace as _fx

_F = TypeVar("_F", bound=Callable[..., Any])


def functorch_active() -> bool:
    """Inside ``torch.func.grad``, ``vmap``, ...? Dynamo knows the answer of this call (not that of its likes)."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def fake_or_proxy_mode() -> bool:
    """Under ``FakeTensorMode`` or ``make_fx``: what is computed now is not a value to keep."""
    return torch._C._get_dispatch_mode(_Mode.FAKE) is not None or torch._C._get_dispatch_mode(_Mode.PROXY) is not None


def fx_tracing() -> bool:
    return _fx._is_fx_tracing_flag and _fx.is_fx_symbolic_tracing()


def in_backward() -> bool:
    """Called from inside a backward pass (a recompute under activation checkpointing, or a hook)?"""
    return torch._C._current_graph_task_id() != -1


def current_backward() -> int:
    """A number for the backward pass that this is called from; -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call this when the backward pass that this is called from is done."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def capturing_cuda_graph() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def when_cuda_starts(check: Callable[[], None]) -> None:
    """Call ``check`` before the first CUDA tensor of this process (now, if there was one), without starting CUDA."""
    torch.cuda._lazy_call(check)


def capture_of(kind: str) -> int:
    """A number for the CUDA graph that the current stream is captured into, the same all through; 0 for none.

    ``kind``: the type of the device of whose tensors this is asked; only CUDA has graphs.
    """
    if kind != "cuda" or not capturing_cuda_graph():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):  # not NVIDIA's: no two answers are equal, so nothing is served twice
        return -next(_unknown_captures)
    error = ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return -next(_unknown_captures) if error else number.value + 1


_unknown_captures = itertools.count(1)


def special_mode() -> bool:
    """Under ``torch.func``, forward-mode AD, fake tensors or ``make_fx``: a weight computed now is not one to keep."""
    return functorch_active() or _forward_ad._current_level >= 0 or fake_or_proxy_mode()


def freezing_trace() -> bool:
    """Under ``torch.jit.trace`` or ``torch.fx.symbolic_trace``, which would keep a weight as a constant."""
    return torch._C._is_tracing() or fx_tracing()


_transforms = torch._C._functorch.get_dynamic_layer_stack_depth
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


def ordinary() -> bool:
    """Neither :func:`special_mode` nor :func:`freezing_trace`; for eager code, which asks it at every read."""
    return (
        _transforms() == 0
        and _forward_ad._current_level < 0
        and (_dispatch_modes() == 0 or not fake_or_proxy_mode())
        and not _tracing()
        and not fx_tracing()
    )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on this device; ``None`` where it is off, or does not exist (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def first_device(args: tuple) -> str | None:
    """The type of the device of the first tensor among the arguments of an op, which may be in a list."""
    for a in args:
        if isinstance(a, (list, tuple)) and a:
            a = a[0]
        if isinstance(a, torch.Tensor):
            return a.device.type
    return None


def cast_by_autocast(weight: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of the weight of a layer; ``None`` where it leaves it as it is, which float64 always is."""
    return None if weight.dtype == torch.float64 else autocast_dtype(weight.device.type)


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """For what must not be rounded to a half type; enters nothing where autocast is off."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def unrounded(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, as float64 where autocast is on: that it leaves alone, also in a backward pass that is run there.

    For the small products that torch differentiates. MPS has no float64: there autocast rounds them.
    """
    kind = tensor.device.type
    return tensor if kind == "mps" or autocast_dtype(kind) is None else tensor.double()


def outside_autocast(function: _F) -> _F:
    """``function`` of tensors, with autocast off: where it multiplies matrices it would round them to a half type."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # in terms that Dynamo knows
            with autocast_off(first_device((*args, *kwargs.values())) or "cpu"):
                return function(*args, **kwargs)
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch._C._DisableAutocast():  # for all devices, and far cheaper than torch.autocast
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


def not_compiled_alone(function: _F) -> _F:
    """Dynamo may trace through ``function``; where it gave up on the caller, it must not compile what runs in here.

    Piecewise compilation of the cache's logic is slow, warns, and believes ``is_compiling`` in some frames only.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def saved_tensor_hooks_active() -> bool:
    """Inside ``torch.autograd.graph.saved_tensors_hooks`` (non-reentrant checkpoint, ``save_on_cpu``, ...)?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_dtensor(tensor: object) -> bool:
    """Asked of every raw tensor that is read: without importing ``torch.distributed.tensor``, which is slow."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def loading_strictly() -> bool:
    """Whether the ``load_state_dict`` that is running was called with ``strict=True``.

    Torch hands ``True`` to every module and applies ``strict`` to what they report, so only its frame knows.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back
    return True
