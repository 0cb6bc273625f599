"""The names of torch that are not public, in one place."""

from __future__ import annotations

import torch
from torch._C import _TorchDispatchModeKey as _Mode


def functorch_active() -> bool:
    """Inside ``torch.func.grad``, ``vmap``, ...? Reads as True under Dynamo: ask ``torch.compiler.is_compiling`` first."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def fake_or_proxy_mode() -> bool:
    """Under ``FakeTensorMode`` or ``make_fx``: what is computed now is not a value to keep."""
    return (
        torch._C._get_dispatch_mode(_Mode.FAKE) is not None or torch._C._get_dispatch_mode(_Mode.PROXY) is not None
    )


def fx_tracing() -> bool:
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def in_backward() -> bool:
    """Called from inside a backward pass (a recompute under activation checkpointing, or a hook)?"""
    return torch._C._current_graph_task_id() != -1


def capturing_cuda_graph() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
