"""Many backward passes through one computed tensor, for a computation in plain autograd.

Autograd frees what a graph saved as soon as it was used. A transform written as a Function may keep its state on
``ctx`` instead; for any other, :func:`retained` puts its graph behind such a Function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .versions import Unchanged, watch


def retained(out: Tensor, raw: Tensor | None) -> Tensor:
    """``out``, computed from ``raw`` and other leaves, as a tensor through which any number of backwards may go.

    First and second derivatives (``create_graph``) are those of ``out``. A leaf that was written between the
    computation and a backward raises there.
    """
    if out.grad_fn is None:
        return out
    inputs = _inputs(out, raw)
    for tensor in inputs:
        watch(tensor)
    return _Retained.apply(_Graph(out, inputs), *inputs)


class _Graph:
    """Not a tensor, so that the outer graph does not run through ``out``, which would free what it saved."""

    def __init__(self, out: Tensor, inputs: list[Tensor]) -> None:
        self.out = out
        self.inputs = inputs
        self.unchanged = Unchanged("a computed weight", inputs)


def _inputs(out: Tensor, raw: Tensor | None) -> list[Tensor]:
    """The tensors where the graph of ``out`` begins: leaves, and ``raw`` even if it is none."""
    stop = raw.grad_fn if raw is not None else None
    found: dict[int, Tensor] = {}
    seen: set[Node] = set()
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is stop:
            assert raw is not None
            found[id(raw)] = raw
        elif (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        else:
            todo.extend(n for n, _ in node.next_functions)
    return list(found.values())


class _Retained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *inputs: Tensor) -> Tensor:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return graph.out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        if dout is None:
            return (None,) * (1 + len(graph.inputs))
        graph.unchanged.check()
        again = torch.is_grad_enabled()
        grads = torch.autograd.grad(
            graph.out, graph.inputs, dout, retain_graph=True, create_graph=again, allow_unused=True
        )
        return (None, *grads)
