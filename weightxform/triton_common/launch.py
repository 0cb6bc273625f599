"""What the launchers of several rooms share: checks of arguments, and an option."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import FLOAT_DTYPES, opmath

# Said aloud: otherwise ptxas spills a few to have more programs on a processor.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


def check(owner: str, ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(f"{owner}: {what}")


def check_dtypes(owner: str, weight: Tensor, out_dtype: torch.dtype | None = None, **others: Tensor) -> None:
    """Float tensors on one device: ``others`` in the dtype that sums have."""
    known = weight.dtype in FLOAT_DTYPES and (out_dtype or weight.dtype) in FLOAT_DTYPES
    check(owner, known, "dtypes must be float64, float32, bfloat16 or float16")
    for name, t in others.items():
        fits = t.dtype == opmath(weight.dtype) and t.device == weight.device
        check(owner, fits, f"{name} must lie where the weight does, float64 for a float64 weight, else float32")


def check_gradient(owner: str, grad: Tensor, weight: Tensor, *shape: int) -> None:
    check(owner, grad.dtype in FLOAT_DTYPES, "grad must be float64, float32, bfloat16 or float16")
    fits = grad.shape == shape and grad.device == weight.device
    check(owner, fits, f"grad must be {list(shape)}, where the weight is; got {list(grad.shape)}")
