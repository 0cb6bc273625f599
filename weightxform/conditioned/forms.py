"""A layer on a batch whose samples have C > 1 conditions, and so C weights.

Three forms give the same numbers:

    loop        one plain layer for each condition, on its samples
    grouped     one convolution with a group for each sample (for a Linear: one batched matrix product)
    activation  the condition acts on the activations and the stored weight serves all: for warps each sample's patches
                are mapped, patch' = patch A(c), before one product with the weight; others say what theirs is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..transform import describe
from .condition import Given
from .transform import FilterTransform, View

PER_SAMPLE = 2  # a sweep of B = 32 on two CPU threads; patches never won there
FORMS = ("auto", "loop", "grouped", "activation")
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def check_batch(layer: nn.Module, x: Tensor, given: Given) -> None:
    """Raise where the samples of ``x`` are not those that the conditions are for."""
    axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
    if x.ndim < axes + 2 or x.shape[0] != given.batch:
        raise RuntimeError(
            f"Conditioned: {type(layer).__name__} got an input of shape {list(x.shape)}, and there are conditions for "
            f"a batch of {given.batch}: the batch must stay the first axis through the model"
        )


def looped(layer: Any, x: Tensor, weight: Tensor, given: Given, output_size: list[int] | None = None) -> Tensor:
    """One plain layer for each of the C weights."""
    return each_in_turn(x, given, lambda k, part: plain(layer, part, weight[k], output_size))


def each_in_turn(x: Any, given: Given, call: Callable[[int, Any], Any]) -> Any:
    """``call(k, the samples of x at condition k)`` for all k, in the order of the samples.

    ``x`` is a tensor or a tree of anything, of which the tensors [B, ...] are cut; what ``call`` returns as well.
    """
    rows = given.rows()
    assert rows is not None
    order = None if given.index is None else torch.argsort(rows, stable=True)
    back = None if order is None else torch.argsort(order)
    sizes = [1] * given.count if order is None else torch.bincount(rows, minlength=given.count).tolist()
    leaves, spec = tree_flatten(x)
    cut = [
        _permuted(t, order, back).split(sizes)
        if isinstance(t, Tensor) and t.shape[:1] == (given.batch,)
        else [t] * given.count
        for t in leaves
    ]
    outs = [tree_flatten(call(k, tree_unflatten([part[k] for part in cut], spec))) for k in range(given.count)]
    joined = [_joined(parts, sizes, order, back) for parts in zip(*(out for out, _ in outs), strict=True)]
    return tree_unflatten(joined, outs[0][1])


class _Permuted(torch.autograd.Function):
    """Rows in another order. The backward is the way back; that of an index would be a scatter into zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, order, back):
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return _Permuted.apply(grad, back, order), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.index_select(0, ctx.saved_tensors[0])


def _permuted(x: Tensor, order: Tensor | None, back: Tensor | None) -> Tensor:
    """``x[order]``; ``back``: the inverse of ``order``. ``None``: as it is."""
    if order is None:
        return x
    if torch.compiler.is_compiling() or not x.is_floating_point():
        return x.index_select(0, order)
    return _Permuted.apply(x, order, back)


def _joined(parts: Sequence[Any], sizes: Sequence[int], order: Tensor | None, back: Tensor | None) -> Any:
    """What a layer returned for the samples of each condition, for the batch; what is no tensor must be one for all."""
    if all(isinstance(y, Tensor) and y.shape[:1] == (n,) for y, n in zip(parts, sizes, strict=True)):
        return _permuted(torch.cat([*parts]), back, order)
    if any(isinstance(y, Tensor) for y in parts) or any(y != parts[0] for y in parts):
        raise RuntimeError(
            "Conditioned: a layer with a forward of its own must return tensors [B, ...], or what does not depend on "
            f"the samples, got {[describe(y) if isinstance(y, Tensor) else y for y in parts]} for conditions in turn: "
            "call it with one condition"
        )
    return parts[0]


def plain(layer: Any, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
    """``layer`` on ``x`` with this weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if not layer.transposed:
        return layer._conv_forward(x, weight, layer.bias)
    axes = len(layer.kernel_size)
    padding = _output_padding(layer, x, output_size)
    return _TRANSPOSED[axes](x, weight, layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


def _output_padding(layer: Any, x: Tensor, output_size: list[int] | None) -> Any:
    axes = len(layer.kernel_size)
    return layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation)


def grouped(layer: Any, x: Tensor, weight: Tensor, given: Given, output_size: list[int] | None = None) -> Tensor:
    """One call with a group for each sample."""
    each = weight if given.index is None else weight.index_select(0, given.index)
    if isinstance(layer, nn.Linear):
        y = (x.flatten(1, -2) if x.ndim > 2 else x[:, None]) @ each.transpose(1, 2)
        y = y.reshape(*x.shape[:-1], each.shape[1])
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
    batch, axes = x.shape[0], len(layer.kernel_size)
    flat = each.flatten(0, 1)
    if layer.transposed:
        padding = _output_padding(layer, x, output_size)
        y = _TRANSPOSED[axes](
            x.reshape(1, -1, *x.shape[2:]), flat, None, layer.stride, layer.padding, padding, batch * layer.groups,
            layer.dilation,
        )  # fmt: skip
    else:
        x, outside = _padded(layer, x)
        y = _CONV[axes](
            x.reshape(1, -1, *x.shape[2:]), flat, None, layer.stride, outside, layer.dilation, batch * layer.groups
        )
    y = y.reshape(batch, layer.out_channels, *y.shape[2:])
    return y if layer.bias is None else y + layer.bias.to(y.dtype).reshape(-1, *[1] * axes)


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, Any]:
    """The input with what a convolution cannot pad itself, and how much it pads."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


def on_patches(layer: Any, x: Tensor, raw: Tensor, matrix: Tensor, view: View, given: Given) -> Tensor | None:
    """The activation form of a warp; ``None`` where there is none. ``raw`` [O, I, *kernel], ``matrix`` [C, K, K]."""
    each = matrix if given.index is None else matrix.index_select(0, given.index)
    if view.axes != tuple(range(2, raw.ndim)):
        return None
    if isinstance(layer, nn.Linear):
        y = x.reshape(x.shape[0], -1, raw.shape[1], view.taps) @ each.to(x.dtype)[:, None]
        return F.linear(y.reshape(x.shape), layer._parameters["weight"].to(x.dtype), layer.bias)  # type: ignore[union-attr]
    if layer.transposed or len(layer.kernel_size) != 2:
        return None
    twice = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, twice, mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # [B, I_all K, L]
    batch, length = patches.shape[0], patches.shape[-1]
    turned = each.to(x.dtype).transpose(1, 2)[:, None] @ patches.reshape(batch, -1, view.taps, length)
    turned = turned.reshape(batch, layer.groups, -1, length)
    y = raw.to(x.dtype).reshape(layer.groups, raw.shape[0] // layer.groups, -1) @ turned
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(padded.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True)
    ]
    y = y.reshape(batch, raw.shape[0], *size)
    return y if layer.bias is None else y + layer.bias.to(y.dtype).reshape(-1, 1, 1)


def best(layer: Any, transform: nn.Module, x: Tensor, given: Given) -> str:
    """Which form: the groups want a copy of the weight for each sample, the loop a convolution for each condition."""
    if isinstance(layer, nn.Linear):
        return "activation" if isinstance(transform, FilterTransform) else "grouped"
    if torch.compiler.is_compiling():
        # With a group for each of any number of samples and one channel in each, inductor of torch 2.13 fails.
        single = layer.in_channels == 1 and isinstance(transform, FilterTransform)
        return "activation" if single else "grouped"
    if given.index is None:
        return "grouped"
    loops = PER_SAMPLE * layer._parameters["weight"].numel() >= given.count * x[0].numel()
    return "loop" if loops else "grouped"
