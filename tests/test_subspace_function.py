"""theta0 + P z as a function: every derivative, torch.func, compiled, exported, and gradients of odd kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from subspace_models import EXACT, implicit, matrix
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import weightxform as wx
from weightxform.subspace.maps import KroneckerMap, Map, StoredMap
from weightxform.subspace.reference import KINDS

SIZES = {"a": 12, "b": 45, "c": 1, "d": 66}
SHAPES = {"a": (3, 4), "b": (45,), "c": (), "d": (6, 11)}
D, DIM = sum(SIZES.values()), 9
EVERY = (*KINDS, "dense", "kronecker")
SOME = ("block_hadamard", "one_hot", "dense", "kronecker")
every = pytest.mark.parametrize("kind", EVERY)
some = pytest.mark.parametrize("kind", SOME)


def make(kind: str) -> Map:
    if kind == "kronecker":
        return KroneckerMap(SIZES, DIM, 2)
    if kind == "dense":
        return StoredMap(torch.randn(D, DIM, dtype=torch.float64), SIZES)
    return implicit(kind, SIZES, DIM, tile=64)


def tensors(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in SHAPES.values()]


def coordinates(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(DIM, dtype=dtype).requires_grad_()


def function(p: Map) -> Callable[..., tuple[Tensor, ...]]:
    return lambda z, *theta0: tuple(p.project(z, theta0, range(len(theta0))))


# derivatives


@every
def test_first_and_second_derivatives(kind):
    """Backward, its backward, forward mode, forward over reverse, all against differences."""
    p, z, theta0 = make(kind), coordinates(), tensors()
    assert gradcheck(function(p), (z, *theta0), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function(p), (z, *theta0), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@some
def test_every_entry_of_the_jacobian(kind):
    p, z, theta0 = make(kind), coordinates(), tensors()
    assert gradcheck(function(p), (z, *theta0))


@every
def test_backward_is_the_transpose(kind):
    p, z, theta0 = make(kind), coordinates(), tensors()
    P = matrix(p, SIZES)
    outs = function(p)(z, *theta0)
    grads = [torch.randn_like(o) for o in outs]
    found = torch.autograd.grad(outs, [z, *theta0], grads)
    assert_close(found[0], P.T @ torch.cat([g.flatten() for g in grads]), **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], grads, strict=True))


@every
def test_double_backward_is_the_map_itself(kind):
    """d/dg of (P'g) . v is P v: what a gradient penalty needs."""
    p, z = make(kind), coordinates()
    P = matrix(p, SIZES)
    outs = function(p)(z, *tensors(requires_grad=False))
    grads = [torch.randn_like(o).requires_grad_() for o in outs]
    (z_bar,) = torch.autograd.grad(outs, z, grads, create_graph=True)
    v = torch.randn_like(z_bar)
    again = torch.autograd.grad(z_bar, grads, v)
    assert_close(torch.cat([t.flatten() for t in again]), P @ v, **EXACT)


@some
def test_gradient_penalty(kind):
    """A loss with the gradient's norm in it, against autograd through the explicit matrix."""
    p = make(kind)
    P, theta0, x = matrix(p, SIZES), tensors(requires_grad=False), torch.randn(11, dtype=torch.float64)
    start = coordinates().detach()
    results = []
    for explicit in (False, True):
        z = start.clone().requires_grad_()
        parts = function(p)(z, *theta0)
        if explicit:
            rows = (P @ z).split(list(SIZES.values()))
            parts = [t + r.view_as(t) for t, r in zip(theta0, rows, strict=True)]
        loss = torch.tanh(parts[3] @ x).square().sum() + parts[1].cos().sum() * parts[2]
        (g,) = torch.autograd.grad(loss, z, create_graph=True)
        (loss + g.square().sum()).backward()
        results.append(z.grad)
    assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("need", [(), (0,), (1, 3)])
def test_mixed_requirements(need_z, need):
    """Only what asks for a gradient gets one, and it does not depend on who else asks."""
    p, z, theta0 = make("block_hadamard"), coordinates().detach().requires_grad_(need_z), tensors(requires_grad=False)
    for i in need:
        theta0[i].requires_grad_()
    outs = function(p)(z, *theta0)
    asks = need_z or bool(need)
    assert all(o.requires_grad == asks for o in outs)
    if asks:
        grads = [torch.randn_like(o) for o in outs]
        torch.autograd.backward(outs, grads)
        if need_z:
            assert_close(z.grad, matrix(p, SIZES).T @ torch.cat([g.flatten() for g in grads]), **EXACT)
        for i, t in enumerate(theta0):
            assert (t.grad is None) == (i not in need)
            assert i not in need or torch.equal(t.grad, grads[i])


@every
def test_missing_gradients_count_as_zero(kind):
    p, z, theta0 = make(kind), coordinates(), tensors()
    outs = function(p)(z, *theta0)
    g = torch.randn_like(outs[1])
    outs[1].backward(g)
    assert_close(z.grad, matrix(p, SIZES)[12:57].T @ g, **EXACT)
    assert [t.grad is None for t in theta0] == [True, False, True, True]


@every
def test_expanded_and_strided_gradients(kind):
    """sum() sends one number with strides of zero; a transpose, a view of other strides."""
    p, z, theta0 = make(kind), coordinates(), tensors(requires_grad=False)
    outs = function(p)(z, *theta0)
    (outs[3].sum() + (outs[0].T @ torch.arange(3.0).double()).sum()).backward()
    expected = torch.zeros(D, dtype=torch.float64)
    expected[58:] = 1
    expected[:12] = torch.arange(3.0).repeat_interleave(4)
    assert_close(z.grad, matrix(p, SIZES).T @ expected, **EXACT)


def test_sparse_gradients():
    """Embedding(sparse=True) sends a sparse one."""
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(11, 6, sparse=sparse)
        sub = wx.Subspace(model, DIM)
        (sub(torch.tensor([1, 4, 4])) * torch.arange(6.0)).sum().backward()
        results.append(sub.coordinates.grad)
    assert results[1].layout == torch.strided and results[1].abs().sum() > 0
    assert_close(results[0], results[1])


@every
def test_strides_of_theta_are_those_of_theta0(kind):
    p, z = make(kind), coordinates()
    plain = [torch.randn(s, dtype=torch.float64) for s in SHAPES.values()]
    turned = [t.T.contiguous().T if t.ndim == 2 else t for t in plain]
    for a, b, t in zip(function(p)(z, *plain), function(p)(z, *turned), turned, strict=True):
        assert torch.equal(a, b)
        assert b.stride() == t.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every
def test_half_weights_with_float_coordinates(kind, dtype):
    """Computed in float32 and rounded once; the gradient is that of float32."""
    p, z = make(kind), coordinates(torch.float32)
    theta0 = tensors(dtype, requires_grad=False)
    outs = function(p)(z, *theta0)
    assert [o.dtype for o in outs] == [dtype] * 4
    wide = function(p)(z, *[t.float() for t in theta0])
    if kind in ("dense", "kronecker"):
        assert_close([o.float() for o in outs], [w.to(dtype).float() for w in wide], rtol=1e-2, atol=1e-2)
    else:
        assert all(torch.equal(o, w.to(dtype)) for o, w in zip(outs, wide, strict=True))
    grads = [torch.randn_like(o) for o in outs]
    (found,) = torch.autograd.grad(outs, z, grads)
    (expected,) = torch.autograd.grad(wide, z, [g.float() for g in grads])
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


# torch.func


@every
def test_batch_of_coordinates_is_the_stack(kind):
    """z [K, d]: the same bits as one after another, and the gradients of each."""
    p, theta0 = make(kind), tensors()
    z = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    outs = p.project(z, theta0, range(4))
    single = [p.project(row, theta0, range(4)) for row in z]
    for i, out in enumerate(outs):
        same = torch.equal if kind not in ("dense", "kronecker") else lambda a, b: torch.allclose(a, b, 1e-12, 1e-12)
        assert same(out, torch.stack([s[i] for s in single]))
    grads = [torch.randn_like(o) for o in outs]
    found = torch.autograd.grad(outs, [z, *theta0], grads)
    expected = torch.autograd.grad([torch.stack([s[i] for s in single]) for i in range(4)], [z, *theta0], grads)
    assert_close(found, expected, **EXACT)


@some
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_coordinates(kind, axis):
    p, theta0 = make(kind), tensors(requires_grad=False)
    z = torch.randn(3, DIM, dtype=torch.float64)
    given = z if axis == 0 else z.T
    outs = vmap(lambda row: function(p)(row, *theta0), in_dims=axis)(given)
    for out, expected in zip(outs, zip(*(function(p)(row, *theta0) for row in z), strict=True), strict=True):
        assert_close(out, torch.stack(expected), **EXACT)


def test_vmap_makes_one_call(monkeypatch):
    """K of them share one generation of P, in both directions."""
    from weightxform.subspace import op

    p, theta0, calls = make("block_hadamard"), tensors(requires_grad=False), []
    for name in ("subspace_fwd", "subspace_bwd"):
        real = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    z = torch.randn(5, DIM, dtype=torch.float64)
    vmap(grad(lambda row: sum(t.square().sum() for t in function(p)(row, *theta0))))(z)
    assert sorted(calls) == ["subspace_bwd", "subspace_fwd"]


@some
def test_vmap_over_weights_and_over_both(kind):
    p, z = make(kind), torch.randn(3, DIM, dtype=torch.float64)
    stacks = [torch.randn(3, *s, dtype=torch.float64) for s in SHAPES.values()]
    only = vmap(lambda *t: function(p)(z[0], *t))(*stacks)
    both = vmap(lambda row, *t: function(p)(row, *t))(z, *stacks)
    for k in range(3):
        own = [s[k] for s in stacks]
        assert_close([o[k] for o in only], list(function(p)(z[0], *own)), **EXACT)
        assert_close([o[k] for o in both], list(function(p)(z[k], *own)), **EXACT)


@some
def test_jacobians(kind):
    p, z, theta0 = make(kind), coordinates().detach(), tensors(requires_grad=False)
    P = matrix(p, SIZES)
    for transform in (jacrev, jacfwd):
        J = transform(lambda z: torch.cat([t.flatten() for t in function(p)(z, *theta0)]))(z)
        assert_close(J, P, **EXACT)
    out, tangent = jvp(lambda z: function(p)(z, *theta0), (z,), (torch.ones_like(z),))
    assert_close(torch.cat([t.flatten() for t in tangent]), P @ torch.ones_like(z), **EXACT)
    _, back = vjp(lambda z: function(p)(z, *theta0), z)
    g = tuple(torch.randn_like(o) for o in out)
    assert_close(back(g)[0], P.T @ torch.cat([t.flatten() for t in g]), **EXACT)


@some
def test_hessian(kind):
    """f(theta) = sum cos(theta): H_z = P' diag(-cos) P."""
    p, z, theta0 = make(kind), coordinates().detach(), tensors(requires_grad=False)
    P = matrix(p, SIZES)
    H = hessian(lambda z: sum(t.cos().sum() for t in function(p)(z, *theta0)))(z)
    theta = torch.cat([t.flatten() for t in function(p)(z, *theta0)])
    assert_close(H, P.T @ (-theta.cos()[:, None] * P), rtol=1e-10, atol=1e-10)


@some
def test_forward_mode_of_theta0(kind):
    p, z, theta0 = make(kind), coordinates().detach(), tensors(requires_grad=False)
    with forward_ad.dual_level():
        t = torch.randn_like(theta0[1])
        outs = p.project(z, [theta0[0], forward_ad.make_dual(theta0[1], t)], [0, 1])
        assert torch.equal(forward_ad.unpack_dual(outs[1]).tangent, t)
        tangent = forward_ad.unpack_dual(outs[0]).tangent
        assert tangent is None or not tangent.any()


def test_population_of_a_model():
    """vmap over K coordinate vectors through functional_call of a wrapped model."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    sub = wx.Subspace(model, 7)
    z, x = torch.randn(4, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def loss(row):
        return functional_call(sub, {"coordinates": row}, (x,)).square().sum()

    found, grads = vmap(loss)(z), vmap(grad(loss))(z)
    for k in range(4):
        with torch.no_grad():
            sub.coordinates.copy_(z[k])
        sub.zero_grad()
        expected = sub(x).square().sum()
        expected.backward()
        assert_close(found[k], expected.detach(), **EXACT)
        assert_close(grads[k], sub.coordinates.grad, **EXACT)


# compiled and exported


@pytest.mark.parametrize("kind", ["block_hadamard", "dense", "kronecker", "fastfood_global_sign"])
def test_compiled(kind):
    p, z, theta0 = make(kind), coordinates(), tensors()
    compiled = torch.compile(function(p), fullgraph=True, backend="aot_eager")
    outs, expected = compiled(z, *theta0), function(p)(z, *theta0)
    assert_close(outs, expected, **EXACT)
    grads = [torch.randn_like(o) for o in outs]
    found = torch.autograd.grad(outs, [z, *theta0], grads)
    assert_close(found, torch.autograd.grad(expected, [z, *theta0], grads), **EXACT)


def test_grad_inside_compile():
    p, z, theta0 = make("block_hadamard"), coordinates().detach(), tensors(requires_grad=False)

    def of_z(z):
        return sum(t.cos().sum() for t in function(p)(z, *theta0))

    found = torch.compile(lambda z: grad(of_z)(z), fullgraph=True, backend="aot_eager")(z)
    assert_close(found, grad(of_z)(z), **EXACT)


@pytest.mark.parametrize("kind", ["block_hadamard", "dense", "kronecker"])
def test_exported_and_trained(kind):
    """torch.export keeps the ops; the program's gradients are right (its op differentiates on its own)."""
    p, z, theta0 = make(kind), coordinates(), tensors(requires_grad=False)

    class Module(nn.Module):
        def forward(self, z):
            return function(p)(z, *theta0)[3].square()

    program = torch.export.export(Module(), (z.detach(),))
    if kind != "kronecker":
        assert any("subspace" in str(node.target) for node in program.graph.nodes)
    out = program.module()(z)
    expected = Module()(z)
    assert_close(out, expected, **EXACT)
    g = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, z, g)[0], torch.autograd.grad(expected, z, g)[0], **EXACT)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("subspace_fwd", "block_hadamard-batch"),
        ("subspace_bwd", "block_hadamard-batch"),
        ("subspace_dense_fwd", "batch"),
        ("subspace_dense_bwd", "toy"),
    ],
)
def test_opcheck(name, case):
    from weightxform.registry import OPS
    from weightxform.verify import make_args

    for overload in (OPS[name].default, OPS[name].reference_overload):
        torch.library.opcheck(overload, make_args(OPS[name], case, torch.float32, "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every
def test_scalar_weights(kind, backend):
    """A parameter with no axes, in the middle of others and in a batch."""
    p, z, theta0 = make(kind), torch.randn(2, DIM, dtype=torch.float64), tensors()
    with wx.backend(backend):
        outs, batch = p.project(z[0], theta0, range(4)), p.project(z, theta0, range(4))
        assert outs[2].shape == () and batch[2].shape == (2,)
        assert_close(batch[2][0], outs[2], **EXACT)
        assert_close(outs[2] - theta0[2], matrix(p, SIZES)[57] @ z[0], **EXACT)
        assert_close(torch.autograd.grad(outs[2], theta0[2])[0], torch.ones((), dtype=torch.float64))


@every
def test_shards_make_up_the_whole(kind):
    """Rows of a tensor from firsts on, as a rank computes them; the sum of the ranks' z_bar is z_bar."""
    p, z = make(kind), coordinates().detach()
    theta0 = torch.randn(66, dtype=torch.float64)
    (whole,) = p.project(z, [theta0], [3])
    cuts = [(0, 1), (1, 23), (24, 40), (64, 2)]
    parts = [p.project(z, [theta0[f : f + n]], [3], [f])[0] for f, n in cuts]
    assert_close(torch.cat(parts), whole, **EXACT)
    g = torch.randn(66, dtype=torch.float64)
    found = sum(p.adjoint([g[f : f + n]], [3], [f]) for f, n in cuts)
    assert_close(found, p.adjoint([g], [3]), **EXACT)
