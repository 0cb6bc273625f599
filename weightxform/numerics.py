"""Which precision a kernel computes in, and how large an error of a given dtype may be."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators and of state: float32 for half types, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / max(|expected|, tiny)`` in float64, over the whole tensor. 0 for two empty tensors."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual and expected differ in shape: {tuple(actual.shape)}, {tuple(expected.shape)}")
    a, e = actual.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
    if a.numel() == 0:
        return 0.0
    finite = torch.isfinite(e)
    if not torch.equal(torch.isfinite(a), finite):
        return float("inf")
    scale = torch.linalg.vector_norm(e[finite]).clamp_min(1e-30)
    return float(torch.linalg.vector_norm((a - e)[finite]) / scale)
