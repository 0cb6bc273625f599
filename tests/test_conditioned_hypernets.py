"""Networks that give weights, against plain torch; and what holds for every transform that follows a condition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conditioned_zoo import ZOO, D, attached, conv, shaken
from torch import nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.conditioned import AffineHypernet, Experts, FilterMLP, LowRank, Rotate
from weightxform.conditioned.features import Net

ANGLE = {"angle": torch.tensor([0.3, 1.9], dtype=D)}
COS_SIN = torch.stack([ANGLE["angle"].cos(), ANGLE["angle"].sin()], 1)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("residual", [True, False])
def test_filter_mlp_is_a_plain_network(activation, residual):
    layer = nn.Conv2d(3, 4, (2, 3), dtype=D)
    transform = FilterMLP(hidden=6, activation=activation, residual=residual)
    transform.attach(layer.weight, layer)
    shaken(transform)
    scale = layer.weight.square().mean().sqrt().detach()
    assert_close(transform.scale, scale)
    network = nn.Sequential(
        nn.Linear(8, 6, dtype=D), {"relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[activation],
        nn.Linear(6, 6, dtype=D),
    )  # fmt: skip
    state = {"0.weight": transform.w1, "0.bias": transform.b1, "2.weight": transform.w2, "2.bias": transform.b2}
    network.load_state_dict(state)
    flat = layer.weight.flatten(2)
    for k in range(2):
        seen = torch.cat([flat / scale, COS_SIN[k].expand(4, 3, 2)], -1)
        expected = (scale * network(seen)).reshape(layer.weight.shape)
        assert_close(transform.at(layer.weight, ANGLE)[k], expected)
        assert_close(transform.whole(layer.weight, ANGLE)[k], expected + (layer.weight if residual else 0))


def test_filter_mlp_of_numbers_as_they_are():
    layer = conv()
    transform = FilterMLP(hidden=5, size=2, harmonics=None, normalize=False, condition="c", residual=False)
    transform.attach(layer.weight, layer)
    c = torch.randn(3, 2, dtype=D)
    expected = wx.functional.filter_mlp(
        layer.weight, c, transform.w1, transform.b1, transform.w2, transform.b2, residual=False
    )
    assert_close(transform.at(layer.weight, {"c": c}), expected)
    zero = nn.Conv2d(2, 3, 3, dtype=D)
    nn.init.zeros_(zero.weight)
    transform = FilterMLP(hidden=5)
    transform.attach(zero.weight, zero)
    assert torch.equal(transform.whole(zero.weight, ANGLE), torch.zeros(2, *zero.weight.shape, dtype=D))


def _net(net: Net, f):
    if net.first is not None:
        f = nn.functional.silu(f @ net.first.weight.T + net.first.bias)
    return f @ net.last.weight.T + net.last.bias


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, dtype=D), nn.Linear(5, 4, dtype=D)])
def test_low_rank_is_its_formula(layer, hidden):
    transform = LowRank(3, hidden=hidden)
    transform.attach(layer.weight, layer)
    shaken(transform)
    g = _net(transform.g, COS_SIN)
    change = torch.stack([transform.U @ torch.diag(row) @ transform.V for row in g]).reshape(2, *layer.weight.shape)
    assert_close(transform.at(layer.weight, ANGLE), change)
    assert_close(transform.whole(layer.weight, ANGLE), layer.weight + change)


def test_affine_hypernet_is_its_formula():
    layer = nn.Conv1d(3, 4, 5, dtype=D)
    transform = AffineHypernet(hidden=3)
    transform.attach(layer.weight, layer)
    shaken(transform)
    h = nn.functional.silu(COS_SIN @ transform.w1.T + transform.b1)
    change = torch.einsum("ch,hw->cw", h, transform.H).reshape(2, *layer.weight.shape)
    assert_close(transform.at(layer.weight, ANGLE), change)
    assert_close(transform.whole(layer.weight, ANGLE), layer.weight + change)


_AXES = {"spatial": (1, 1, -1), "input": (1, -1, 1), "output": (-1, 1, 1)}


@pytest.mark.parametrize(
    "factors",
    [
        ("expert",), ("spatial",), ("input",), ("output",), ("expert", "output"), ("input", "spatial"),
        ("output", "input"), ("expert", "spatial", "input", "output"),
    ],
)  # fmt: skip
def test_experts_are_a_loop(factors):
    layer, n = nn.Conv2d(3, 4, (2, 3), dtype=D), 3 if "expert" in factors else 1
    transform = Experts(n, factors)
    transform.attach(layer.weight, layer)
    sizes = {"expert": n, "spatial": 6, "input": 3, "output": 4}
    values = {f: torch.randn(2, sizes[f], dtype=D) for f in factors}
    banks = [layer.weight, *(transform.experts if n > 1 else [])]
    for k, out in enumerate(transform.at(layer.weight, values)):
        expected = torch.zeros(4, 3, 6, dtype=D)
        for e, bank in enumerate(banks):
            expected = expected + (values["expert"][k, e] if n > 1 else 1) * bank.flatten(2)
        for f in factors:
            if f != "expert":
                expected = expected * values[f][k].reshape(_AXES[f])
        assert_close(out, expected.reshape(layer.weight.shape))


def test_experts_begin_near_the_weight():
    layer = conv()
    transform = Experts(4, ("expert", "spatial", "input", "output"), size=2, hidden=3, noise=0.01)
    transform.attach(layer.weight, layer)
    (at,) = transform.at(layer.weight, {"c": torch.randn(1, 2, dtype=D)})
    banks = torch.cat([layer.weight[None], transform.experts])
    assert_close(at, banks.mean(0))
    rms = layer.weight.square().mean().sqrt()
    assert ((transform.experts - layer.weight).square().mean().sqrt() / rms / 0.01 - 1).abs() < 0.3
    soft = Experts(2, softmax=True)
    soft.attach(layer.weight, layer)
    r = torch.tensor([[0.2, 1.5]], dtype=D)
    a, b = r.softmax(1)[0]
    assert_close(soft.at(layer.weight, {"r": r})[0], a * layer.weight + b * soft.experts[0])


@pytest.mark.parametrize("name", ["residual", "filter_mlp", "low_rank", "hypernet"])
def test_changes_begin_as_nothing_and_learn(name):
    layer = conv()
    transform = ZOO[name].make()
    transform.attach(layer.weight, layer)
    angle = ZOO[name].conditions()
    out = transform.whole(layer.weight, angle)
    assert transform.is_change and torch.equal(out, layer.weight.expand_as(out))
    (out * torch.randn_like(out)).sum().backward()
    assert max(float(p.grad.abs().max()) for p in transform.parameters() if p.grad is not None) > 0


# for all of them


@pytest.mark.parametrize("name", ZOO)
def test_derivatives(name):
    layer = conv()
    transform = attached(name, layer)
    conditions = ZOO[name].conditions()
    if name == "flip":  # between its ends
        conditions = {"how_much": torch.tensor([0.1, 0.3, 0.8], dtype=D)}
    floats = [n for n, c in conditions.items() if c.is_floating_point()]
    parameters = dict(transform.named_parameters())
    inputs = [layer.weight, *(conditions[n].requires_grad_() for n in floats), *parameters.values()]

    def at(weight, *rest):
        given = conditions | dict(zip(floats, rest, strict=False))
        return torch.func.functional_call(
            _At(transform), dict(zip(_keys(parameters), rest[len(floats) :], strict=True)), (weight, given)
        )

    assert torch.autograd.gradcheck(at, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(at, inputs, fast_mode=True)


class _At(nn.Module):
    """``whole`` as a call."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, weight, conditions):
        return self.transform.whole(weight, conditions)


def _keys(parameters):
    return [f"transform.{name}" for name in parameters]


@pytest.mark.parametrize("name", ZOO)
def test_a_condition_alone_gives_what_it_gives_among_others(name):
    layer = conv()
    transform, conditions = attached(name, layer), ZOO[name].conditions()
    together = transform.whole(layer.weight, conditions)
    assert together.shape == (3, *layer.weight.shape)
    for k in range(3):
        alone = transform.whole(layer.weight, {n: c[k : k + 1] for n, c in conditions.items()})
        assert_close(alone[0], together[k])
    change = transform.at(layer.weight, conditions)
    assert_close(together, change + layer.weight if transform.is_change else change)


@pytest.mark.parametrize("name", ZOO)
def test_copies_are_the_same(name):
    layer = conv(torch.float32)
    transform, conditions = attached(name, layer), _in(torch.float32, ZOO[name].conditions())
    expected = transform.whole(layer.weight, conditions)
    assert torch.equal(copy.deepcopy(transform).whole(layer.weight, conditions), expected)
    assert torch.equal(pickle.loads(pickle.dumps(transform)).whole(layer.weight, conditions), expected)
    other = copy.deepcopy(ZOO[name].make())
    other.attach(layer.weight, layer)
    other.load_state_dict(transform.state_dict(), strict=True)
    assert torch.equal(other.whole(layer.weight, conditions), expected)
    assert repr(other) == repr(transform)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(name, dtype):
    """The weight in a half type, the rest in float32: the result is the rounded one of float64."""
    layer = conv(dtype)
    transform, conditions = attached(name, layer), ZOO[name].conditions()
    out = transform.whole(layer.weight, _in(torch.float32, conditions))
    assert out.dtype == dtype
    exact = copy.deepcopy(transform).double()
    for part in exact.modules():  # constants made for float32
        if "constants" in vars(part).get("_buffers", {}):
            assert part.constants.dtype == D
    expected = exact.whole(layer.weight.double(), conditions)
    assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=4e-6)
    assert transform.whole(layer.weight, _in(torch.float32, conditions), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ZOO)
def test_autocast_does_not_round_what_makes_the_weight(name):
    layer = conv(torch.float32)
    transform, conditions = attached(name, layer), _in(torch.float32, ZOO[name].conditions())
    expected = transform.whole(layer.weight, conditions), transform.whole(layer.weight, conditions, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform.whole(layer.weight, conditions), expected[0])
        assert torch.equal(transform.whole(layer.weight, conditions, torch.bfloat16), expected[1])
        if transform.linear() is not None:
            assert transform.whole_matrix(conditions, layer.weight).dtype == torch.float32


@pytest.mark.parametrize("name", ZOO)
def test_moved_to_a_half_type_and_back(name):
    layer = conv(torch.float32)
    transform, conditions = attached(name, layer), ZOO[name].conditions()
    expected = transform.whole(layer.weight, _in(torch.float32, conditions))
    layer.half()
    out = transform.half().whole(layer.weight, _in(torch.float16, conditions))
    assert out.dtype == torch.float16
    assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def _in(dtype, conditions):
    return {n: c.to(dtype) if c.is_floating_point() else c for n, c in conditions.items()}


_ALIKE = {"rotate_bicubic", "scale", "scale_xy", "shear", "affine", "steerable_keep", "learned_raw", "filter_mlp_alone"}


@pytest.mark.parametrize("name", [n for n in ZOO if n not in _ALIKE])  # another of its code is in it
def test_compiled(name):
    layer = conv()
    transform, conditions = attached(name, layer), ZOO[name].conditions()
    conditions = {n: c.requires_grad_(c.is_floating_point()) for n, c in conditions.items()}
    inputs = [layer.weight, *(c for c in conditions.values() if c.requires_grad), *transform.parameters()]
    expected = transform.whole(layer.weight, conditions)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    compiled = torch.compile(transform.whole, fullgraph=True, backend="aot_eager")
    out = compiled(layer.weight, conditions)
    assert_close(out, expected)
    for got, wanted in zip(torch.autograd.grad(out, inputs, grad, allow_unused=True), grads, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert_close(got, wanted)


_LAYERS = {
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dtype=D),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", groups=2, dtype=D),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, dilation=2, dtype=D),
    "conv3d": lambda: nn.Conv3d(4, 2, 2, bias=False, dtype=D),
    "linear": lambda: nn.Linear(4, 6, dtype=D),
}
_ACTING = {
    "low_rank": lambda: LowRank(2),
    "sum": lambda: LowRank(2, hidden=8) + LowRank(1, size=None),
    "experts": lambda: Experts(3, harmonics=2),
    "factors": lambda: Experts(3, ("expert", "input", "output"), harmonics=1, hidden=4),
    "factors_alone": lambda: Experts(1, ("input", "output"), harmonics=1),
    "sum_of_kinds": lambda: Experts(2, harmonics=1) + LowRank(2),
}


@pytest.mark.parametrize("kind", _LAYERS)
@pytest.mark.parametrize("indexed", [True, False])
def test_activation_forms(kind, indexed):
    layer = _LAYERS[kind]()
    size = [7] if kind == "linear" else [9] * (layer.weight.ndim - 2)
    x = torch.randn(4, *size, 4, dtype=D) if kind == "linear" else torch.randn(4, 4, *size, dtype=D)
    index = torch.tensor([0, 2, 1, 0]) if indexed else None
    angles = {"angle": torch.tensor([0.3, -1.1, 2.5] if indexed else [0.3, -1.1, 2.5, 0.9], dtype=D)}
    for name, make in _ACTING.items():
        transform = make()
        transform.attach(layer.weight, layer)
        shaken(transform)
        served = transform.has_activation(layer.weight, layer)
        assert served == (kind != "grouped" or name in ("low_rank", "sum"))
        y = transform.activation(layer, x, layer.weight, angles, index)
        if not served:
            assert y is None
            continue
        weights = transform.whole(layer.weight, angles)
        weights = weights if index is None else weights[index]
        expected = [
            torch.func.functional_call(layer, {"weight": w}, (v[None],)) for w, v in zip(weights, x, strict=True)
        ]
        assert_close(y, torch.cat(expected), msg=lambda m, n=name: f"{n}: {m}")
        parameters = list(transform.parameters())
        grad = torch.randn_like(y)
        for got, wanted in zip(
            torch.autograd.grad(y, [*parameters, layer.weight], grad),
            torch.autograd.grad(torch.cat(expected), [*parameters, layer.weight], grad),
            strict=True,
        ):
            assert_close(got, wanted, msg=lambda m, n=name: f"{n}: {m}")


def test_no_activation_form_where_a_layer_has_none():
    layer = nn.ConvTranspose2d(4, 6, 3)
    transform = LowRank(2)
    transform.attach(layer.weight, layer)
    assert not transform.has_activation(layer.weight, layer)
    rotate = Rotate() + LowRank(1)
    rotate.attach(conv().weight, conv())
    assert not rotate.has_activation(conv().weight, conv())


def test_a_linear_layer_needs_no_kernel():
    def model():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 4))

    x, angles = torch.randn(3, 1, 6, 6), torch.rand(3)
    for transform in (LowRank(2), AffineHypernet(3), LowRank(1) + AffineHypernet(2), Experts(2, harmonics=1)):
        net = wx.Conditioned(model(), transform, layers=["*"])
        assert net.names == ("0", "2") and net(x, angles).shape == (3, 4)
    for transform in (FilterMLP(), LowRank(2) + Rotate(), Experts(2, ("expert", "spatial"), harmonics=1)):
        with pytest.raises(ValueError, match="2 is a Linear with no spatial kernel"):
            wx.Conditioned(model(), transform, layers=["2"])


def test_arguments_are_checked():
    layer = conv()

    def raises(error, match, call):
        with pytest.raises(error, match=match):
            call()

    raises(ValueError, "FilterMLP: hidden must be at least 1", lambda: FilterMLP(hidden=0))
    raises(ValueError, "FilterMLP: activation must be", lambda: FilterMLP(activation="gelu"))
    raises(TypeError, "FilterMLP: residual must be a bool", lambda: FilterMLP(residual=1))
    raises(ValueError, "LowRank: rank must be at least 1", lambda: LowRank(0))
    raises(ValueError, "rank must be at most 3", lambda: LowRank(4).attach(layer.weight, layer))
    raises(TypeError, "AffineHypernet: hidden must be an int", lambda: AffineHypernet(hidden=1.5))
    raises(ValueError, "Experts: n must be at least 1", lambda: Experts(0))
    raises(ValueError, "Experts: factors must be some of", lambda: Experts(2, ("kernel",)))
    raises(ValueError, "factors must have 'expert' for n = 2", lambda: Experts(2, ("input",)))
    raises(ValueError, "condition must be None where several", lambda: Experts(2, ("expert", "input"), condition="c"))
    raises(ValueError, "one to three spatial axes", lambda: FilterMLP().attach(torch.randn(3, 4), None))
    raises(ValueError, r"must be \[O, I, \*kernel\]", lambda: Experts(1, ("spatial",)).attach(torch.randn(3, 4), None))
    raises(TypeError, "must be float64", lambda: LowRank(1).attach(torch.ones(3, 3, dtype=torch.int64), None))
    experts = Experts(3)
    experts.attach(layer.weight, layer)
    raises(ValueError, r"the condition must be \[C, 3\]", lambda: experts.at(layer.weight, {"r": torch.rand(2, 4)}))
    low = LowRank(1)
    raises(RuntimeError, "not attached", lambda: low.at(layer.weight, ANGLE))
    factors = Experts(2, ("expert", "input"))
    factors.attach(layer.weight, layer)
    raises(
        ValueError, "must have 'input', got 'expert'", lambda: factors.at(layer.weight, {"expert": torch.rand(1, 2)})
    )
