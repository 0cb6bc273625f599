"""SpectralNorm: the transform, and ``wx.spectral_norm``, the drop-in for torch's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._torch import fake_or_proxy_mode, functorch_active
from ..numerics import opmath
from ..transform import Transform, describe, require_float
from . import reference
from .function import apply, apply_list
from .op import spectral_norm_fwd, state_size

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)  # the layers that autocast casts to half
_WARM_UP = 15  # iterations at the start, as torch's


class SpectralNorm(Transform):
    r"""Divides a weight by its largest singular value, estimated by power iteration (Miyato et al. 2018, Algorithm 1).

    The weight [..., d, ...] is read as a matrix [h, w]: axis ``dim`` in front, the other axes flattened.

    Args:
        n_power_iterations: iterations a step in training mode; none are made in eval mode.
        eps: lower limit of the norms that the iteration divides by.
        dim: the axis of the outputs; ``None``: 1 for transposed convolutions, else 0.
        order: ``"u_first"`` as ``torch.nn.utils.parametrizations.spectral_norm``, ``"v_first"`` as torch's old hook.
        bound: ``None`` divides by sigma; a number c > 0 divides by max(1, sigma / c), so that the norm is at most c.
        gain: multiplies the result.
        learn_gain: make ``gain`` a Parameter of the transform.
        cache: ``False`` iterates at every read in training mode, as torch does, not once per value of the weight.

    State: buffers ``u`` [h] and ``v`` [w], unit vectors, float32 for half weights, else of the weight's dtype. A vector
    (1-D weight) is divided by its norm and has none. A zero weight gives zeros and passes gradients; a weight with NaN
    or Inf gives a weight that is not finite and leaves the state alone.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """

    groupable: ClassVar[bool] = True
    u: Tensor | None
    v: Tensor | None

    def __init__(
        self,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        dim: int | None = None,
        order: Literal["u_first", "v_first"] = "u_first",
        bound: float | None = None,
        gain: float = 1.0,
        learn_gain: bool = False,
        cache: bool = True,
    ) -> None:
        super().__init__()
        _require_int("n_power_iterations", n_power_iterations, 0)
        _require_positive("eps", eps)
        if dim is not None:
            _require_int("dim", dim)
        if order not in ("u_first", "v_first"):
            raise ValueError(f"SpectralNorm: order must be 'u_first' or 'v_first', got {order!r}")
        if bound is not None:
            _require_positive("bound", bound)
        _require_number("gain", gain)
        self.n_power_iterations = n_power_iterations
        self.eps = float(eps)
        self.dim = dim
        self.order = order
        self.bound = None if bound is None else float(bound)
        self.cache = bool(cache)
        self.autocast = False
        self.fixed_gain = float(gain)
        self.gain = nn.Parameter(torch.tensor(float(gain))) if learn_gain else None
        self.register_buffer("u", None)
        self.register_buffer("v", None)

    def extra_repr(self) -> str:
        parts = [f"n_power_iterations={self.n_power_iterations}", f"dim={self.dim}"]
        parts += [f"order={self.order!r}"] if self.order != "u_first" else []
        parts += [f"bound={self.bound}"] if self.bound is not None else []
        parts += ["learn_gain=True"] if self.gain is not None else []
        parts += [f"gain={self.fixed_gain}"] if self.gain is None and self.fixed_gain != 1 else []
        return ", ".join(parts)

    # attaching, and the state

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        require_float("SpectralNorm", "the weight", raw)
        if raw.ndim == 0:
            raise ValueError(f"SpectralNorm: the weight must have at least one axis, got {describe(raw)}")
        dim = self.dim if self.dim is not None else int(isinstance(module, _TRANSPOSED))
        if not -raw.ndim <= dim < raw.ndim:
            raise IndexError(f"SpectralNorm: dim must be in [{-raw.ndim}, {raw.ndim - 1}] for {describe(raw)}, got {dim}")
        self.dim = dim % raw.ndim
        self.autocast = isinstance(module, _AUTOCAST) and name == "weight"
        training = self.training if module is None else module.training
        self._draw(raw, _WARM_UP + (self.n_power_iterations if training else 0))

    def _axis(self, raw: Tensor) -> int:
        return 0 if self.dim is None else self.dim % raw.ndim

    @torch.no_grad()
    def _draw(self, raw: Tensor, n_iter: int) -> None:
        """New u and v: random (the draws of torch, in its order), then ``n_iter`` iterations."""
        if raw.ndim == 1:
            self.u = self.v = None
            return
        h, w = reference.matrix_shape(raw, self._axis(raw))
        u, v = (torch.empty(n, dtype=raw.dtype, device=raw.device).normal_() for n in (h, w))
        dtype = opmath(raw.dtype)
        self.u, self.v = (reference.unit(x.to(dtype), self.eps) for x in (u, v))
        self._settle(raw, n_iter)

    @torch.no_grad()
    def _settle(self, raw: Tensor, n_iter: int) -> None:
        """``n_iter`` iterations from the present u and v."""
        if n_iter and not raw.is_meta and raw.numel():
            assert self.u is not None and self.v is not None
            dim, v_first = self._axis(raw), self.order == "v_first"
            _, state = spectral_norm_fwd(raw, self.u, self.v, None, dim, n_iter, self.eps, v_first, None, None)
            self._commit(state)

    def reset(self, raw: Tensor) -> None:
        if raw.ndim == 1:
            return
        shape = reference.matrix_shape(raw, self._axis(raw))
        if self.u is not None and self.v is not None and (self.u.shape[0], self.v.shape[0]) == shape:
            norms = self.u.norm(), self.v.norm()
            if raw.is_meta or all(torch.isfinite(n) and n > 0 for n in norms):
                self.u, self.v = (x.to(raw.device, opmath(raw.dtype)) for x in (self.u, self.v))
                self._settle(raw, _WARM_UP)
                return
        self._draw(raw, _WARM_UP)

    def _commit(self, state: Tensor) -> None:
        """Copy u and v out of a state tensor, in place: DDP and CUDA graphs hold the buffers."""
        assert self.u is not None and self.v is not None
        h, w = self.u.shape[0], self.v.shape[0]
        with torch.no_grad():
            self.u.copy_(state[:h])
            self.v.copy_(state[h : h + w])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralNorm:
        before = self.u, self.v
        super()._apply(fn, recurse)
        for name, old in zip(("u", "v"), before, strict=True):
            new = getattr(self, name)
            if old is not None and new is not None and new.dtype != opmath(new.dtype):  # .half(): the state stays float32
                setattr(self, name, old.to(opmath(new.dtype)) if new.device == old.device else new.to(opmath(new.dtype)))
        return self

    # computing

    def _gain_tensor(self, raw: Tensor) -> Tensor | None:
        if self.gain is not None:
            return self.gain
        if self.fixed_gain == 1:
            return None
        return torch.full((), self.fixed_gain, dtype=opmath(raw.dtype), device=raw.device)

    def _out_dtype(self, raw: Tensor) -> torch.dtype | None:
        kind = raw.device.type
        if self.autocast and raw.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return None

    def _vectors(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        if raw.ndim == 1:
            dtype = opmath(raw.dtype)
            return torch.zeros_like(raw, dtype=dtype), torch.ones(1, dtype=dtype, device=raw.device)
        if self.u is None or self.v is None:
            raise RuntimeError("SpectralNorm: not attached to a weight yet; use wx.ComputedParameter or attach(weight)")
        return self.u, self.v

    def _iterations(self, raw: Tensor, advance: bool) -> int:
        return 1 if raw.ndim == 1 else self.n_power_iterations * advance

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        u, v = self._vectors(raw)
        n_iter = self._iterations(raw, advance)
        out, state = apply(
            raw, u, v, self._gain_tensor(raw), self._axis(raw), n_iter, self.eps, self.order == "v_first", self.bound,
            self._out_dtype(raw),
        )  # fmt: skip
        if n_iter and raw.ndim > 1 and _may_write():
            self._commit(state)
        return out

    def right_inverse(self, value: Tensor) -> Tensor:
        """``value`` itself, as in torch: reading it back gives value / sigma."""
        if self.u is None and value.ndim > 1:  # torch's register_parametrization shows the tensor here first
            self.attach(value)
        return value

    def group_key(self, raw: Tensor) -> Hashable:
        gain = self.gain is not None or self.fixed_gain != 1
        return raw.dtype, raw.device, self.eps, self.order, self.bound, gain, self._out_dtype(raw)

    @classmethod
    def compute_group(
        cls, transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]
    ) -> list[Tensor]:
        first = transforms[0]
        us, vs = zip(*(t._vectors(r) for t, r in zip(transforms, raws, strict=True)), strict=True)
        gains = [g for t, r in zip(transforms, raws, strict=True) if (g := t._gain_tensor(r)) is not None]
        dims = [t._axis(r) for t, r in zip(transforms, raws, strict=True)]
        n_iters = [t._iterations(r, a) for t, r, a in zip(transforms, raws, advance, strict=True)]
        outs, state = apply_list(
            raws, us, vs, gains, dims, n_iters, first.eps, first.order == "v_first", first.bound, first._out_dtype(raws[0])
        )
        if any(n_iters) and _may_write():
            sizes = [state_size(r, d) for r, d in zip(raws, dims, strict=True)]
            for t, raw, part, n_iter in zip(transforms, raws, state.split(sizes), n_iters, strict=True):
                if n_iter and raw.ndim > 1:
                    t._commit(part)
        return outs


def _may_write() -> bool:
    """Not inside torch.func transforms or under fake tensors: there the state is read and never written."""
    return torch.compiler.is_compiling() or not (functorch_active() or fake_or_proxy_mode())


def _require_int(name: str, value: object, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"SpectralNorm: {name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"SpectralNorm: {name} must be at least {least}, got {value}")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"SpectralNorm: {name} must be a number, got {value!r}")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"SpectralNorm: {name} must be finite, got {value}")


def _require_positive(name: str, value: object) -> None:
    _require_number(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"SpectralNorm: {name} must be positive, got {value}")


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Drop-in for ``torch.nn.utils.parametrizations.spectral_norm``: same arguments, iterates and errors."""
    from ..computed import ComputedParameter

    raw = getattr(module, name, None)
    if not isinstance(raw, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    if n_power_iterations <= 0:
        raise ValueError(f"spectral_norm: n_power_iterations must be positive, got {n_power_iterations}")
    setattr(module, name, ComputedParameter(raw, SpectralNorm(n_power_iterations, eps, dim)))
    return module
