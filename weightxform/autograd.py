"""What the ``torch.autograd.Function``s of all rooms share.

State stays on ``ctx`` and not in ``save_for_backward``, so that one computed weight serves many backward passes; a
write to the weight in between raises. A Function with ``jvp`` cannot be traced by Dynamo, so forward-mode AD is in a
subclass that only eager code uses; and ``apply`` inspects the signature of a Function with ``setup_context`` at each
call (20 us), which only torch.func needs, so plain eager code gets one whose forward does both. What multiplies
matrices in torch ops, where no op of ours does, is ``outside_autocast``, and ``unrounded`` where it is :func:`inlined`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch import functorch_active
from .registry import LIBRARY, Op
from .versions import Unchanged


def guard(name: str, tensors: Sequence[Tensor | None]) -> Unchanged | None:
    """What backward asks whether a tensor that it reads was written since.

    ``None`` where version counters cannot be read: under Dynamo and inside torch.func transforms.
    """
    if torch.compiler.is_compiling() or functorch_active():
        return None
    return Unchanged(name, [t for t in tensors if t is not None])


def through_ops() -> bool:
    """Whether a backward pass may call the (not differentiable) op."""
    return torch.compiler.is_compiling() or not (torch.is_grad_enabled() or functorch_active())


def dense(dout: Tensor) -> Tensor:
    """A sparse gradient (``Embedding(sparse=True)``) as a dense one."""
    return dout.to_dense() if not torch.compiler.is_compiling() and dout.layout != torch.strided else dout


def inlined() -> bool:
    """Under ``torch.func`` inside ``torch.compile``: Dynamo drops the backward of a Function there, without a word."""
    return torch.compiler.is_compiling() and functorch_active()


def differentiable(op: Op, function: Any) -> None:
    """Let the bare ``op`` differentiate as ``function`` does, whose arguments and outputs are those of the op.

    For graphs in which torch leaves the op alone, without the Function around it: a program that was exported and is
    trained. Without it the gradient would be missing there, with no more than a warning.
    """
    for name in (op.name, f"{op.name}.reference"):
        torch.library.register_autograd(
            f"weightxform::{name}", function.backward, setup_context=function.setup_context, lib=LIBRARY
        )


def joined(function: Any) -> Any:
    """``function`` (a Function class) with ``forward`` and ``setup_context`` in one: faster, unknown to torch.func."""

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    if function.jvp is not torch.autograd.Function.jvp:
        members["jvp"] = staticmethod(function.jvp)
    return type(f"{function.__name__}Joined", (torch.autograd.Function,), members)


def variant(traceable: Any, functional: Any, eager: Any) -> Any:
    """Which of three forms of a Function serves here: under Dynamo, inside torch.func transforms, elsewhere."""
    if torch.compiler.is_compiling():
        return traceable
    return functional if functorch_active() else eager
