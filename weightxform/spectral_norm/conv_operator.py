"""The norm of a convolution itself: its op and autograd Function.

A convolution without its bias is a linear map A(W) from one input [c_in, *size] to one output, and linear in W. Power
iteration runs on it as ``reference.py`` has it for a matrix, with A v and A'u as a convolution and its adjoint:

    sigma = <u, A(W) v> = <D, W>,  D = d sigma / dW          (u and v constants)
    out = gain s(sigma) W,  dW = gain (s dout + s' <dout, W> D)

No bound of the reshaped weight gives this norm (Sedghi et al. 2019, https://arxiv.org/abs/1805.10408); the iteration is
that of Ryu et al. 2019, https://arxiv.org/abs/1905.05406. Zero weights and weights that are not finite: as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autograd import dense, differentiable, guard, inlined, joined, through_ops, variant
from ..numerics import opmath
from ..registry import Case, Op, register
from ..transform import describe
from . import reference
from .op import _upstream

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class Geometry(NamedTuple):
    """What makes a weight a linear map, besides its values. One entry an axis of the input."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool
    pad: tuple[int, ...]  # (before, after) of each axis, made before the convolution; () for none
    mode: str  # what that padding holds: zeros, circular, reflect, replicate

    @staticmethod
    def of(module: nn.Module | None, name: str, raw: Tensor, input_size: tuple[int, ...]) -> Geometry:
        """The geometry of ``module``; ``ValueError`` where it is no convolution or ``input_size`` does not fit."""
        if not isinstance(module, _CONVOLUTIONS) or name != "weight":
            owner = "no module" if module is None else f"{name!r} of {type(module).__name__}"
            raise ValueError(
                "SpectralNorm: operator='conv' must be attached to the weight of a Conv1d, 2d, 3d or ConvTranspose1d, "
                f"2d, 3d, got {owner}"
            )
        axes = raw.ndim - 2
        if len(input_size) != axes:
            raise ValueError(f"SpectralNorm: input_size must have {axes} entries for {describe(raw)}, got {input_size}")
        pad: tuple[int, ...] = ()
        padding = (0,) * axes
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            backwards = module._reversed_padding_repeated_twice
            pad = tuple(p for i in reversed(range(axes)) for p in backwards[2 * i : 2 * i + 2])
        else:
            padding = tuple(module.padding)
        if not any(pad):
            pad = ()
        geometry = Geometry(
            input_size, tuple(module.stride), padding, tuple(module.dilation), tuple(module.output_padding),
            module.groups, isinstance(module, _TRANSPOSED), pad, module.padding_mode,
        )  # fmt: skip
        limit = {"circular": 0, "reflect": -1}.get(geometry.mode)
        if limit is not None and any(p > input_size[i // 2] + limit for i, p in enumerate(pad)):
            raise ValueError(f"SpectralNorm: input_size is too small for {geometry.mode} padding {pad}: {input_size}")
        if min(geometry.output(raw)[1:]) < 1:
            raise ValueError(
                f"SpectralNorm: input_size must leave an output of at least 1, got {input_size} for {describe(raw)}"
            )
        return geometry

    def input(self, weight: Tensor) -> tuple[int, ...]:
        return weight.shape[0] if self.transposed else weight.shape[1] * self.groups, *self.size

    def output(self, weight: Tensor) -> tuple[int, ...]:
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        sizes = []
        for i, n in enumerate(self.size):
            reach = self.dilation[i] * (weight.shape[i + 2] - 1)
            if self.transposed:
                sizes.append((n - 1) * self.stride[i] - 2 * self.padding[i] + reach + self.output_padding[i] + 1)
            else:
                padded = n + sum(self.pad[2 * i : 2 * i + 2]) + 2 * self.padding[i]
                sizes.append((padded - reach - 1) // self.stride[i] + 1)
        return channels, *sizes

    def lengths(self, weight: Tensor) -> tuple[int, int]:
        """Elements of one output and of one input."""
        (c_out, *out), (c_in, *size) = self.output(weight), self.input(weight)
        return c_out * _product(out), c_in * _product(size)

    def _sources(self, axis: int, device: torch.device) -> Tensor:
        """Which input element each element of the padded axis repeats."""
        n, (before, after) = self.size[axis], self.pad[2 * axis : 2 * axis + 2]
        at = torch.arange(-before, n + after, device=device)
        if self.mode == "circular":
            return at % n
        if self.mode == "replicate":
            return at.clamp(0, n - 1)
        return (n - 1) - ((n - 1) - at.abs()).abs()  # reflect

    def padded(self, x: Tensor) -> Tensor:
        """x [1, c, *size] with its padding."""
        if self.pad and self.mode == "zeros":
            backwards = [p for i in reversed(range(len(self.size))) for p in self.pad[2 * i : 2 * i + 2]]
            return nn.functional.pad(x, backwards)
        for axis in range(len(self.pad) // 2):
            x = x.index_select(axis + 2, self._sources(axis, x.device))
        return x

    def unpadded(self, y: Tensor) -> Tensor:
        """The adjoint of :meth:`padded`."""
        for axis in range(len(self.pad) // 2):
            n, before = self.size[axis], self.pad[2 * axis]
            if self.mode == "zeros":
                y = y.narrow(axis + 2, before, n)
            else:
                shape = [n if i == axis + 2 else s for i, s in enumerate(y.shape)]
                y = y.new_zeros(shape).index_add_(axis + 2, self._sources(axis, y.device), y)
        return y

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """A(weight) v, flat."""
        x = self.padded(v.reshape(1, *self.input(weight)))
        return torch.ops.aten.convolution(x, weight, None, *self._options()).reshape(-1)

    def adjoint(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """A(weight)' u, flat; v gives its shape."""
        return self.unpadded(self._backward(weight, u, v, (True, False, False))[0]).reshape(-1)

    def slope(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """D: the gradient of <u, A(weight) v>. It depends on the shape of ``weight`` only."""
        return self._backward(weight, u, v, (False, True, False))[1]

    def _options(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def _backward(self, weight: Tensor, u: Tensor, v: Tensor, mask: tuple[bool, bool, bool]) -> Any:
        y, x = u.reshape(1, *self.output(weight)), self.padded(v.reshape(1, *self.input(weight)))
        return torch.ops.aten.convolution_backward(y, x, weight, None, *self._options(), mask)


def _product(sizes: Any) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n


def forward(weight: Tensor, u: Tensor, v: Tensor, gain: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, state [h + w + 1])."""
    geometry, (n_iter, eps, v_first, bound, out_dtype) = Geometry(*rest[:9]), rest[9:]
    dtype = opmath(weight.dtype)
    w, first_u, first_v = weight.to(dtype), u.to(dtype), v.to(dtype)
    u, v = first_u, first_v
    if n_iter == 0:
        sigma = u @ geometry.apply(w, v)
    else:
        for _ in range(n_iter):  # sigma comes with the last product
            if v_first:
                v = reference.unit(geometry.adjoint(w, u, v), eps)
                t = geometry.apply(w, v)
                u = reference.unit(t, eps)
                sigma = u @ t
            else:
                u = reference.unit(geometry.apply(w, v), eps)
                z = geometry.adjoint(w, u, v)
                v = reference.unit(z, eps)
                sigma = z @ v
        moved = torch.isfinite(sigma) & (sigma != 0)
        u, v = torch.where(moved, u, first_u), torch.where(moved, v, first_v)
    s, _ = reference.scale(sigma, bound)
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype)
    out.copy_(w * (s if gain is None else s * gain.to(dtype)))
    return out, torch.cat([u, v, sigma.reshape(1)])


def backward(dout: Tensor, weight: Tensor, state: Tensor, gain: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """(dweight, dgain)."""
    geometry, bound = Geometry(*rest[:9]), rest[9]
    dtype = state.dtype
    u, v, sigma = state.split([*geometry.lengths(weight), 1])
    g, w = dout.to(dtype), weight.to(dtype)
    s, ds = reference.scale(sigma.reshape(()), bound)
    radial = (g * w).sum()
    dweight = s * g + (ds * radial) * geometry.slope(w, u, v)
    if gain is not None:
        dweight = gain.to(dtype) * dweight
    out = torch.empty_like(weight)
    out.copy_(dweight)
    return out, s * radial


def _fake_fwd(weight, u, v, *rest):
    out = torch.empty_like(weight, dtype=rest[-1] or weight.dtype)
    return out, weight.new_empty(u.shape[0] + v.shape[0] + 1, dtype=opmath(weight.dtype))


def _fake_bwd(dout, weight, state, *rest):
    return torch.empty_like(weight), state.new_empty(())


# name: (module, input size, options)
_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict]] = {
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 7), {}),
    "conv1d_strided": (lambda: nn.Conv1d(4, 3, 5, stride=2, padding=2), (11,), {}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 4, 3), {}),
    "grouped_dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2), (7, 6), {"n_iter": 2}),
    "same_even": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (6, 5), {}),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (5, 6), {}),
    "reflect": (lambda: nn.Conv1d(3, 4, 5, padding=2, padding_mode="reflect"), (7,), {}),
    "replicate": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"), (4, 5), {}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5), {}),
    "eval": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 7), {"n_iter": 0}),
    "v_first": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 7), {"n_iter": 2, "v_first": True}),
    "gain_and_bound": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 7), {"gain": -0.3, "bound": 0.5}),
}


def _case_fwd(make_module: Callable[[], nn.Module], size: tuple[int, ...], options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        module = make_module().to("meta")
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        geometry = Geometry.of(module, "weight", weight, size)
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in geometry.lengths(weight))
        u, v = (reference.unit(x, 1e-12).to(opmath(dtype)).to(device) for x in (u, v))
        gain = options.get("gain")
        gain = None if gain is None else torch.tensor(gain, dtype=opmath(dtype), device=device)
        n_iter, v_first, bound = options.get("n_iter", 1), options.get("v_first", False), options.get("bound")
        return weight, u, v, gain, *geometry, n_iter, 1e-12, v_first, bound, None

    return make


def _case_bwd(make_module: Callable[[], nn.Module], size: tuple[int, ...], options: dict) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        args = _case_fwd(make_module, size, options)(dtype, device, generator)
        weight, gain, geometry, bound = args[0], args[3], args[4:13], args[16]
        return _upstream(weight, dtype, generator), weight, forward(*args)[1], gain, *geometry, bound

    return make


_GEOMETRY = (
    "int[] size, int[] stride, int[] padding, int[] dilation, int[] output_padding, int groups, bool transposed, "
    "int[] pad, str mode"
)

spectral_norm_conv_fwd = register(
    Op(
        name="spectral_norm_conv_fwd",
        schema=f"(Tensor weight, Tensor u, Tensor v, Tensor? gain, {_GEOMETRY}, int n_iter, float eps, bool v_first, "
        "float? bound, ScalarType? out_dtype) -> (Tensor, Tensor)",
        reference=forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda weight, *rest: weight.nbytes + weight.numel() * (rest[-1] or weight.dtype).itemsize,
    )
)

spectral_norm_conv_bwd = register(
    Op(
        name="spectral_norm_conv_bwd",
        schema=f"(Tensor dout, Tensor weight, Tensor state, Tensor? gain, {_GEOMETRY}, float? bound) "
        "-> (Tensor, Tensor)",
        reference=backward,
        fake=_fake_bwd,
        cases={name: _case_bwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda dout, weight, *_: dout.nbytes + 2 * weight.nbytes,
    )
)


class ConvNormFunction(torch.autograd.Function):
    """``(weight, u, v, gain, geometry, n_iter, eps, v_first, bound, out_dtype) -> (out, state)``."""

    @staticmethod
    def forward(weight, u, v, gain, geometry, *options):
        return spectral_norm_conv_fwd(weight, u, v, gain, *geometry, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, _, _, ctx.gain, geometry, _, _, _, ctx.bound, _ = inputs
        ctx.geometry = tuple(geometry)
        ctx.state = output[1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.unchanged = guard("spectral_norm", (ctx.weight, ctx.gain))

    @staticmethod
    def backward(ctx, dout, dstate):
        if dout is None:
            return (None,) * 10
        if ctx.unchanged is not None:
            ctx.unchanged.check()
        backward = spectral_norm_conv_bwd if through_ops() else _differentiable_backward
        dweight, dgain = backward(dense(dout), ctx.weight, ctx.state, ctx.gain, *ctx.geometry, ctx.bound)
        dgain = dgain.to(ctx.gain.dtype) if ctx.gain is not None and ctx.needs_input_grad[3] else None
        return (dweight if ctx.needs_input_grad[0] else None, None, None, dgain, *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, weight, u, v, gain, *options):
        def member(tensor: Tensor | None, d: int | None, i: int) -> Any:
            return tensor if d is None or tensor is None else tensor.select(d, i)

        members = [
            apply_conv(*(member(t, d, i) for t, d in zip((weight, u, v, gain), in_dims, strict=False)), *options)
            for i in range(info.batch_size)
        ]
        outs, states = zip(*members, strict=True)
        return (torch.stack(outs), torch.stack(states)), (0, 0)


class ConvNormEager(ConvNormFunction):
    """The same with forward-mode AD, which Dynamo cannot trace."""

    @staticmethod
    def jvp(ctx, weight_t, u_t, v_t, gain_t, *_):
        w, s, ds, slope = _linear(ctx.weight, ctx.state, Geometry(*ctx.geometry), ctx.bound)
        tangent = torch.zeros_like(w)
        if weight_t is not None:
            tangent = s * weight_t + (ds * (slope * weight_t).sum()) * w
            if ctx.gain is not None:
                tangent = ctx.gain * tangent
        if gain_t is not None:
            tangent = tangent + gain_t * s * w
        return tangent.to(ctx.weight.dtype), None


def _linear(weight: Tensor, state: Tensor, geometry: Geometry, bound: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, s, s', D) with s and s' as functions of W, through sigma = <D, W>."""
    w = weight.to(state.dtype)
    u, v, _ = state.split([*geometry.lengths(weight), 1])
    slope = geometry.slope(w.detach(), u, v)
    return w, *reference.scale((slope * w).sum(), bound), slope


def _differentiable_backward(dout: Tensor, weight: Tensor, state: Tensor, gain: Tensor | None, *rest: Any):
    """(dweight, dgain) in torch ops that autograd and vmap see through."""
    w, s, ds, slope = _linear(weight, state, Geometry(*rest[:9]), rest[9])
    g = dout.to(w.dtype)
    radial = (g * w).sum()
    dweight = s * g + (ds * radial) * slope
    if gain is not None:
        dweight = gain * dweight
    return dweight.to(weight.dtype), s * radial


def _inline(weight, u, v, gain, geometry, n_iter, eps, v_first, bound, out_dtype) -> tuple[Tensor, Tensor]:
    """:func:`apply_conv` in torch ops that every transform of ``torch.func`` sees through."""
    _, state = forward(weight.detach(), u.detach(), v.detach(), None, *geometry, n_iter, eps, v_first, None, None)
    w, s, _, _ = _linear(weight, state, Geometry(*geometry), bound)
    return (w * (s if gain is None else s * gain)).to(out_dtype or weight.dtype), state


ConvNormJoined = joined(ConvNormEager)
differentiable(spectral_norm_conv_fwd, ConvNormFunction)


def apply_conv(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    geometry: Geometry,
    n_iter: int,
    eps: float,
    v_first: bool,
    bound: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(out, state [h + w + 1]) of the weight of a convolution, differentiable in weight and gain."""
    if inlined():
        return _inline(weight, u, v, gain, geometry, n_iter, eps, v_first, bound, out_dtype)
    function = variant(ConvNormFunction, ConvNormEager, ConvNormJoined)
    return function.apply(weight, u, v, gain, tuple(geometry), n_iter, eps, v_first, bound, out_dtype)
