"""The functional forms: every derivative, every way torch has to take one."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import weightxform as wx
from weightxform.registry import OPS
from weightxform.spectral_norm import reference
from weightxform.spectral_norm.function import apply, apply_list
from weightxform.spectral_norm.op import make_inputs
from weightxform.verify import check_case
from weightxform.weight_norm.function import apply as weight_norm

SHAPES = [((4, 6), 0), ((6, 4), 1), ((3, 2, 2, 2), 0), ((2, 3, 2, 2), 1), ((5,), 0)]
OPTIONS = [{}, {"order": "v_first"}, {"bound": 0.5}, {"bound": 100.0}, {"gain": 1.3}, {"gain": 0.7, "bound": 0.5}]


def inputs(shape=(4, 6), dim=0, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    weight, u, v = make_inputs(shape, dim, dtype, torch.device("cpu"), torch.Generator().manual_seed(1))
    return weight.requires_grad_(), u, v


def with_gain(options: dict) -> tuple[dict, list[Tensor]]:
    options = dict(options)
    if "gain" not in options:
        return options, []
    return options, [torch.tensor(options.pop("gain"), dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_derivatives_of_every_order_and_mode(shape, dim, options, backend) -> None:
    if backend not in wx.backends.available():
        backend = "reference"
    weight, u, v = inputs(shape, dim)
    options, gain = with_gain(options)

    def f(weight: Tensor, *gain: Tensor) -> Tensor:  # u and v are constants of the derivative only without iterations
        extra = {"gain": gain[0]} if gain else {}
        return wx.functional.spectral_norm(weight, u, v, n_power_iterations=0, dim=dim, **options, **extra)[0]

    with wx.backend(backend):
        assert gradcheck(f, (weight, *gain), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, (weight, *gain), check_fwd_over_rev=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES[:4], ids=str)
def test_gradient_equals_autograd_of_the_formula(shape, dim, options) -> None:
    weight, u, v = inputs(shape, dim)
    options, gain = with_gain(options)
    extra = {"gain": gain[0]} if gain else {}
    out, new_u, new_v, sigma = wx.functional.spectral_norm(
        weight, u, v, dim=dim, n_power_iterations=2, **options, **extra
    )
    formula = reference.apply(weight, new_u, new_v, gain[0] if gain else None, dim, options.get("bound"))
    torch.testing.assert_close(out, formula)
    torch.testing.assert_close(sigma, new_u @ (reference.as_matrix(weight, dim) @ new_v))
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, [weight, *gain], upstream) for y in (out, formula))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_one_computed_weight_serves_many_backward_passes() -> None:
    weight, u, v = inputs()
    out = wx.functional.spectral_norm(weight, u, v)[0]
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    for g in upstream:
        out.backward(g)  # no retain_graph
    (once,) = torch.autograd.grad(out, weight, upstream.sum(0))
    torch.testing.assert_close(weight.grad, once)


def test_a_write_between_forward_and_backward_raises() -> None:
    weight, u, v = inputs()
    out = wx.functional.spectral_norm(weight, u, v)[0]
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="written between forward and backward"):
        out.backward(torch.randn_like(out))


def test_later_calls_do_not_disturb_earlier_ones() -> None:
    weight, u, v = inputs()
    first, new_u, new_v, _ = wx.functional.spectral_norm(weight, u, v)
    expected = torch.autograd.grad(first, weight, upstream := torch.randn_like(first))[0]
    wx.functional.spectral_norm(weight, new_u, new_v)
    torch.testing.assert_close(torch.autograd.grad(first, weight, upstream)[0], expected)


class TestTransforms:
    """torch.func: against a loop over members."""

    def setup_method(self) -> None:
        self.weight, self.u, self.v = inputs()
        self.weights = torch.randn(3, 4, 6, dtype=torch.float64)
        self.upstream = torch.randn(4, 6, dtype=torch.float64)

    def loss(self, weight: Tensor) -> Tensor:
        return (wx.functional.spectral_norm(weight, self.u, self.v)[0] * self.upstream).sum()

    def plain(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            u, v = reference.iterate(weight, self.u, self.v, 1, 1e-12, False)
        return (reference.apply(weight, u, v, None, 0, None) * self.upstream).sum()

    def test_vmap_of_grad(self) -> None:
        expected = torch.stack([torch.func.grad(self.plain)(w) for w in self.weights])
        torch.testing.assert_close(torch.vmap(torch.func.grad(self.loss))(self.weights), expected)

    def test_grad_of_vmap(self) -> None:
        expected = torch.stack([torch.func.grad(self.plain)(w) for w in self.weights])
        got = torch.func.grad(lambda ws: torch.vmap(self.loss)(ws).sum())(self.weights)
        torch.testing.assert_close(got, expected)

    def test_hessian_with_frozen_vectors(self) -> None:
        def ours(w: Tensor) -> Tensor:
            return (wx.functional.spectral_norm(w, self.u, self.v, n_power_iterations=0)[0] * self.upstream).sum()

        def plain(w: Tensor) -> Tensor:
            return (reference.apply(w, self.u, self.v, None, 0, None) * self.upstream).sum()

        weight = self.weight.detach()
        torch.testing.assert_close(torch.func.hessian(ours)(weight), torch.func.hessian(plain)(weight))

    def test_jacobians(self) -> None:
        def f(w: Tensor) -> Tensor:
            return wx.functional.spectral_norm(w, self.u, self.v, n_power_iterations=0)[0]

        weight = self.weight.detach()
        torch.testing.assert_close(torch.func.jacfwd(f)(weight), torch.func.jacrev(f)(weight))

    def test_vmap_over_vectors_too(self) -> None:
        us, vs = (torch.nn.functional.normalize(torch.randn(3, n, dtype=torch.float64), dim=1) for n in (4, 6))
        got = torch.vmap(wx.functional.spectral_norm)(self.weights, us, vs)
        for i in range(3):
            expected = wx.functional.spectral_norm(self.weights[i], us[i], vs[i])
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a[i], b)


def test_list_form_equals_single_form_and_skips_unused_members() -> None:
    members = [inputs(shape, dim) for shape, dim in SHAPES[:4]]
    weights, us, vs = zip(*members, strict=True)
    dims = [dim for _, dim in SHAPES[:4]]
    outs, _ = apply_list(weights, us, vs, [], dims, [1, 0, 2, 1], 1e-12, False, None, None)
    used = [0, 2, 3]
    upstream = [torch.randn_like(outs[i]) for i in used]
    torch.autograd.backward([outs[i] for i in used], upstream)
    assert weights[1].grad is None
    for i, n_iter in enumerate([1, 0, 2, 1]):
        single = apply(weights[i], us[i], vs[i], None, dims[i], n_iter, 1e-12, False, None, None)[0]
        torch.testing.assert_close(outs[i], single)
        if i in used:
            g = torch.autograd.grad(single, weights[i], upstream[used.index(i)])[0]
            torch.testing.assert_close(weights[i].grad, g)


def test_list_form_double_backward() -> None:
    weights, us, vs = zip(*(inputs(shape, dim) for shape, dim in SHAPES[:3]), strict=True)
    gains = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 1.0, 2.0)]

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply_list(tensors[:3], us, vs, tensors[3:], [0, 1, 0], [0] * 3, 1e-12, False, None, None)[0])

    assert gradcheck(f, (*weights, *gains))
    assert gradgradcheck(f, (*weights, *gains))


def test_compiled_gradients_before_convergence() -> None:
    """Under inductor; torch's own parametrization is wrong here (spec-computed-parameter, section 4)."""
    weight, u, v = inputs((5, 7))

    @torch.compile(fullgraph=True)
    def f(weight: Tensor) -> Tensor:
        return torch.tanh(wx.functional.spectral_norm(weight, u, v)[0])

    out, expected = f(weight), torch.tanh(wx.functional.spectral_norm(weight, u, v)[0])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, upstream)[0] for y in (out, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-25, -15, 15, 30])
def test_weights_of_any_scale(dtype: torch.dtype, exponent: int) -> None:
    """The square of such a weight leaves the range of float32; the kernel must not form it."""
    weight, u, v = inputs((40, 30), dtype=dtype)
    scaled = weight.detach() * 10.0**exponent
    plain, u1, v1, _ = wx.functional.spectral_norm(weight, u, v, eps=1e-300)
    out, u2, v2, sigma = wx.functional.spectral_norm(scaled, u, v, eps=1e-300)
    for a, b in ((out, plain.detach()), (u2, u1), (v2, v1)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(sigma)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_vectors_alone(value: float) -> None:
    weight, u, v = inputs()
    bad = weight.detach().clone()
    bad[1, 2] = value
    out, new_u, new_v, _ = wx.functional.spectral_norm(bad, u, v)
    assert not torch.isfinite(out).all()
    assert torch.equal(new_u, u) and torch.equal(new_v, v)


def test_zero_weight_gives_zeros_and_passes_the_gradient() -> None:
    _, u, v = inputs()
    weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    out, new_u, new_v, sigma = wx.functional.spectral_norm(weight, u, v)
    assert torch.equal(out, weight) and sigma == 0
    assert torch.equal(new_u, u) and torch.equal(new_v, v)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    torch.testing.assert_close(weight.grad, upstream)


@pytest.mark.parametrize("shape", [(700, 801), (3, 300_007), (1, 1), (150_001, 5)], ids=str)
def test_large_outputs_are_written_whole(shape: tuple[int, int]) -> None:
    """Outputs from the pool, poisoned with NaN by WEIGHTXFORM_POISON; odd sizes, stores past the cache."""
    weight, u, v = inputs(shape, dtype=torch.float32)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, *_ = wx.functional.spectral_norm(weight, u, v)
        out.backward(torch.randn_like(out))
        assert torch.isfinite(out).all() and torch.isfinite(weight.grad).all()
        weight.grad = None


def test_stores_past_the_cache_give_the_same_numbers() -> None:
    weight, u, v = inputs((2600, 2600), dtype=torch.float32)
    out, u, v, sigma = wx.functional.spectral_norm(weight, u, v)
    assert out.nbytes > 24 << 20
    torch.testing.assert_close(out, weight / sigma)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, weight, upstream)
    expected = (upstream - (upstream.double() * out.double()).sum() * torch.outer(u, v)) / sigma
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


def test_pooled_memory_is_not_shared_by_living_tensors() -> None:
    weight, u, v = inputs((600, 700), dtype=torch.float32)
    outs = [wx.functional.spectral_norm(weight.detach() + i, u, v)[0] for i in range(4)]
    copies = [out.clone() for out in outs]
    del outs[1]
    gc.collect()
    outs.insert(1, wx.functional.spectral_norm(weight.detach() + 1, u, v)[0])
    assert len({out.data_ptr() for out in outs}) == 4
    assert all(torch.equal(a, b) for a, b in zip(outs, copies, strict=True))


def test_concurrent_callers() -> None:
    op = OPS["spectral_norm_fwd"]
    failures: list[str] = []

    def work() -> None:
        for case in ("linear", "large", "conv_channels_last"):
            result = check_case(op, case, torch.float32, "cpu", op.default)
            if not result.passed:
                failures.append(str(result))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    rows, columns = 2**16 + 1, 2**15
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)  # untouched pages cost nothing
    weight[-1, -3:] = torch.tensor([3.0, 0.0, 4.0])
    u, v = torch.ones(rows) / rows**0.5, torch.ones(columns) / columns**0.5
    out, new_u, new_v, sigma = wx.functional.spectral_norm(weight, u, v)
    assert sigma == 5 and new_u[-1] == 1
    torch.testing.assert_close(new_v[-3:], torch.tensor([0.6, 0.0, 0.8]))
    torch.testing.assert_close(out[-1, -3:].float(), torch.tensor([0.6, 0.0, 0.8]), rtol=4e-3, atol=0)
    assert not out[:-1].any()


def test_bare_ops_differentiate_as_their_functions() -> None:
    """What torch leaves in the graph of an exported program. ``wx.functional`` and the modules never call them so."""
    members = [inputs(shape, dim) for shape, dim in SHAPES[:3]]
    weights, us, vs = map(list, zip(*members, strict=True))
    gains = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 1.0, 2.0)]
    options = [0, 1, 0], [1, 0, 2], 1e-12, False, None, None
    upstream = [torch.randn_like(w) for w in weights]
    op = OPS["spectral_norm_fwd_list"]
    for overload in (op.default, op.reference_overload):
        outs, _ = overload(weights, us, vs, gains, *options)
        theirs, _ = apply_list(weights, us, vs, gains, *options)
        for got, expected in zip(
            *(torch.autograd.grad(o, weights + gains, upstream) for o in (outs, theirs)), strict=True
        ):
            torch.testing.assert_close(got, expected)
    single = weights[0], us[0], vs[0], gains[0], 0, 1, 1e-12, False, None, None
    for got, expected in zip(
        *(
            torch.autograd.grad(f(*single)[0], [weights[0], gains[0]], upstream[0])
            for f in (OPS["spectral_norm_fwd"].default, apply)
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transform", [wx.SpectralNorm, wx.WeightNorm])
def test_an_exported_program_trains(transform: type) -> None:
    layer = torch.nn.Linear(6, 4).double()
    layer.weight = wx.ComputedParameter(layer.weight, transform())
    layer.eval()
    x, upstream = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    layer(x).backward(upstream)
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    program = torch.export.export(layer, (x,)).module()
    program(x).backward(upstream)
    got = dict(program.named_parameters())
    for (name, _), g in zip(layer.named_parameters(), expected, strict=True):
        torch.testing.assert_close(got[name].grad, g)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_tangent_has_the_dtype_of_the_result(dtype: torch.dtype | None) -> None:
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    for f in (
        lambda w: wx.functional.spectral_norm(w, u, v, dtype=dtype)[0],
        lambda w: weight_norm(w, u, 0, dtype)[0],
    ):
        out, tangent = torch.func.jvp(f, (weight,), (torch.randn_like(weight),))
        assert tangent.dtype == out.dtype == (dtype or torch.float32)
