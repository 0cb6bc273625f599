"""What is true of filter warps alone; tests/test_ops.py has their cases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import weightxform as wx
from weightxform import backends
from weightxform.filter_warp import reference
from weightxform.filter_warp.function import apply
from weightxform.functional import affine_matrix, filter_warp, rotation_matrix
from weightxform.registry import OPS

BACKENDS = [name for name in ("cpu", "reference") if name in backends.available("filter_warp_fwd")]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("banks", [1, 2])
def test_derivatives_of_every_order_and_mode(banks: int) -> None:
    weight, a = double(banks, 3, 4).requires_grad_(), double(2, banks, 4, 4).requires_grad_()

    def f(weight: Tensor, a: Tensor) -> Tensor:
        return apply(weight, a)

    torch.testing.assert_close(f(weight, a), reference.apply(weight, a))
    assert gradcheck(f, (weight, a), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (weight, a), check_fwd_over_rev=True)


def test_through_the_angle() -> None:
    weight, angle = double(2, 2, 3, 3).requires_grad_(), torch.tensor([0.4, -2.0], dtype=torch.float64).requires_grad_()

    def f(weight: Tensor, angle: Tensor) -> Tensor:
        return filter_warp(weight, rotation_matrix(angle, 3, "bicubic"))

    assert gradcheck(f, (weight, angle), check_forward_ad=True)
    assert gradgradcheck(f, (weight, angle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_and_adjoint_identities(backend: str) -> None:
    """<G, W A'> = <dA, A> = <dW, W>, and the derivative along any change of A is its product with dA."""
    weight, a, grad = double(2, 45, 9), double(3, 2, 9, 9), double(3, 45, 9)
    change = double(3, 2, 9, 9)
    with wx.backend(backend):
        out, along = apply(weight, a), apply(weight, change)
        dweight, da = OPS["filter_warp_bwd"](grad, weight, a, True, True)
    whole = (grad * out).sum()
    torch.testing.assert_close((da * a).sum(), whole)
    torch.testing.assert_close((dweight * weight).sum(), whole)
    torch.testing.assert_close((da * change).sum(), (grad * along).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6, 9, 12, 25, 27, 49])
def test_matrices_with_few_numbers_and_with_many(taps: int, backend: str) -> None:
    """The two forms of the CPU kernel: rows of at most nine numbers (an empty one too), and all."""
    weight, grad = double(1, 53, taps), double(2, 53, taps)
    for kept in (1.0, 0.3):
        a = double(2, 1, taps, taps) * (torch.rand(2, 1, taps, taps) <= kept)
        a[1, 0, 0] = 0
        expected = reference.forward(weight, a, None), *reference.backward(grad, weight, a, True, True)
        with wx.backend(backend):
            found = apply(weight, a), *OPS["filter_warp_bwd"](grad, weight, a, True, True)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other)


def test_a_long_sum_keeps_its_digits() -> None:
    """da of 2^17 filters in float32: many runs and blocks."""
    weight, grad = torch.randn(1, 1 << 17, 4), torch.randn(1, 1 << 17, 4)
    a = torch.randn(1, 1, 4, 4)
    _, da = OPS["filter_warp_bwd"](grad, weight, a, False, True)
    exact = reference.gram(grad.double(), weight.double())
    assert float((da.double() - exact).abs().max()) <= 4e-7 * (1 << 17) ** 0.5


def test_shapes_and_strides() -> None:
    weight, matrix = double(4, 3, 3, 2), double(6, 6)
    expected = (weight.flatten(2) @ matrix.T).reshape(weight.shape)
    torch.testing.assert_close(filter_warp(weight, matrix), expected)
    strided = weight.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0).requires_grad_()
    out = filter_warp(strided, matrix.T.contiguous().T[None])
    torch.testing.assert_close(out[0], expected)
    upstream = double(3, 4, 3, 2).permute(1, 0, 2, 3)  # not contiguous either
    out[0].backward(upstream)
    torch.testing.assert_close(strided.grad, (upstream.flatten(2) @ matrix).reshape(weight.shape))
    banks = double(2, 4, 3, 3, 2)
    mixed = filter_warp(banks, torch.stack([matrix, 2 * matrix])[None])
    torch.testing.assert_close(mixed[0], ((banks[0] + 2 * banks[1]).flatten(2) @ matrix.T).reshape(4, 3, 3, 2))
    assert filter_warp(double(2, 3, 5), double(7, 5, 5)).shape == (7, 2, 3, 5)
    assert filter_warp(double(2, 3, 2, 2, 2), double(8, 8)).shape == (2, 3, 2, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, result: torch.dtype) -> None:
    weight, matrix = torch.randn(5, 3, 3, 3).to(dtype).requires_grad_(), torch.randn(2, 9, 9).requires_grad_()
    out = filter_warp(weight, matrix, dtype=result)
    assert out.dtype == result
    exact = filter_warp(weight.double(), matrix.double())
    tolerance = {"rtol": 2 * torch.finfo(result).eps, "atol": 20 * torch.finfo(result).eps}
    torch.testing.assert_close(out.double(), exact, **tolerance)
    upstream = torch.randn(out.shape).to(result)
    found = torch.autograd.grad(out, (weight, matrix), upstream)
    expected = torch.autograd.grad(exact, (weight, matrix), upstream.double())
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-4)


def test_vmap_over_either_and_both() -> None:
    weight, a = double(4, 2, 5, 3), double(4, 3, 2, 3, 3)
    both = torch.stack([apply(weight[i], a[i]) for i in range(4)])
    torch.testing.assert_close(torch.vmap(apply)(weight, a), both)
    torch.testing.assert_close(torch.vmap(apply, (None, 0))(weight[1], a)[1], both[1])
    torch.testing.assert_close(torch.vmap(apply, (0, None))(weight, a[2])[2], both[2])
    per_member = torch.vmap(torch.func.grad(lambda w, m: apply(w, m).square().sum(), (0, 1)))(weight, a)
    leaves = weight.clone().requires_grad_(), a.clone().requires_grad_()
    total = torch.stack([apply(leaves[0][i], leaves[1][i]).square().sum() for i in range(4)]).sum()
    for mine, other in zip(per_member, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(mine, other)


def test_compiles_whole() -> None:
    def step(weight: Tensor, angle: Tensor, theta: Tensor) -> Tensor:
        turned = filter_warp(weight, rotation_matrix(angle, 3), dtype=torch.bfloat16)
        return turned.float() + filter_warp(weight, affine_matrix(theta, (3, 3), "bicubic", "border"))

    inputs = [torch.randn(4, 3, 3, 3), torch.randn(2), torch.randn(2, 2, 3)]
    upstream = torch.randn(2, 4, 3, 3, 3)
    found = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = f(*leaves)
        out.backward(upstream)
        found.append([out, *(t.grad for t in leaves)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("needed", ["weight", "matrix"])
def test_only_what_is_needed_is_computed(needed: str) -> None:
    tensors = {"weight": torch.randn(3, 2, 3, 3), "matrix": torch.randn(2, 9, 9)}
    both = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    upstream = torch.randn(2, 3, 2, 3, 3)
    filter_warp(**both).backward(upstream)
    tensors[needed].requires_grad_()
    filter_warp(**tensors).backward(upstream)
    torch.testing.assert_close(tensors[needed].grad, both[needed].grad)


@pytest.mark.parametrize("written", ["weight", "matrix"])
def test_a_written_input_and_a_second_backward(written: str) -> None:
    tensors = {"weight": torch.randn(3, 2, 3, 3).requires_grad_(), "matrix": torch.randn(2, 9, 9).requires_grad_()}
    out = filter_warp(**tensors)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    first = {name: t.grad.clone() for name, t in tensors.items()}
    out.backward(upstream)  # with no retain_graph
    for name, t in tensors.items():
        assert torch.equal(t.grad, 2 * first[name])
    with torch.no_grad():
        tensors[written].mul_(2)
    with pytest.raises(RuntimeError, match="filter_warp"):
        out.backward(upstream)


@pytest.mark.parametrize("trained", ["weight", "matrix"])
def test_what_the_backward_does_not_read_may_be_written(trained: str) -> None:
    """As with a product of two tensors: the gradient of one is made with the other alone."""
    tensors = {"weight": torch.randn(3, 2, 3, 3), "matrix": torch.randn(2, 9, 9)}
    leaf = tensors[trained].requires_grad_()
    out = filter_warp(**tensors)
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaf, upstream)
    with torch.no_grad():
        leaf.mul_(2)
    assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], expected[0])


def test_the_layer_on_meta() -> None:
    layer = wx.AdaptiveRotatedConv2d(4, 5, 3, device="meta")
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 5, 6, 6)


PROBE = """
import hashlib, torch
from weightxform.registry import OPS
from weightxform.verify import flatten, make_args

torch.set_num_threads(1)
digest = hashlib.sha256()
for name in ("filter_warp_fwd", "filter_warp_bwd"):
    for case in OPS[name].cases:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for out in flatten(OPS[name](*make_args(OPS[name], case, dtype, "cpu"))):
                digest.update(str(out.double().flatten().tolist()).encode())
print(digest.hexdigest())
"""


def test_both_widths_of_vectors_give_the_same_bits() -> None:
    """AVX-512 and AVX2, of those that this machine has (SSE2 rounds a product before it is added)."""

    def run(width: str) -> str:
        env = {**os.environ, "WEIGHTXFORM_VECTOR_BYTES": width}
        return subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True).stdout

    assert run("64") == run("32")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": 3}, TypeError, "filter_warp: weight must be"),
        ({"weight": torch.ones(2, 2, 3, dtype=torch.int64)}, TypeError, "filter_warp: weight must be"),
        ({"weight": torch.ones(2, 3)}, ValueError, r"filter_warp: weight must be \[O, I, \*kernel\], got"),
        ({"weight": torch.ones(2, 2, 0), "matrix": torch.ones(0, 0)}, ValueError, "weight must have a tap, got"),
        (
            {"weight": torch.ones(0, 2, 2, 3), "matrix": torch.ones(1, 0, 3, 3)},
            ValueError,
            "filter_warp: weight must have a tap and a bank, got",
        ),
        ({"matrix": [[1.0]]}, TypeError, "filter_warp: matrix must be"),
        ({"matrix": torch.ones(3, 4)}, ValueError, r"matrix must be \[3, 3\] or \[B, 3, 3\] for this weight, got"),
        ({"matrix": torch.ones(3)}, ValueError, r"matrix must be \[3, 3\] or \[B, 3, 3\]"),
        ({"matrix": torch.ones(2, 1, 3, 3)}, ValueError, r"weight must be \[E, O, I, \*kernel\], got"),
        (
            {"weight": torch.ones(2, 2, 2, 3), "matrix": torch.ones(1, 3, 3, 3)},
            ValueError,
            r"matrix must be \[B, 2, 3, 3\] for this weight, got",
        ),
        ({"matrix": torch.ones(3, 3, device="meta")}, ValueError, "matrix must be on cpu as weight is, got"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float64, float32, bfloat16 or float16, got torch.int32"),
        ({"dtype": "float32"}, TypeError, "dtype must be float64, float32, bfloat16 or float16, got 'float32'"),
    ],
)
def test_errors(change, error, message) -> None:
    with pytest.raises(error, match=message):
        filter_warp(**{"weight": torch.ones(2, 2, 3), "matrix": torch.ones(3, 3), **change})
