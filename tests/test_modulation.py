"""What is true of modulation alone; tests/test_ops.py has its cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import weightxform as wx
from weightxform.functional import modulate
from weightxform.numerics import relative_error

SHAPES = {"conv2d": (5, 4, 3, 3), "pointwise": (5, 4, 1, 1), "linear": (5, 4), "conv1d": (3, 6, 5)}


def inputs(shape=(5, 4, 3, 3), samples: int = 3, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    weight, style = torch.randn(shape, dtype=torch.float64), torch.randn(samples, shape[1], dtype=torch.float64) + 0.5
    return weight.to(dtype).requires_grad_(), style.requires_grad_()


def plain(weight: Tensor, style: Tensor, demodulate: bool = True, eps: float = 1e-8) -> Tensor:
    """As the paper has it, equations 1 and 3, in one tensor of all samples after another."""
    ones = (1,) * (weight.ndim - 2)
    out = weight[None] * style.reshape(style.shape[0], 1, style.shape[1], *ones)
    if not demodulate:
        return out
    return out / (out.flatten(2).square().sum(2) + eps).sqrt().reshape(*out.shape[:2], 1, *ones)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(shape, demodulate) -> None:
    weight, style = inputs(shape)
    out, expected = modulate(weight, style, demodulate), plain(weight, style, demodulate)
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, (weight, style), upstream) for y in (out, expected)), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("demodulate", [True, False])
def test_derivatives_of_every_order_and_mode(demodulate) -> None:
    def f(weight: Tensor, style: Tensor) -> Tensor:
        return modulate(weight, style, demodulate)

    small = inputs((3, 2, 2))
    assert gradcheck(f, small, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, small, check_fwd_over_rev=True)


@pytest.mark.parametrize("demodulate", [True, False])
def test_reverse_over_forward_mode(demodulate) -> None:
    """The tangent is a function of the scales, and they of both arguments."""
    leaves = tuple(t.detach() for t in inputs((3, 2, 2)))
    along = tuple(torch.randn_like(t) for t in leaves)

    def gradients(f) -> tuple[Tensor, ...]:
        def tangent(*at: Tensor) -> Tensor:
            return torch.func.jvp(lambda *a: f(*a, demodulate).sin().sum(), at, along)[1]

        return torch.func.grad(tangent, (0, 1))(*leaves)

    assert_close(gradients(modulate), gradients(plain))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 1)], ids=str)
def test_vmap(in_dims) -> None:
    shapes = (5, 4, 3, 3), (3, 4)
    stacked = [
        torch.randn(shape if d is None else (*shape[:d], 6, *shape[d:]))
        for shape, d in zip(shapes, in_dims, strict=True)
    ]
    out = torch.vmap(modulate, in_dims)(*stacked)
    for k in range(6):
        one = [t if d is None else t.select(d, k) for t, d in zip(stacked, in_dims, strict=True)]
        assert_close(out[k], modulate(*one))


def test_vmap_of_grad() -> None:
    weight, style = (t.detach() for t in inputs())
    upstream = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    found = torch.vmap(torch.func.grad(lambda s: (modulate(weight, s) * upstream).sum()))(style)
    for row, s in zip(found, style, strict=True):
        assert_close(row, torch.func.grad(lambda s: (plain(weight, s[None])[0] * upstream).sum())(s))


def test_compiled() -> None:
    weight, style = inputs(dtype=torch.float32)

    def f(weight: Tensor, style: Tensor) -> Tensor:
        return torch.tanh(modulate(weight, style))

    out, expected = torch.compile(f, fullgraph=True)(weight, style), f(weight, style)
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, (weight, style), upstream) for y in (out, expected)), strict=True):
        assert_close(got, want)


def test_one_style() -> None:
    weight, style = inputs(samples=1)
    out = modulate(weight, style[0])
    assert_close(out, plain(weight, style)[0])
    assert out.shape == weight.shape


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtype_of_the_result(weight_dtype, dtype) -> None:
    """Large enough for stores past the cache; nothing is rounded but the result."""
    weight = torch.randn(61, 61, 3, 3).to(weight_dtype).requires_grad_()
    style = (torch.rand((9 << 20) // (weight.numel() * (dtype or weight_dtype).itemsize), 61) + 0.5).requires_grad_()
    out = modulate(weight, style, dtype=dtype)
    assert out.dtype == (dtype or weight_dtype)
    exact = plain(weight.double(), style.double())
    assert relative_error(out, exact) < torch.finfo(out.dtype).eps + torch.finfo(torch.float32).eps
    upstream = torch.randn_like(out)
    dweight, dstyle = torch.autograd.grad(out, (weight, style), upstream)
    assert (dweight.dtype, dstyle.dtype) == (weight_dtype, torch.float32)
    want = torch.autograd.grad(exact, (weight, style), upstream.double())
    assert relative_error(dweight, want[0].double()) < torch.finfo(weight_dtype).eps + 1e-6
    assert relative_error(dstyle, want[1].double()) < 1e-5


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_any_strides(layout) -> None:
    weight, style = (t.detach() for t in inputs())
    other = {
        "channels_last": lambda: weight.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: weight.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda: torch.stack([weight, torch.randn_like(weight)], -1)[..., 0],
    }[layout]()
    leaves = other.requires_grad_(), style.t().contiguous().t().requires_grad_()
    assert not leaves[0].is_contiguous() and not leaves[1].is_contiguous()
    out = modulate(*leaves)
    upstream = torch.randn(out.shape[::-1], dtype=out.dtype).permute(4, 3, 2, 1, 0)
    expected = plain(*leaves)
    assert_close(out, expected)
    for got, want in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (out, expected)), strict=True):
        assert_close(got, want)


def test_each_filter_has_norm_one() -> None:
    weight, style = inputs((7, 20, 3, 3), dtype=torch.float32)
    norms = modulate(weight, style).flatten(2).norm(dim=2)
    assert_close(norms, torch.ones_like(norms))


def test_large_numbers_in_float16() -> None:
    """The product of a weight and a style is beyond float16, and so are all sums of squares."""
    weight = (1000 * torch.randn(16, 64, 3, 3)).half().requires_grad_()
    style = (1000 * (torch.rand(4, 64) + 0.5)).half().requires_grad_()
    out = modulate(weight, style)
    assert_close(out.double(), plain(weight.double(), style.double()), rtol=1e-3, atol=1e-6)
    out.backward(torch.randn_like(out))
    assert weight.grad.isfinite().all() and style.grad.isfinite().all()


def test_zero_weights() -> None:
    weight, style = torch.zeros(4, 3, 2, 2, requires_grad=True), torch.rand(2, 3).requires_grad_()
    out = modulate(weight, style, eps=1e-4)
    assert torch.equal(out, torch.zeros(2, 4, 3, 2, 2))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert_close(weight.grad, torch.einsum("noixy,ni->oixy", upstream, style.detach()) / 1e-2)
    assert torch.equal(style.grad, torch.zeros(2, 3))


class Largest(TorchDispatchMode):
    """The numbers that each op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in seen:  # not a view
                self.made[str(func)] = max(self.made.get(str(func), 0), t.numel())
        return out


def test_nothing_of_the_size_of_the_result_is_made_but_the_result() -> None:
    weight, style = inputs((8, 16, 3, 3), samples=9, dtype=torch.float32)
    upstream = torch.randn(9, *weight.shape)
    with Largest() as of:
        torch.autograd.backward(modulate(weight, style), upstream)
    assert of.made.pop("weightxform.modulate_fwd.default") == upstream.numel()
    assert of.made["weightxform.modulate_bwd.default"] == weight.numel()
    assert max(of.made.values()) <= weight.numel(), of.made


def test_a_gradient_is_computed_where_it_is_needed() -> None:
    weight, style = inputs()
    expected = torch.autograd.grad(plain(weight, style), (weight, style), torch.ones(3, *weight.shape).double())
    for k, frozen in enumerate([(weight, style.detach()), (weight.detach(), style)]):
        modulate(*frozen).sum().backward()
        assert_close((weight, style)[k].grad, expected[k])
    assert weight.grad is not None and style.grad is not None


@pytest.mark.parametrize("written", [0, 1])
def test_a_write_between_forward_and_backward_raises(written) -> None:
    leaves = inputs()
    out = modulate(*leaves)
    with torch.no_grad():
        leaves[written].mul_(2)
    with pytest.raises(RuntimeError, match="written between forward and backward"):
        out.backward(torch.randn_like(out))


@pytest.mark.parametrize("trained", [0, 1])
def test_without_demodulation_a_gradient_reads_the_other_argument_alone(trained) -> None:
    leaves = [t.detach() for t in inputs()]
    leaf = leaves[trained].requires_grad_()
    out = modulate(*leaves, demodulate=False)
    upstream = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, leaf, upstream)
    with torch.no_grad():
        leaf.mul_(2)
    assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], expected)


def layers(**options) -> list[wx.ModulatedConv2d]:
    """The same one in both forms."""
    forms = [
        wx.ModulatedConv2d(style_features=4, bias=False, form=f, **options) for f in ("materialised", "activation")
    ]
    forms[1].load_state_dict(forms[0].state_dict())
    return forms


def test_float16_filters_that_all_point_one_way() -> None:
    """The sum over all channels and taps of what is at most 20 is beyond float16, unless filters have norm 1."""
    x, style = torch.full((2, 512, 3, 3), 20.0).half(), torch.zeros(2, 4).half()
    for layer in layers(in_channels=512, out_channels=4, kernel_size=3, dtype=torch.float16):
        torch.nn.init.constant_(layer.weight, 0.01)
        torch.nn.init.zeros_(layer.affine.weight)
        y = layer(x, style)
        assert_close(y.double(), torch.full(y.shape, 20 * (512 * 9) ** 0.5).double(), rtol=2e-3, atol=0)


def test_float16_filters_and_styles_that_are_tiny() -> None:
    """Their product is below float16, the output is not."""
    layer = layers(in_channels=8, out_channels=6, kernel_size=3, demodulate=False, dtype=torch.float16)[1]
    torch.nn.init.constant_(layer.weight, 1e-4)
    torch.nn.init.zeros_(layer.affine.weight)
    torch.nn.init.constant_(layer.affine.bias, 1e-4)
    y = layer(torch.full((2, 8, 3, 3), 1000.0).half(), torch.zeros(2, 4).half())
    assert_close(y.double(), torch.full(y.shape, 8 * 9 * 1000 * 1e-8).double(), rtol=5e-3, atol=0)


def test_second_derivatives_at_a_kernel_of_zeros() -> None:
    x, style = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 4).double()
    found = []
    for layer in layers(in_channels=3, out_channels=4, kernel_size=3, dtype=torch.float64):
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).reshape(layer.weight.shape))[1, 2] = 0
            layer.affine.weight.fill_(0.1)
        (first,) = torch.autograd.grad(layer(x, style).square().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    assert_close(*found)


@pytest.mark.parametrize("form", ["materialised", "activation"])
def test_the_layer_on_meta(form) -> None:
    layer = wx.ModulatedConv2d(4, 5, 3, 2, form=form, device="meta")
    assert layer(torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 2, device="meta")).shape == (2, 5, 6, 6)


def test_one_result_serves_many_backward_passes() -> None:
    weight, style = inputs()
    out = modulate(weight, style)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    for g in upstream:
        out.backward(g)  # no retain_graph
    for leaf, want in zip((weight, style), torch.autograd.grad(out, (weight, style), upstream.sum(0)), strict=True):
        assert_close(leaf.grad, want)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"weight": 3}, TypeError, "modulate: weight must be"),
        ({"weight": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "modulate: weight must be float64"),
        ({"style": torch.ones(2, 4, dtype=torch.bool)}, TypeError, "modulate: style must be float64"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \[O, I, \*kernel\], got"),
        ({"style": torch.ones(2, 5)}, ValueError, r"style must be \[N, 4\] or \[4\] for weight"),
        ({"style": torch.ones(2, 1, 4)}, ValueError, r"style must be \[N, 4\] or \[4\]"),
        ({"style": torch.ones(2, 4, device="meta")}, ValueError, "style must be on cpu as weight is"),
        ({"demodulate": 1}, TypeError, "demodulate must be"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"eps": "small"}, TypeError, "eps must be"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float64, float32, bfloat16 or float16, got torch.int32"),
    ],
)
def test_bad_arguments(arguments, kind, message) -> None:
    given = {"weight": torch.ones(2, 4, 3, 3), "style": torch.ones(3, 4), **arguments}
    with pytest.raises(kind, match=message):
        modulate(**given)
