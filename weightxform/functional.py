"""Every transform as a plain function: tensors in, tensors out, no state kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from . import per_sample
from ._torch import unrounded
from .checks import require_bool, require_choice, require_dim, require_int, require_number, require_positive
from .filter_mlp import function as _fm
from .filter_mlp.reference import ACTIVATIONS
from .filter_warp import function as _fw
from .modulation import function as _mo
from .numerics import FLOAT_DTYPES, opmath
from .spectral_norm import function as _sn
from .spectral_norm.reference import matrix_shape
from .subspace.maps import Map
from .subspace.projections import NORMALIZE, Projection, projection_of
from .subspace.select import fan_in_sigma
from .transform import describe, require_float
from .warp_matrix import function as _wm
from .warp_matrix.reference import INTERPOLATIONS, MOST_TAPS, PADDINGS


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
    _require_dtype("spectral_norm", dtype)
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


def filter_warp(weight: Tensor, matrix: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Every filter with its taps mapped: ``out[..., p] = sum over q of  matrix[p, q] weight[..., q]``.

    Args:
        weight: [O, I, *kernel], any strides; float64, float32, bfloat16, float16. K > 0 is the number of taps.
        matrix: [K, K], or [B, K, K] for B conditions, of one of these dtypes; converted to that of the sums (float64
            for a float64 weight, else float32). [B, E, K, K] with a weight [E, O, I, *kernel]: the sum over E banks.
        dtype: of the result; default, the weight's.

    Returns:
        [O, I, *kernel] or [B, O, I, *kernel]. Differentiable in both, any number of times.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    require_float("filter_warp", "weight", weight)
    require_float("filter_warp", "matrix", matrix)
    banks = matrix.ndim == 4
    if weight.ndim < 3 + banks:
        shape = "[E, O, I, *kernel]" if banks else "[O, I, *kernel]"
        raise ValueError(f"filter_warp: weight must be {shape}, got {describe(weight)}")
    taps = weight.shape[2 + banks :].numel()
    if not taps or (banks and not weight.shape[0]):
        raise ValueError(f"filter_warp: weight must have a tap{' and a bank' * banks}, got {describe(weight)}")
    expected = (weight.shape[0], taps, taps) if banks else (taps, taps)
    if matrix.ndim not in (2, 3, 4) or tuple(matrix.shape[-len(expected) :]) != expected:
        shape = f"[B, {weight.shape[0]}, {taps}, {taps}]" if banks else f"[{taps}, {taps}] or [B, {taps}, {taps}]"
        raise ValueError(f"filter_warp: matrix must be {shape} for this weight, got {describe(matrix)}")
    _require_device("filter_warp", "matrix", matrix, weight)
    _require_dtype("filter_warp", dtype)
    bank = weight if banks else weight[None]
    a = matrix if banks else matrix[:, None] if matrix.ndim == 3 else matrix[None, None]
    out = _fw.apply(bank.reshape(bank.shape[0], -1, taps), a, dtype)
    return out.reshape((*a.shape[:1], *bank.shape[1:]) if matrix.ndim > 2 else weight.shape)


def rotation_matrix(
    angle: Tensor | float,
    kernel_size: int | tuple[int, int],
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    padding: Literal["zeros", "border"] = "zeros",
    *,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The matrix for :func:`filter_warp` that turns a kernel counterclockwise, as ``torch.rot90`` does for pi/2.

    Args:
        angle: in radians, any; a number, a 0-dim tensor, or [B]. float64, or float32 (half types are converted to it).
        kernel_size: k, or (height, width).
        interpolation: between taps, as ``grid_sample(mode=..., align_corners=True)``.
        padding: what lies outside the kernel: zeros, or its nearest tap.
        dilation: the distance of two taps; only its ratio matters.

    Returns:
        [K, K] or [B, K, K] with K = height * width. Differentiable in ``angle``; one-sided where a tap lands on a tap.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    if not isinstance(angle, Tensor):
        require_number("rotation_matrix", "angle", angle)
        angle = torch.tensor(angle, dtype=opmath(torch.get_default_dtype()))
    require_float("rotation_matrix", "angle", angle)
    if angle.ndim > 1:
        raise ValueError(f"rotation_matrix: angle must be a number, 0-dim or [B], got {describe(angle)}")
    options = _warp_options("rotation_matrix", "rotate", kernel_size, interpolation, padding, dilation)
    a = _wm.apply(angle.reshape(-1, 1).to(opmath(angle.dtype)), options)
    return a if angle.ndim else a[0]


def affine_matrix(
    theta: Tensor,
    kernel_size: int | tuple[int, int],
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    padding: Literal["zeros", "border"] = "zeros",
    *,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The matrix for :func:`filter_warp` of an affine warp: the new tap at (x, y) is the old kernel at theta (x, y, 1).

    Args:
        theta: [2, 3] or [B, 2, 3], rows for x and y, positions from the middle of the kernel, x to the right, y down,
            in units of the input (of taps, without dilation). float64 or float32; half types are converted to float32.
        kernel_size, interpolation, padding, dilation: as in :func:`rotation_matrix`.

    Returns:
        [K, K] or [B, K, K]. Differentiable in ``theta``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    require_float("affine_matrix", "theta", theta)
    if theta.ndim not in (2, 3) or tuple(theta.shape[-2:]) != (2, 3):
        raise ValueError(f"affine_matrix: theta must be [2, 3] or [B, 2, 3], got {describe(theta)}")
    options = _warp_options("affine_matrix", "affine", kernel_size, interpolation, padding, dilation)
    a = _wm.apply(theta.reshape(-1, 6).to(opmath(theta.dtype)), options)
    return a if theta.ndim == 3 else a[0]


def _warp_options(
    owner: str, kind: str, kernel_size: object, interpolation: object, padding: object, dilation: object
) -> _wm.Options:
    height, width = per_sample.pair(owner, "kernel_size", kernel_size, 1)
    if max(height, width) > MOST_TAPS:
        raise ValueError(f"{owner}: kernel_size must be at most {MOST_TAPS}, got {kernel_size!r}")
    dy, dx = per_sample.pair(owner, "dilation", dilation, 1)
    require_choice(owner, "interpolation", interpolation, INTERPOLATIONS)
    require_choice(owner, "padding", padding, PADDINGS)
    return _wm.Options(kind, height, width, float(dy), float(dx), str(interpolation), str(padding))


def modulate(
    weight: Tensor, style: Tensor, demodulate: bool = True, *, eps: float = 1e-8, dtype: torch.dtype | None = None
) -> Tensor:
    """A filter bank for each sample: its input channels scaled by ``style``, then each output's filter to norm 1.

    Args:
        weight: [O, I, *kernel], any strides; float64, float32, bfloat16, float16.
        style: [N, I], or [I] for one sample; converted to the dtype of the sums (float64 for a float64 weight, else
            float32), in which everything but the result is, so that float16 neither overflows nor underflows.
        demodulate: divide by ``sqrt(sum of squares + eps)`` of each output's filter.
        dtype: of the result; default, the weight's.

    Returns:
        [N, O, I, *kernel], or [O, I, *kernel] for [I]. Differentiable in both, any number of times.

    Source: Karras et al. 2020, equations 1 and 3; see ``weightxform/modulation/reference.py``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    require_float("modulate", "weight", weight)
    require_float("modulate", "style", style)
    if weight.ndim < 2:
        raise ValueError(f"modulate: weight must be [O, I, *kernel], got {describe(weight)}")
    if style.ndim not in (1, 2) or style.shape[-1] != weight.shape[1]:
        shape = f"[N, {weight.shape[1]}] or [{weight.shape[1]}]"
        raise ValueError(f"modulate: style must be {shape} for weight {describe(weight)}, got {describe(style)}")
    require_bool("modulate", "demodulate", demodulate)
    require_positive("modulate", "eps", eps)
    _require_device("modulate", "style", style, weight)
    _require_dtype("modulate", dtype)
    styles = style if style.ndim == 2 else style[None]
    taps = weight.shape[2:].numel()
    out = _mo.apply(weight.reshape(*weight.shape[:2], taps), styles, demodulate, eps, dtype)
    return out.reshape((styles.shape[0], *weight.shape) if style.ndim == 2 else weight.shape)


def filter_mlp(
    weight: Tensor,
    condition: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: Literal["relu", "silu", "tanh"] = "relu",
    residual: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Every filter mapped by one small network of its taps and a condition: ``w + w2 act(w1 [w, c] + b1) + b2``.

    Args:
        weight: [O, I, *kernel], K > 0 taps each; float64, float32, bfloat16, float16.
        condition: [n], or [B, n] for B of them.
        w1, b1, w2, b2: [H, K + n] (the columns of the taps first), [H], [K, H], [K]. These and the condition are
            converted to the dtype of the sums: float64 for a float64 weight, else float32.
        activation: of the hidden layer.
        residual: add the filter itself.
        dtype: of the result; default, the weight's.

    Returns:
        [O, I, *kernel] or [B, O, I, *kernel]. Differentiable in all tensors, any number of times; the hidden layer of
        B O I H numbers is never stored.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    for name, tensor in {"weight": weight, "condition": condition, "w1": w1, "b1": b1, "w2": w2, "b2": b2}.items():
        require_float("filter_mlp", name, tensor)
        _require_device("filter_mlp", name, tensor, weight)
    if weight.ndim < 3:
        raise ValueError(f"filter_mlp: weight must be [O, I, *kernel], got {describe(weight)}")
    if condition.ndim not in (1, 2):
        raise ValueError(f"filter_mlp: condition must be [n] or [B, n], got {describe(condition)}")
    taps, hidden = weight.shape[2:].numel(), w1.shape[0] if w1.ndim else 0
    if not taps:
        raise ValueError(f"filter_mlp: weight must have a tap, got {describe(weight)}")
    shapes = {
        "w1": (w1, (hidden, taps + condition.shape[-1])),
        "b1": (b1, (hidden,)),
        "w2": (w2, (taps, hidden)),
        "b2": (b2, (taps,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape or not hidden:
            expected = list(shape) if hidden else f"[H, {taps + condition.shape[-1]}] with H > 0"
            raise ValueError(f"filter_mlp: {name} must be {expected}, got {describe(tensor)}")
    require_choice("filter_mlp", "activation", activation, ACTIVATIONS)
    require_bool("filter_mlp", "residual", residual)
    _require_dtype("filter_mlp", dtype)
    wide = opmath(weight.dtype)
    conditions = (condition if condition.ndim == 2 else condition[None]).to(wide)
    # their gradients are one cat; of a copy, because torch is strict with writes to what was split
    of_taps, of_condition = w1.to(wide, copy=True).split([taps, condition.shape[-1]], 1)
    v = torch.addmm(*map(unrounded, (b1.to(wide), conditions, of_condition.T)))
    out = _fm.apply(weight.reshape(-1, taps), v, of_taps, w2, b2, activation, residual, dtype)
    return out.reshape((conditions.shape[0], *weight.shape) if condition.ndim == 2 else weight.shape)


def _require_device(owner: str, name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{owner}: {name} must be on {weight.device} as weight is, got {describe(tensor)}")


def _require_dtype(owner: str, dtype: object) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{owner}: dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
