"""SpectralNorm: the transform."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._torch import autocast_dtype, in_backward
from ..checks import require_bool, require_choice, require_dim, require_int, require_number, require_positive
from ..numerics import opmath
from ..transform import Repeat, Transform, describe, require_float
from . import checkpoint, reference
from .conv_operator import Geometry, apply_conv
from .function import apply, apply_list
from .members import commit, commit_moved, may_write, members
from .op import spectral_norm_state_list
from .repeated import Prepared
from .vector import apply_vector

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
        operator: ``"matrix"``: sigma of the reshaped weight, as torch. ``"conv"``: sigma of the convolution that the
            module computes (its stride, padding, dilation and groups) from inputs of ``input_size``.
        input_size: the spatial size of the input, one int an axis; for ``operator="conv"`` only.
        cache: ``False`` iterates at every read in training mode, as torch does, not once per value of the weight.

    State: buffers ``u`` [h] and ``v`` [w], unit vectors, float32 for half weights, else of the weight's dtype; they are
    normalized where they are read without an iteration, so averages of them serve. A vector (1-D weight) is divided by
    its norm and has none; with ``operator="conv"`` h and w are the elements of one output and of one input. A zero
    weight gives zeros and passes gradients; a weight with NaN or Inf gives a weight that is not finite and leaves the
    state alone.

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what it must be and what it was.
    """

    groupable: ClassVar[bool] = True
    keeps_graph: ClassVar[bool] = True
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
        operator: Literal["matrix", "conv"] = "matrix",
        input_size: Sequence[int] | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__()
        owner = "SpectralNorm"
        require_int(owner, "n_power_iterations", n_power_iterations, 0)
        require_positive(owner, "eps", eps)
        if dim is not None:
            require_int(owner, "dim", dim)
        require_choice(owner, "order", order, ("u_first", "v_first"))
        if bound is not None:
            require_positive(owner, "bound", bound)
        require_number(owner, "gain", gain)
        require_bool(owner, "learn_gain", learn_gain)
        require_choice(owner, "operator", operator, ("matrix", "conv"))
        require_bool(owner, "cache", cache)
        if operator == "conv":
            if input_size is None:
                raise ValueError(f"{owner}: operator='conv' needs input_size, the spatial size of the input; got None")
            if isinstance(input_size, (str, bytes)) or not isinstance(input_size, Sequence):
                raise TypeError(f"{owner}: input_size must be a sequence of ints, got {input_size!r}")
            for size in input_size:
                require_int(owner, "input_size", size, 1)
            if dim is not None:
                raise ValueError(f"{owner}: dim has no meaning for operator='conv' and must be None, got {dim}")
        elif input_size is not None:
            raise ValueError(f"{owner}: input_size is for operator='conv' only, got {input_size!r}")
        self.n_power_iterations = n_power_iterations
        self.eps = float(eps)
        self.dim = dim
        self.order = order
        self.bound = None if bound is None else float(bound)
        self.operator = operator
        self.input_size = None if input_size is None else tuple(input_size)
        self.cache = cache
        self.autocast = False
        self.geometry: Geometry | None = None
        self.attached = False
        self._inverse = "pure"  # under torch's register_parametrization: what the next right_inverse means
        self.fixed_gain = float(gain)
        self.gain = nn.Parameter(torch.tensor(float(gain))) if learn_gain else None
        self.register_buffer("u", None)
        self.register_buffer("v", None)

    def extra_repr(self) -> str:
        parts = [f"n_power_iterations={self.n_power_iterations}", f"dim={self.dim}"]
        if self.operator == "conv":
            parts[1:] = ["operator='conv'", f"input_size={self.input_size}"]
        parts += [f"order={self.order!r}"] if self.order != "u_first" else []
        parts += [f"bound={self.bound}"] if self.bound is not None else []
        parts += ["learn_gain=True"] if self.gain is not None else []
        parts += [f"gain={self.fixed_gain}"] if self.gain is None and self.fixed_gain != 1 else []
        parts += ["cache=False"] if not self.cache else []
        return ", ".join(parts)

    # attaching, and the state

    def attach(self, raw: Tensor, module: nn.Module | None = None, name: str = "weight") -> None:
        """Check that the transform fits ``raw``; then draw u and v and make 15 iterations (plus a step if training)."""
        training = self.training if module is None else module.training
        self._attach(raw, module, name, _WARM_UP + (self.n_power_iterations if training else 0))

    def _attach(self, raw: Tensor, module: nn.Module | None, name: str, n_iter: int) -> None:
        if self.attached:
            raise ValueError("SpectralNorm: this instance serves another weight already; give each weight its own")
        require_float("SpectralNorm", "the weight", raw)
        if raw.ndim == 0:
            raise ValueError(f"SpectralNorm: the weight must have at least one axis, got {describe(raw)}")
        dim = self.dim if self.dim is not None else int(isinstance(module, _TRANSPOSED) and raw.ndim > 1)
        dim = require_dim("SpectralNorm", dim, raw.ndim, describe(raw))
        if self.operator == "conv":
            assert self.input_size is not None
            self.geometry = Geometry.of(module, name, raw, self.input_size)
        self.dim = dim
        self.autocast = isinstance(module, _AUTOCAST) and name == "weight"
        if self.gain is not None:
            value = self.fixed_gain if self.gain.is_meta else self.gain.detach()
            gain = torch.empty((), dtype=opmath(raw.dtype), device=raw.device).copy_(torch.as_tensor(value))
            self.gain = nn.Parameter(gain, requires_grad=self.gain.requires_grad)
        u, v = self._buffers["u"], self._buffers["v"]
        if u is not None and v is not None and (u.shape[0], v.shape[0]) == self._sizes(raw):  # they were loaded
            self._store(*(x.to(raw.device, opmath(raw.dtype)) for x in (u, v)))
        else:
            self._draw(raw, n_iter)
        self.attached = True

    def _sizes(self, raw: Tensor) -> tuple[int, int]:
        """Lengths of u and v."""
        return reference.matrix_shape(raw, self._axis(raw)) if self.geometry is None else self.geometry.lengths(raw)

    def _axis(self, raw: Tensor) -> int:
        return 0 if self.dim is None else self.dim % raw.ndim

    @torch.no_grad()
    def _draw(self, raw: Tensor, n_iter: int) -> None:
        """New u and v: random (the draws of torch, in its order), then ``n_iter`` iterations."""
        if raw.ndim == 1:
            self.u = self.v = None
            return
        u, v = (torch.empty(n, dtype=raw.dtype, device=raw.device).normal_() for n in self._sizes(raw))
        self._store(*(reference.unit(x.to(opmath(raw.dtype)), self.eps) for x in (u, v)))
        self._settle(raw, n_iter)

    @torch.no_grad()
    def _store(self, u: Tensor, v: Tensor) -> None:
        """Write u and v; in place where they fit, since DDP and CUDA graphs hold the buffers."""
        for name, new in (("u", u), ("v", v)):
            old = self._buffers[name]
            if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
                old.copy_(new)
            else:
                self._buffers[name] = new
                Transform.configured += 1

    @torch.no_grad()
    def _settle(self, raw: Tensor, n_iter: int) -> None:
        """``n_iter`` iterations from the present u and v."""
        if n_iter and not raw.is_meta and raw.numel():
            u, v = self._vectors(raw)
            commit([u, v], self._call(raw, u, v, None, n_iter, None)[1])

    def reset(self, raw: Tensor) -> None:
        """15 iterations on ``raw`` from the present u and v, or from new ones where those are no directions for it."""
        if raw.ndim == 1:
            return
        u, v = self._buffers["u"], self._buffers["v"]
        if (
            u is not None
            and v is not None
            and (u.shape[0], v.shape[0]) == self._sizes(raw)
            and (raw.is_meta or (not u.is_meta and all(1e-3 < x.norm() < 1e3 for x in (u, v))))
        ):
            self._store(*(reference.unit(x, self.eps).to(raw.device, opmath(raw.dtype)) for x in (u, v)))
            self._settle(raw, _WARM_UP)
        else:
            self._draw(raw, _WARM_UP)

    def reset_parameters(self) -> None:
        """Set a learned gain back to its first value."""
        if self.gain is not None:
            with torch.no_grad():
                self.gain.fill_(self.fixed_gain)

    def state(self) -> tuple[Tensor, ...]:
        u, v = self._buffers["u"], self._buffers["v"]
        vectors = () if u is None or v is None else (u, v)
        return vectors if self.gain is None else (*vectors, self.gain)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralNorm:
        before = self._buffers["u"], self._buffers["v"]
        gain_was_meta = self.gain is not None and self.gain.is_meta
        super()._apply(fn, recurse)
        for name, old in zip(("u", "v"), before, strict=True):
            new = self._buffers[name]
            if old is None or new is None:
                continue
            dtype = opmath(new.dtype)
            if old.is_meta and not new.is_meta:  # to_empty: what lies there is no direction, and may be NaN
                self._buffers[name] = reference.unit(torch.randn_like(new, dtype=dtype), self.eps)
            elif new.dtype != dtype:  # .half(): the state stays float32, unrounded
                self._buffers[name] = (new if old.is_meta else old).to(new.device, dtype)
        if self.gain is not None and gain_was_meta and not self.gain.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("u", "v"):
            loaded, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(loaded, Tensor):
                state_dict[prefix + name] = loaded = loaded.to(opmath(loaded.dtype))
                if own is None and not self.attached:  # used on its own: the state comes before the weight
                    self._buffers[name] = torch.empty_like(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adopt_state_dict(self, state_dict: dict[str, Any], prefix: str, name: str) -> None:
        """Rename torch's keys for a spectrally normalized ``name`` to ours, in place; see :mod:`.checkpoint`."""
        checkpoint.adopt(state_dict, prefix, name, self._axis)

    # computing

    def forward(self, raw: Tensor) -> Tensor:
        """The weight, for ``torch.nn.utils.parametrize``: iterates in training mode, except in a recomputation."""
        advance = self.training
        if not torch.compiler.is_compiling():
            if not self.attached and may_write():  # registered on top of another parametrization
                self._attach(raw, None, "weight", _WARM_UP)
                self._inverse = "registration"
            advance = advance and not in_backward()
        return self.compute(raw, advance)

    def compute(self, raw: Tensor, advance: bool) -> Tensor:
        gain = None if self.gain is None and self.fixed_gain == 1 else self._gain_tensor(raw)
        if raw.ndim == 1:
            return apply_vector(raw, gain, self.eps, self.bound, self._out_dtype(raw))
        u, v = self._vectors(raw)
        n_iter = self.n_power_iterations if advance else 0
        if not n_iter:
            u, v = reference.unit(u, self.eps), reference.unit(v, self.eps)
        out, state = self._call(raw, u, v, gain, n_iter, self._out_dtype(raw))
        if n_iter and may_write():
            commit([u, v], state)
        return out

    def _call(
        self, raw: Tensor, u: Tensor, v: Tensor, gain: Tensor | None, n_iter: int, out_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        v_first = self.order == "v_first"
        if self.geometry is not None:
            return apply_conv(raw, u, v, gain, self.geometry, n_iter, self.eps, v_first, self.bound, out_dtype)
        return apply(raw, u, v, gain, self._axis(raw), n_iter, self.eps, v_first, self.bound, out_dtype)

    def _gain_tensor(self, raw: Tensor) -> Tensor | None:
        if self.gain is not None:
            return self.gain
        if self.fixed_gain == 1:
            return None
        return torch.full((), self.fixed_gain, dtype=opmath(raw.dtype), device=raw.device)

    def _out_dtype(self, raw: Tensor) -> torch.dtype | None:
        return autocast_dtype(raw.device.type) if self.autocast and raw.dtype == torch.float32 else None

    def _vectors(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self._buffers["u"], self._buffers["v"]
        if u is None or v is None:
            raise RuntimeError("SpectralNorm: not attached to a weight yet; use wx.ComputedParameter or attach(weight)")
        return u, v

    def right_inverse(self, value: Tensor) -> Tensor:
        """``value`` itself, as in torch: reading it back gives value / sigma.

        Under ``torch.nn.utils.parametrize``, which has no other call for it, an assignment also makes u and v fit.
        """
        if not self.attached:
            self._attach(value, None, "weight", _WARM_UP)
            self._inverse = "assignment"
        elif self._inverse == "registration":
            self._inverse = "assignment"
        elif self._inverse == "assignment":
            self.reset(value)
        return value

    def group_key(self, raw: Tensor) -> Hashable:
        if raw.ndim == 1 or self.geometry is not None:
            return None
        gain = self.gain is not None or self.fixed_gain != 1
        return raw.dtype, raw.device, self.eps, self.order, self.bound, gain, self._out_dtype(raw)

    @classmethod
    def compute_group(cls, transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]) -> list[Tensor]:
        arguments = _list_arguments(transforms, raws, advance)
        outs, state = apply_list(*arguments)
        commit_moved(arguments[1], arguments[2], arguments[5], state)
        return outs

    @classmethod
    def repeat_group(
        cls, transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool], accumulates: bool
    ) -> Repeat | None:
        for t, raw, a in zip(transforms, raws, advance, strict=True):
            if not (a and t.n_power_iterations) or t.group_key(raw) is None:
                return None  # without an iteration u and v are read as copies; without a key there is no list op
        prepared = Prepared.of(_list_arguments(transforms, raws, advance), accumulates)
        return None if prepared is None else prepared.apply

    # for folded layers

    @property
    def foldable(self) -> bool:
        return self.operator == "matrix" and self._buffers["u"] is not None

    def compute_state(self, raw: Tensor, advance: bool) -> Tensor:
        """[u, v, sigma] that :meth:`compute` would use; see ``folded.py``."""
        return self.compute_state_group([self], [raw], [advance])[0]

    @classmethod
    @torch.no_grad()
    def compute_state_group(
        cls, transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]
    ) -> list[Tensor]:
        first = transforms[0]
        us, vs, dims, n_iters = members(transforms, raws, advance)
        state = spectral_norm_state_list(list(raws), us, vs, dims, n_iters, first.eps, first.order == "v_first")
        commit_moved(us, vs, n_iters, state)
        sizes = [u.shape[0] + v.shape[0] + 1 for u, v in zip(us, vs, strict=True)]
        return list(state.split_with_sizes(sizes)) if len(sizes) > 1 else [state]


def _list_arguments(transforms: Sequence[Any], raws: Sequence[Tensor], advance: Sequence[bool]) -> tuple:
    """Those of the list op, for members of one :meth:`SpectralNorm.group_key`."""
    first = transforms[0]
    us, vs, dims, n_iters = members(transforms, raws, advance)
    every_gain = [t._gain_tensor(r) for t, r in zip(transforms, raws, strict=True)]
    gains = [g for g in every_gain if g is not None]
    v_first, out_dtype = first.order == "v_first", first._out_dtype(raws[0])
    return list(raws), us, vs, gains, dims, n_iters, first.eps, v_first, first.bound, out_dtype
