"""Every transform as a plain function: tensors in, tensors out, no state kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .checks import require_choice, require_dim, require_int, require_positive
from .numerics import FLOAT_DTYPES, opmath
from .spectral_norm import function as _sn
from .spectral_norm.reference import matrix_shape
from .subspace.maps import Map
from .subspace.projections import NORMALIZE, Projection, projection_of
from .subspace.select import fan_in_sigma
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


def project(
    z: Tensor,
    theta0: Mapping[str, Tensor],
    *,
    projection: str | Projection = "block_hadamard",
    seed: int = 0,
    normalize: Literal["global", "per_tensor", "init"] = "global",
    step: Tensor | None = None,
) -> dict[str, Tensor]:
    """theta0 + P z for named tensors, with a P that is not stored; ``weightxform/subspace/reference.py`` has the maths.

    Args:
        z: [d], or [K, d] for K of them that share one generation of P; float64 or float32. Under ``vmap`` over z they
            share it as well.
        theta0: name -> tensor, on the device of z; float64, float32, bfloat16, float16. P depends on the names.
        projection, seed, normalize: as in :class:`weightxform.Subspace`; for ``"init"`` a vector counts as unscaled.
        step: int64 scalar on the device of z, which P of a sequence; ``None`` for the first.

    Returns:
        name -> tensor, of the shapes and dtypes of ``theta0``, with K in front for [K, d]. Differentiable in z and
        theta0, any number of times.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    require_float("project", "z", z)
    if z.ndim not in (1, 2) or z.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"project: z must be float64 or float32 [d] or [K, d], got {describe(z)}")
    if not isinstance(theta0, Mapping) or not theta0:
        raise TypeError(f"project: theta0 must be a mapping of names to tensors, not empty, got {theta0!r}")
    for name, tensor in theta0.items():
        require_float("project", f"theta0[{name!r}]", tensor)
        if tensor.device != z.device:
            raise ValueError(f"project: theta0[{name!r}] must be on {z.device} as z is, got {describe(tensor)}")
    require_int("project", "seed", seed)
    require_choice("project", "normalize", normalize, NORMALIZE)
    chosen = projection_of("project", projection)
    if not chosen.normalizes and normalize != "global":
        raise ValueError(f"project: normalize must be 'global' for {chosen.kind}, got {normalize!r}")
    if step is not None and (not chosen.redraws or step.ndim or step.dtype != torch.int64 or step.device != z.device):
        raise ValueError(f"project: step must be None or an int64 scalar on {z.device}, got {describe(step)}")
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in theta0.items())
    of = _map_of(chosen, shapes, z.shape[-1], seed, normalize)
    rows = {name: k for k, name in enumerate(of.names)}
    alike: dict[torch.dtype, list[str]] = {}
    for name, tensor in theta0.items():
        alike.setdefault(tensor.dtype, []).append(name)
    found: dict[str, Tensor] = {}
    for names in alike.values():
        thetas = of.project(z, [theta0[n] for n in names], [rows[n] for n in names], None, step)
        found.update(zip(names, thetas, strict=True))
    return {name: found[name] for name in theta0}


@lru_cache(maxsize=16)
def _map_of(
    projection: Projection, shapes: tuple[tuple[str, tuple[int, ...]], ...], dim: int, seed: int, normalize: str
) -> Map:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes}
    sigmas = {name: fan_in_sigma(shape) for name, shape in shapes}
    return projection.map_of(sizes, dim, seed, normalize, sigmas)
