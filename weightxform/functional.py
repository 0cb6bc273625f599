"""Every transform as a plain function: tensors in, tensors out, no state kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import require_choice, require_dim, require_int, require_positive
from .numerics import FLOAT_DTYPES, opmath
from .spectral_norm import function as _sn
from .spectral_norm.reference import matrix_shape
from .transform import describe, require_float


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    order: Literal["u_first", "v_first"] = "u_first",
    bound: float | None = None,
    gain: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weight`` divided by its spectral norm, by power iteration from ``u`` and ``v`` (Miyato et al. 2018).

    Args:
        weight: any shape [..., h, ...] with h at ``dim``; read as a matrix [h, w]. float64, float32, bfloat16, float16.
        u: [h], unit; float64 for a float64 weight, else float32.
        v: [w], unit; the same dtype.
        n_power_iterations: 0 takes u and v as they are.
        eps: lower limit of the norms that the iteration divides by.
        dim, order, bound: as in :class:`weightxform.SpectralNorm`.
        gain: 0-dim tensor that multiplies the result, differentiable.
        dtype: of the result; default, the weight's. The cast costs no extra pass.

    Returns:
        (normalized weight, new u, new v, sigma). Only the first is differentiable, in ``weight`` and ``gain``; u and v
        are constants of the derivative, sigma = u'Wv is not.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    require_float("spectral_norm", "weight", weight)
    if weight.ndim == 0:
        raise ValueError(f"spectral_norm: weight must have at least one axis, got {describe(weight)}")
    dim = require_dim("spectral_norm", dim, weight.ndim, describe(weight))
    state_dtype = opmath(weight.dtype)
    for name, vector, size in zip("uv", (u, v), matrix_shape(weight, dim), strict=True):
        require_float("spectral_norm", name, vector)
        if vector.shape != (size,) or vector.dtype != state_dtype or vector.device != weight.device:
            expected = f"{str(state_dtype).removeprefix('torch.')}[{size}] on {weight.device}"
            raise ValueError(f"spectral_norm: {name} must be {expected}, got {describe(vector)}")
    require_int("spectral_norm", "n_power_iterations", n_power_iterations, 0)
    require_positive("spectral_norm", "eps", eps)
    require_choice("spectral_norm", "order", order, ("u_first", "v_first"))
    if bound is not None:
        require_positive("spectral_norm", "bound", bound)
    if gain is not None:
        require_float("spectral_norm", "gain", gain)
        if gain.ndim != 0 or gain.device != weight.device:
            raise ValueError(f"spectral_norm: gain must be 0-dim on {weight.device}, got {describe(gain)}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"spectral_norm: dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    out, state = _sn.apply(weight, u, v, gain, dim, n_power_iterations, eps, order == "v_first", bound, dtype)
    new_u, new_v, sigma = state.split([u.shape[0], v.shape[0], 1])
    return out, new_u, new_v, sigma.reshape(())
