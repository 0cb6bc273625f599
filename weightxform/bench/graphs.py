"""Forward and backward of a variant as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .case import Variant


def captured(variant: Variant, douts: Sequence[Tensor]) -> tuple[Callable[[], object] | None, str]:
    """``(replay, "ok")``, or ``(None, why)`` where the variant cannot be captured.

    A twin is captured: a computed weight that was once part of a graph is not cached any more.
    """
    twin = replace(variant)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        twin.start()
        with torch.cuda.stream(side):
            for _ in range(3):
                twin.fresh()
                twin.forward_backward(douts)
            twin.fresh()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            twin.forward_backward(douts)
    except RuntimeError as e:
        return None, f"failed: {str(e).splitlines()[0]}"

    def replay(alive: Variant = twin) -> None:
        graph.replay()

    return replay, "ok"
