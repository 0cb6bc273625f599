"""Forward and backward of a variant as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .case import Variant


def captured(variant: Variant, douts: Sequence[Tensor]) -> tuple[Callable[[], object] | None, str]:
    """``(replay, "ok")``, or ``(None, why)`` where the variant cannot be captured."""
    variant.fresh()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                variant.fresh()
                variant.forward_backward(douts)
            variant.fresh()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            variant.forward_backward(douts)
    except RuntimeError as e:
        return None, f"failed: {str(e).splitlines()[0]}"
    variant.fresh()
    return graph.replay, "ok"
