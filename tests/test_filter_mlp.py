"""What is true of the network over each filter alone; tests/test_ops.py has its cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from weightxform.filter_mlp import function
from weightxform.filter_mlp.reference import ACTIVATIONS
from weightxform.functional import filter_mlp
from weightxform.numerics import relative_error
from weightxform.registry import OPS

every = pytest.mark.parametrize("activation", ACTIVATIONS)
NAMES = ("weight", "condition", "w1", "b1", "w2", "b2")


def inputs(shape=(5, 4, 3, 3), conditions: int = 3, hidden: int = 6, dtype=torch.float64) -> tuple[Tensor, ...]:
    taps = torch.Size(shape[2:]).numel()
    shapes = shape, (conditions, 2), (hidden, taps + 2), (hidden,), (taps, hidden), (taps,)
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def plain(weight, condition, w1, b1, w2, b2, activation="relu", residual=True) -> Tensor:
    """The network applied to ``[w, c]``."""
    filters = weight.flatten(2).flatten(0, 1)
    shape = condition.shape[0], filters.shape[0], -1
    x = torch.cat([filters.expand(*shape), condition[:, None].expand(*shape)], -1)
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu, "tanh": torch.tanh}[activation]
    out = torch.nn.functional.linear(act(torch.nn.functional.linear(x, w1, b1)), w2, b2)
    return (out + filters if residual else out).reshape(-1, *weight.shape)


def assert_equal_gradients(out: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    upstream = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (out, expected)), strict=True):
        assert_close(got, want)


@every
@pytest.mark.parametrize("residual", [True, False])
def test_equals_the_network(activation, residual) -> None:
    leaves = inputs((7, 11, 3, 3))
    out, expected = (f(*leaves, activation=activation, residual=residual) for f in (filter_mlp, plain))
    assert_close(out, expected)
    assert_equal_gradients(out, expected, leaves)


@pytest.mark.parametrize("shape", [(5, 4, 1, 1), (3, 6, 5), (2, 3, 3, 3, 3), (3, 2, 7, 7)], ids=str)
def test_kernels_of_other_sizes(shape) -> None:
    leaves = inputs(shape)
    out, expected = filter_mlp(*leaves), plain(*leaves)
    assert_close(out, expected)
    assert_equal_gradients(out, expected, leaves)


@every
def test_derivatives_of_every_order_and_mode(activation) -> None:
    def f(*tensors: Tensor) -> Tensor:
        return filter_mlp(*tensors, activation=activation)

    small = inputs((2, 2, 2), conditions=2, hidden=3)
    assert gradcheck(f, small, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, small, check_fwd_over_rev=True)


def test_the_slope_of_relu_at_0_is_0() -> None:
    weight, condition, w1, b1, w2, b2 = inputs()
    with torch.no_grad():
        w1.zero_(), b1.zero_()
    filter_mlp(weight, condition, w1, b1, w2, b2).sum().backward()
    assert not w1.grad.any() and not b1.grad.any() and not condition.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_activations_from_end_to_end(activation, dtype) -> None:
    """One tap, one hidden unit: the activation itself and its slope, near 0 and far away, within a few roundings."""
    near = torch.logspace(-30, 0, 301, dtype=torch.float64)
    x = torch.cat([near, torch.linspace(1, 700 if dtype == torch.float64 else 80, 2001, dtype=torch.float64)])
    x = torch.cat([-x, x]).to(dtype)
    one, none = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    out = OPS["filter_mlp_fwd"](x[:, None], none[None], one, one, none, activation, False, None)
    slope = OPS["filter_mlp_bwd"](torch.ones_like(out), x[:, None], none[None], one, one, activation, False, True)[0]
    exact, eps = x.double(), torch.finfo(dtype).eps
    s, rest = torch.sigmoid(exact), torch.sigmoid(-exact)  # 1 - s has no digits left where x is large
    value = torch.tanh(exact) if activation == "tanh" else exact * s
    derivative = exact.cosh() ** -2 if activation == "tanh" else s * (1 + exact * rest)
    assert_close(out[0, :, 0].double(), value, rtol=3 * eps, atol=100 * torch.finfo(dtype).tiny)
    assert_close(slope[:, 0].double(), derivative, rtol=0, atol=3 * eps)


@every
def test_activations_of_any_number(activation) -> None:
    """Beyond what an exponential has, and infinity, where the reference may have NaN."""
    ends = torch.tensor([100.0, 1e20, 1e30, 1e38, torch.inf])
    x = torch.cat([-ends, ends])[:, None]
    one, none = torch.ones(1, 1), torch.zeros(1)
    forward, backward = OPS["filter_mlp_fwd"], OPS["filter_mlp_bwd"]
    args = x, none[None], one, one, none, activation, False, None
    assert_close(forward(*args), forward.reference(*args), equal_nan=True)
    args = torch.ones(1, len(x), 1), x, none[None], one, one, activation, False, True
    assert_close(backward(*args)[0], backward.reference(*args)[0], equal_nan=True)


@every
def test_nan_stays(activation) -> None:
    weight, *others = (t.detach() for t in inputs(dtype=torch.float32))
    weight[1, 2, 0, 1] = float("nan")
    bad = filter_mlp(weight, *others, activation=activation, residual=False).isnan()
    assert bad[:, 1, 2].all() and bad.sum() == bad[:, 1, 2].numel()


@pytest.mark.parametrize("argument", range(6), ids=NAMES)
def test_vmap(argument) -> None:
    tensors = [t.detach() for t in inputs()]
    tensors[argument] = torch.randn(*tensors[argument].shape, 4, dtype=torch.float64)
    in_dims = tuple(-1 if k == argument else None for k in range(6))
    out = torch.vmap(filter_mlp, in_dims)(*tensors)
    for k in range(4):
        assert_close(out[k], filter_mlp(*(t[..., k] if j == argument else t for j, t in enumerate(tensors))))


def test_vmap_of_grad_over_conditions() -> None:
    weight, condition, *layers = (t.detach() for t in inputs())
    upstream = torch.randn_like(weight)
    found = torch.vmap(torch.func.grad(lambda c: (filter_mlp(weight, c, *layers) * upstream).sum()))(condition)
    for row, c in zip(found, condition, strict=True):
        assert_close(row, torch.func.grad(lambda c: (plain(weight, c[None], *layers)[0] * upstream).sum())(c))


def test_compiled() -> None:
    leaves = inputs(dtype=torch.float32)

    def f(*tensors: Tensor) -> Tensor:
        return torch.tanh(filter_mlp(*tensors, activation="silu"))

    out, expected = torch.compile(f, fullgraph=True)(*leaves), f(*leaves)
    assert_close(out, expected)
    assert_equal_gradients(out, expected, leaves)


def test_one_condition() -> None:
    weight, condition, *layers = inputs(conditions=1)
    assert_close(filter_mlp(weight, condition[0], *layers), plain(weight, condition, *layers)[0])


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
    weight, *layers = inputs((149, 151, 3, 3), 1, 4, torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    conditions = -(-(9 << 20) // (weight.numel() * (dtype or weight_dtype).itemsize))
    leaves = weight, torch.randn(conditions, 2, requires_grad=True), *layers[1:]
    out = filter_mlp(*leaves, activation="tanh", dtype=dtype)
    assert out.dtype == (dtype or weight_dtype)
    exact = plain(*(t.double() for t in leaves), "tanh")
    assert relative_error(out, exact) < torch.finfo(out.dtype).eps + 1e-6
    upstream = torch.randn_like(out)
    got, want = torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(exact, leaves, upstream.double())
    assert [g.dtype for g in got] == [weight_dtype] + [torch.float32] * 5
    assert relative_error(got[0], want[0].double()) < torch.finfo(weight_dtype).eps + 1e-6
    for g, w in zip(got[1:], want[1:], strict=True):
        assert relative_error(g, w.double()) < 1e-5


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_any_strides(layout) -> None:
    weight, *others = (t.detach() for t in inputs())
    other = {
        "channels_last": lambda: weight.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: weight.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda: torch.stack([weight, torch.randn_like(weight)], -1)[..., 0],
    }[layout]()
    turned = (t.t().contiguous().t() for t in others)
    leaves = tuple(t.requires_grad_() for t in (other, *turned))
    assert not leaves[0].is_contiguous() and not leaves[2].is_contiguous()
    out, expected = filter_mlp(*leaves), plain(*leaves)
    assert_close(out, expected)
    assert_equal_gradients(out, expected, leaves)


class Largest(TorchDispatchMode):
    """The most numbers that each op makes."""

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


def test_the_hidden_layer_is_not_stored() -> None:
    leaves = inputs((8, 16, 3, 3), conditions=7, hidden=40, dtype=torch.float32)
    upstream = torch.randn(7, *leaves[0].shape)
    with Largest() as of:
        torch.autograd.backward(filter_mlp(*leaves), upstream)
    assert not [name for name in of.made if "slice" in name], "each is a kernel that fills and one that copies"
    assert of.made.pop("weightxform.filter_mlp_fwd.default") == upstream.numel()
    assert of.made["weightxform.filter_mlp_bwd.default"] == leaves[0].numel()
    assert max(of.made.values()) <= leaves[0].numel(), of.made


@pytest.mark.parametrize("needed", range(6), ids=NAMES)
def test_a_gradient_is_computed_where_it_is_needed(needed) -> None:
    leaves = inputs()
    frozen = [t if k == needed else t.detach() for k, t in enumerate(leaves)]
    upstream = torch.randn(3, *leaves[0].shape, dtype=torch.float64)
    filter_mlp(*frozen).backward(upstream)
    (want,) = torch.autograd.grad(plain(*frozen), leaves[needed], upstream)
    assert_close(leaves[needed].grad, want)


@pytest.mark.parametrize("written", ["weight", "w2"])  # of w1 it has a copy
def test_a_write_between_forward_and_backward_raises(written) -> None:
    leaves = dict(zip(NAMES, inputs(), strict=True))
    out = filter_mlp(**leaves)
    with torch.no_grad():
        leaves[written].mul_(2)
    with pytest.raises(RuntimeError, match=r"written between forward and backward|modified by an inplace operation"):
        out.backward(torch.randn_like(out))


def test_what_the_backward_does_not_read_may_be_written() -> None:
    """The gradient of the second layer reads the hidden one, that of its bias nothing."""
    leaves = dict(zip(NAMES, inputs(), strict=True))
    frozen = {name: t if name in ("w2", "b2") else t.detach() for name, t in leaves.items()}
    out = filter_mlp(**frozen)
    upstream = torch.randn_like(out)
    both = leaves["w2"], leaves["b2"]
    expected = torch.autograd.grad(out, both, upstream)
    with torch.no_grad():
        leaves["w2"].mul_(2)
    for got, want in zip(torch.autograd.grad(out, both, upstream), expected, strict=True):
        assert torch.equal(got, want)


def test_one_result_serves_many_backward_passes() -> None:
    shapes = (20, 9), (3, 6), (6, 9), (9, 6), (9,)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    out = function.apply(*leaves, "silu", True)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    for g in upstream:
        out.backward(g)  # no retain_graph
    for leaf, want in zip(leaves, torch.autograd.grad(out, leaves, upstream.sum(0)), strict=True):
        assert_close(leaf.grad, want)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"weight": 3}, TypeError, "filter_mlp: weight must be"),
        ({"w2": torch.ones(9, 6, dtype=torch.int64)}, TypeError, "filter_mlp: w2 must be float64"),
        ({"b1": torch.ones(6, device="meta")}, ValueError, "b1 must be on cpu as weight is"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight must be \[O, I, \*kernel\], got"),
        ({"weight": torch.ones(5, 4, 0)}, ValueError, "filter_mlp: weight must have a tap, got"),
        ({"condition": torch.ones(1, 3, 2)}, ValueError, r"condition must be \[n\] or \[B, n\], got"),
        ({"condition": torch.ones(3, 4)}, ValueError, r"w1 must be \[6, 13\], got"),
        ({"w1": torch.ones(6, 9)}, ValueError, r"w1 must be \[6, 11\], got"),
        ({"w1": torch.ones(0, 11)}, ValueError, r"w1 must be \[H, 11\] with H > 0, got"),
        ({"b1": torch.ones(5)}, ValueError, r"b1 must be \[6\], got"),
        ({"w2": torch.ones(6, 9)}, ValueError, r"w2 must be \[9, 6\], got"),
        ({"b2": torch.ones(6)}, ValueError, r"b2 must be \[9\], got"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
        ({"residual": 1}, TypeError, "residual must be"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float64, float32, bfloat16 or float16, got torch.int32"),
    ],
)
def test_bad_arguments(arguments, kind, message) -> None:
    given = dict(zip(NAMES, (t.detach() for t in inputs(dtype=torch.float32)), strict=True))
    with pytest.raises(kind, match=message):
        filter_mlp(**{**given, **arguments})


@pytest.mark.parametrize(("taps", "hidden"), [(3, 0), (0, 3)])
def test_the_op_refuses_no_hidden_unit_and_no_tap(taps, hidden) -> None:
    """As those of a GPU do, before anything is made."""
    grad, weight, v = torch.randn(2, 5, taps), torch.randn(5, taps), torch.randn(2, hidden)
    with pytest.raises(RuntimeError, match="filter_mlp: there must be a hidden unit and a tap"):
        OPS["filter_mlp_bwd"](grad, weight, v, torch.randn(hidden, taps), torch.randn(taps, hidden), "silu", True, True)
