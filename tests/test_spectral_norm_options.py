"""Options of wx.SpectralNorm: order, bound, gain, n_power_iterations, eps; and the group path."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from spectral_norm_layers import (
    LAYERS,
    assert_same_state,
    axis,
    input_for,
    like,
    make,
    norm_of,
    put,
    raw,
    state_of,
    transform,
    vectors,
    write,
)
from torch import Tensor, nn
from torch.testing import assert_close

import weightxform as wx

layer = pytest.mark.parametrize("layer", LAYERS)
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def attached(layer: str, dtype: torch.dtype = torch.float64, **options) -> tuple[Tensor, wx.SpectralNorm]:
    module = make(layer, dtype)
    norm = wx.SpectralNorm(**options)
    torch.manual_seed(1)
    norm.attach(module.weight, module)
    return module.weight, norm


def converged(layer: str, scale: float = 1.0, **options) -> tuple[Tensor, wx.SpectralNorm]:
    raw, norm = attached(layer, **options)
    with torch.no_grad():
        raw.mul_(scale)
    norm.n_power_iterations, n = 300, norm.n_power_iterations
    norm.compute(raw, advance=True)
    norm.n_power_iterations = n
    return raw, norm


@layer
@pytest.mark.parametrize("n_power_iterations", [1, 2])
def test_v_first_iterates_as_the_old_hook(layer, n_power_iterations):
    """From the same vectors; the hook makes no iterations at its start."""
    module = make(layer)
    ours = put(copy.deepcopy(module), "computed", order="v_first", n_power_iterations=n_power_iterations, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.nn.utils.spectral_norm(module, n_power_iterations=n_power_iterations)
    with torch.no_grad():
        for x, y in zip(vectors(ours), (theirs.weight_u, theirs.weight_v), strict=True):
            y.copy_(x)
    x = input_for(ours)
    for _ in range(3):
        outs = ours(x), theirs(x)
        assert_close(*outs, **EXACT)
        for out in outs:
            out.backward(like(out))
        assert_close(raw(ours).grad, theirs.weight_orig.grad, **EXACT)
        assert_close(vectors(ours), (theirs.weight_u, theirs.weight_v), **EXACT)


def test_the_orders_meet():
    u_first, v_first = converged("conv2d"), converged("conv2d", order="v_first")
    assert_close(u_first[1].compute(u_first[0], False), v_first[1].compute(v_first[0], False), rtol=1e-6, atol=1e-8)


@layer
@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_bound_is_a_bound(layer, c, scale):
    """W / max(1, sigma / c): a weight within the bound is left as it is, to the bit, and so is its gradient."""
    raw, norm = converged(layer, scale, bound=c)
    sigma = norm_of(raw, norm.dim)
    out = norm.compute(raw, advance=False)
    g = like(out)
    out.backward(g)
    if sigma <= c:
        assert torch.equal(out, raw) and torch.equal(raw.grad, g)
    else:
        assert norm_of(out, norm.dim) == pytest.approx(c, rel=1e-4)
        assert_close(out, raw * (c / sigma), rtol=1e-4, atol=1e-6)


@layer
@pytest.mark.parametrize("gain", [0.3, -2.0])
@pytest.mark.parametrize("learn_gain", [False, True])
def test_gain_is_the_norm(layer, gain, learn_gain):
    raw, norm = converged(layer, gain=gain, learn_gain=learn_gain)
    out = norm.compute(raw, advance=False)
    assert norm_of(out, norm.dim) == pytest.approx(abs(gain), rel=1e-4)
    plain = converged(layer)
    assert_close(out, gain * plain[1].compute(plain[0], False), rtol=1e-6, atol=1e-8)


@layer
@pytest.mark.parametrize("bound", [None, 0.2, 1e3])
def test_gradients_of_weight_and_learned_gain_against_autograd(layer, bound):
    raw, norm = attached(layer, gain=1.7, learn_gain=True, bound=bound)
    write_in_place(raw)
    out = norm.compute(raw, advance=True)
    g = like(out)
    grads = torch.autograd.grad(out, (raw, norm.gain), g)
    u, v, gain = norm.u.clone(), norm.v.clone(), norm.gain
    sigma = u @ raw.movedim(norm.dim, 0).flatten(1) @ v
    factor = sigma if bound is None else torch.clamp_min(sigma / bound, 1)
    assert_close(out, gain * raw / factor, **EXACT)
    assert_close(grads, torch.autograd.grad(gain * raw / factor, (raw, gain), g), **EXACT)


def write_in_place(raw: Tensor) -> None:
    with torch.no_grad():
        raw.add_(0.3 * like(raw, 9))


def test_a_learned_gain_trains_and_is_saved():
    module = put(make("linear"), "computed", gain=2.0, learn_gain=True)
    gain = transform(module).gain
    assert any(p is gain for p in module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = input_for(module)
    for _ in range(3):
        out = module(x)
        optimizer.zero_grad()
        out.backward(like(out))
        optimizer.step()
    assert gain.item() != 2.0
    before = module.weight.detach().clone()
    with torch.no_grad():
        gain.mul_(2)
    assert_close(module.weight, 2 * before, rtol=1e-3, atol=1e-3)  # and one more iteration at most
    assert "weight_transform.gain" in module.state_dict()
    twin = put(make("linear", seed=5), "computed", learn_gain=True)
    twin.load_state_dict(module.state_dict(), strict=True)
    assert_close(twin.eval().weight, module.eval().weight, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gain_of_any_dtype(dtype):
    raw, norm = attached("linear", dtype, gain=1.5, learn_gain=True)
    assert norm.gain.dtype == torch.float32
    out = norm.compute(raw, True)
    out.backward(like(out))
    assert out.dtype == raw.grad.dtype == dtype and norm.gain.grad.dtype == torch.float32
    norm.to(dtype)
    norm.gain.grad = None
    out = norm.compute(raw, True)
    out.backward(like(out))
    assert norm.gain.grad.dtype == dtype


@layer
def test_no_iterations_keep_the_first_vectors(layer):
    module = put(make(layer), "computed", n_power_iterations=0)
    before = [x.clone() for x in vectors(module)]
    for step in range(3):
        write(module, 1.0, seed=step)
        out = module.weight
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(module), strict=True))
    u, v = before
    sigma = u @ raw(module).movedim(axis(module), 0).flatten(1) @ v
    assert_close(out, raw(module) / sigma, **EXACT)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
def test_eps_as_torch(eps):
    """A large eps makes vectors shorter than 1, as in torch."""
    from torch.nn.utils.parametrizations import spectral_norm

    ours, theirs = make("linear"), make("linear")
    torch.manual_seed(1)
    put(ours, "parametrize", eps=eps)
    torch.manual_seed(1)
    spectral_norm(theirs, eps=eps)
    for _ in range(2):
        out = ours.weight
        assert_close(out, theirs.weight, rtol=1e-9, atol=1e-9)
    u, v = vectors(theirs)
    assert_close(vectors(ours), (u, v), **EXACT)


def test_autocast_casts_in_the_same_pass():
    module = put(make("linear", torch.float32), "computed")
    plain = module.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = module.weight
        assert out.dtype == torch.bfloat16
        y = module(input_for(module))
    assert_close(out.float(), plain, rtol=1e-2, atol=1e-2)
    y.backward(like(y))
    assert raw(module).grad.dtype == torch.float32
    bias = put(make("linear", torch.float32), "computed", name="bias")
    with torch.autocast("cpu", torch.bfloat16):
        assert bias.bias.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bound": 0.3, "gain": 1.5}, {"learn_gain": True, "gain": 0.5}])
def test_compiled_equals_eager(options):
    """A weight and a vector, training then eval: outputs, every gradient, and the vectors."""
    results = []
    for compiled in (False, True):
        module = put(make("linear"), "computed", **options)
        put(module, "computed", name="bias", **options)
        run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        found = []
        for step in range(4):
            module.train(step < 2)
            write(module, 1.0, seed=step)
            out = run(input_for(module, step))
            found += [out, *torch.autograd.grad(out, list(module.parameters()), like(out, step))]
        results.append((*found, *vectors(module)))
    assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize("options", [{"bound": 0.3, "gain": 1.5}, {"operator": "conv", "input_size": (5, 5)}])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_torch_func_equals_eager(options, training):
    """torch.func.grad inside torch.compile, of a weight and a vector; neither writes the state."""
    module = put(put(make("conv2d"), "computed", **options), "computed", name="bias").train(training)
    x = input_for(module)
    g = like(module(x).detach())
    before = state_of(module)
    values = {name: value.detach() + 0.1 for name, value in module.named_parameters()}

    def loss(values):
        return (torch.func.functional_call(module, values, (x,)) * g).sum()

    eager = torch.func.grad(loss)(values)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(values)
    assert_close(compiled, eager, **EXACT)
    assert_same_state(module, before)


def test_exported_equals_eager():
    module = put(make("conv2d"), "computed", gain=1.5).eval()
    x = input_for(module)
    assert_close(torch.export.export(module, (x,)).module()(x), module(x), **EXACT)


def test_repr():
    assert repr(wx.SpectralNorm()) == "SpectralNorm(n_power_iterations=1, dim=None)"
    options = {"order": "v_first", "bound": 2, "gain": 0.5, "cache": False}
    expected = "SpectralNorm(n_power_iterations=2, dim=1, order='v_first', bound=2.0, gain=0.5, cache=False)"
    assert repr(wx.SpectralNorm(2, dim=1, **options)) == expected
    assert "learn_gain=True" in repr(wx.SpectralNorm(learn_gain=True))


# the group path


def members(**options) -> list[tuple[Tensor, wx.SpectralNorm]]:
    return [attached(name, **options) for name in LAYERS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_power_iterations": 3},
        {"order": "v_first"},
        {"bound": 0.3},
        {"gain": 1.5},
        {"learn_gain": True, "gain": 0.7},
    ],
)
@pytest.mark.parametrize("advance", ["all", "none", "some"])
def test_a_group_computes_what_its_members_compute(options, advance):
    together, alone = members(**options), members(**options)
    flags = [{"all": True, "none": False, "some": i % 2 == 0}[advance] for i in range(len(LAYERS))]
    keys = {norm.group_key(raw) for raw, norm in together}
    assert len(keys) == 1 and None not in keys
    for _ in range(2):
        for weight, _ in (*together, *alone):
            write_in_place(weight)
        raws, norms = zip(*together, strict=True)
        outs = wx.SpectralNorm.compute_group(norms, raws, flags)
        expected = [norm.compute(raw, flag) for (raw, norm), flag in zip(alone, flags, strict=True)]
        assert_close(outs, expected, **EXACT)
        for (_, a), (_, b) in zip(together, alone, strict=True):
            assert_close((a.u, a.v), (b.u, b.v), **EXACT)
    for results, pairs in ((outs, together), (expected, alone)):
        inputs = [t for raw, norm in pairs for t in (raw, norm.gain) if t is not None]
        grads = torch.autograd.grad(results, inputs, [like(out) for out in results])
        if pairs is together:
            first = grads
    assert_close(first, grads, **EXACT)


def test_what_cannot_be_in_one_group_has_another_key():
    raw, norm = attached("linear")
    key = norm.group_key(raw)
    for options in ({"eps": 1e-6}, {"order": "v_first"}, {"bound": 1.0}, {"gain": 2.0}, {"learn_gain": True}):
        other_raw, other = attached("linear", **options)
        assert other.group_key(other_raw) != key, options
    assert attached("linear", torch.float32)[1].group_key(raw.float()) != key
    assert norm.group_key(raw.to("meta")) != key
    assert attached("conv2d", n_power_iterations=3)[1].group_key(raw) == key
    vector = wx.SpectralNorm()
    bias = nn.Linear(3, 4).double().bias
    vector.attach(bias)
    assert vector.group_key(bias) is None
    module = nn.Conv2d(2, 3, 3).double()
    conv = wx.SpectralNorm(operator="conv", input_size=(5, 5))
    conv.attach(module.weight, module)
    assert conv.group_key(module.weight) is None


def test_averaged_vectors_in_a_group_are_normalized():
    together, alone = members(), members()
    for _, norm in (*together, *alone):
        norm.u.mul_(0.7), norm.v.mul_(1.2)
    raws, norms = zip(*together, strict=True)
    outs = wx.SpectralNorm.compute_group(norms, raws, [False] * len(raws))
    assert_close(outs, [norm.compute(raw, False) for raw, norm in alone], **EXACT)
    fresh = members()
    assert_close(outs, [norm.compute(raw, False) for raw, norm in fresh], **EXACT)


def test_a_member_that_is_zero_does_not_disturb_the_others():
    together = members()
    with torch.no_grad():
        together[1][0].zero_()
        together[3][0][0].fill_(float("nan"))
    before = [(norm.u.clone(), norm.v.clone()) for _, norm in together]
    raws, norms = zip(*together, strict=True)
    outs = wx.SpectralNorm.compute_group(norms, raws, [True] * len(raws))
    for i, (out, norm, (u, _)) in enumerate(zip(outs, norms, before, strict=True)):
        assert torch.isfinite(out).all() == (i != 3)
        assert torch.equal(norm.u, u) == (i in (1, 3))
    assert torch.equal(outs[1], torch.zeros_like(outs[1]))
