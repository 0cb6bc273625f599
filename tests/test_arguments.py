"""Any arguments at all: a result with its invariants, or a documented error that changes nothing."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import weightxform as wx

DOCUMENTED = (TypeError, ValueError, IndexError)
few = hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.uint8)
junk = (
    st.sampled_from(
        [None, "1", "u_first", 1.5, True, -1, 0, math.nan, math.inf, 10**30, 10**400, -(2**70), [1], (), {}, b"x", 1j]
    ).map(lambda x: x)
    | st.builds(lambda: torch.ones(2))
    | st.builds(lambda: torch.tensor(2))
)


class Arguments:
    """Draws arguments that are good, but for those named in ``bad``: at most two, and none half of the time."""

    def __init__(self, data: st.DataObject, *names: str) -> None:
        self.data = data
        self.bad = data.draw(st.just(()) | st.lists(st.sampled_from(names), max_size=2), "bad")

    def __call__(self, name: str, good: st.SearchStrategy, wrong: st.SearchStrategy = junk) -> Any:
        return self.data.draw(junk | wrong if name in self.bad else good, name)


counts, no_counts = st.integers(0, 4), st.integers(-3, -1)
axes = st.integers(-4, 3)
epsilons, no_epsilons = st.sampled_from([1e-12, 1e-6, 1.0, 1e-300, 1e30]), st.sampled_from([0.0, -1.0, 1e300])
bounds, no_bounds = st.none() | st.sampled_from([0.5, 3, 1e-30, 1e30]), st.sampled_from([0.0, -2.0, 1e300])
gains = st.sampled_from([1.0, 0, -2.5, 3, 1e30])
orders = st.sampled_from(["u_first", "v_first"])


@st.composite
def weights(draw, dtypes=FLOATS) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    dtype = draw(st.sampled_from(dtypes))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 3))))
    weight = weight * draw(st.sampled_from([1.0, 0.0, 1e-20, 1e15, math.nan, math.inf]))
    return weight.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.detach().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def vector(weight: Any, dim: Any, which: int) -> Tensor:
    if not isinstance(weight, Tensor) or weight.ndim == 0 or not isinstance(dim, int) or isinstance(dim, bool):
        return torch.ones(1)
    size = weight.shape[dim % weight.ndim]
    size = size if which == 0 else math.prod(s for i, s in enumerate(weight.shape) if i != dim % weight.ndim)
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return torch.full((size,), size**-0.5 if size else 0.0, dtype=dtype)


@few
@hypothesis.given(data=st.data())
def test_the_functional_form(data):
    names = ("weight", "u", "v", "n_power_iterations", "eps", "dim", "order", "bound", "gain", "dtype")
    argument = Arguments(data, *names)
    weight = argument("weight", weights(), weights(OTHERS))
    ndim = weight.ndim if isinstance(weight, Tensor) else 0
    dim = argument("dim", st.integers(-ndim, max(ndim - 1, -ndim)), st.integers(-9, 9))
    u, v = (argument("uv"[i], st.just(vector(weight, dim, i)), st.just(torch.ones(3))) for i in (0, 1))
    options = {
        "n_power_iterations": argument("n_power_iterations", counts, no_counts),
        "eps": argument("eps", epsilons, no_epsilons),
        "dim": dim,
        "order": argument("order", orders),
        "bound": argument("bound", bounds, no_bounds),
        "gain": argument("gain", st.none() | gains.map(lambda gain: torch.tensor(float(gain)))),
        "dtype": argument("dtype", st.none() | st.sampled_from(FLOATS), st.sampled_from(OTHERS)),
    }
    tensors = [t for t in (weight, u, v, options["gain"]) if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    try:
        out, new_u, new_v, sigma = wx.functional.spectral_norm(weight, u, v, **options)
    except DOCUMENTED as error:
        assert argument.bad or ndim == 0
        assert "spectral_norm: " in str(error)
    else:
        assert out.shape == weight.shape and out.dtype == (options["dtype"] or weight.dtype)
        assert (new_u.shape, new_v.shape, sigma.shape) == (u.shape, v.shape, ())
        assert new_u.dtype == new_v.dtype == sigma.dtype == u.dtype
        assert torch.isfinite(new_u).all() and torch.isfinite(new_v).all()
        assert torch.isfinite(out).all() or not _tame(weight, options)
        if not torch.count_nonzero(weight):
            assert not torch.count_nonzero(out)
    assert all(same(a, b) for a, b in zip(tensors, before, strict=True))


def _tame(weight: Tensor, options: dict) -> bool:
    """Far from where float32 (and the result's dtype) overflows or vanishes: there a result must be finite."""
    nonzero = weight[weight != 0].double().abs()
    gain = options["gain"]
    return (
        bool(torch.isfinite(weight).all())
        and (nonzero.numel() == 0 or (nonzero.min() > 1e-3 and nonzero.max() < 1e3))
        and options["eps"] < 1e-5
        and options["bound"] in (None, 0.5, 3)
        and (gain is None or gain.abs().item() < 10)
        and options["n_power_iterations"] > 0
    )


OPTIONS: dict[str, tuple[st.SearchStrategy, st.SearchStrategy]] = {
    "n_power_iterations": (counts, no_counts),
    "eps": (epsilons, no_epsilons),
    "dim": (st.none() | axes, junk),
    "order": (orders, junk),
    "bound": (bounds, no_bounds),
    "gain": (gains, st.just(1e300)),
    "learn_gain": (st.booleans(), junk),
    "operator": (st.sampled_from(["matrix", "conv"]), junk),
    "input_size": (st.none() | st.lists(st.integers(1, 6), max_size=3).map(tuple), st.just((0, 3))),
    "cache": (st.booleans(), junk),
}


LAYERS = (
    lambda: nn.Linear(3, 4),
    lambda: nn.Conv1d(2, 3, 3),
    lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2),
    lambda: nn.ConvTranspose2d(2, 3, 2, stride=2),
    lambda: nn.Embedding(5, 3),
    lambda: nn.Bilinear(2, 3, 4),
    lambda: nn.BatchNorm1d(3),
    lambda: nn.PReLU(),
    lambda: nn.Linear(3, 4, dtype=torch.complex64),
    lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
    lambda: nn.Linear(1, 1),
    lambda: nn.Linear(3, 4, device="meta"),
)


class Snapshot:
    """What must be the same after an error."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.tensors = {k: (v, v.detach().clone()) for k, v in module.state_dict(keep_vars=True).items()}
        self.children = dict(module._modules)

    def check(self) -> None:
        assert type(self.module) is self.kind and self.module._modules == self.children
        now = self.module.state_dict(keep_vars=True)
        assert now.keys() == self.tensors.keys()
        for key, (tensor, value) in self.tensors.items():
            assert now[key] is tensor and (value.is_meta or same(tensor, value)), key


def check_normalized(module: nn.Module, name: str) -> None:
    raw = wx.raw(module, name)
    before = raw.detach().clone()
    for training in (True, False):
        module.train(training)
        weight = getattr(module, name)
        assert weight.shape == raw.shape and weight.dtype == raw.dtype and weight.device == raw.device
        if raw.requires_grad and not raw.is_meta:
            (grad,) = torch.autograd.grad(weight, raw, torch.ones_like(weight))
            assert grad.shape == raw.shape
    assert raw.is_meta or same(raw, before)
    transform = getattr(module, f"{name}_transform")
    for x in (transform.u, transform.v):
        assert x is None or x.is_meta or torch.isfinite(x).all()


@few
@hypothesis.given(data=st.data())
def test_the_transform(data):
    argument = Arguments(data, *OPTIONS)
    chosen = data.draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=4), "options")
    options = {name: argument(name, *OPTIONS[name]) for name in sorted(chosen)}
    try:
        norm = wx.SpectralNorm(**options)
    except DOCUMENTED as error:
        assert str(error).startswith("SpectralNorm: ")
        return
    module = data.draw(st.sampled_from(LAYERS), "layer")()
    name = data.draw(st.sampled_from(["weight", "weight", "bias"]), "name")
    raw = module._parameters.get(name)
    snapshot = Snapshot(module)
    try:
        setattr(module, name, wx.ComputedParameter(raw, norm))
    except DOCUMENTED:
        snapshot.check()
    else:
        check_normalized(module, name)


@few
@hypothesis.given(data=st.data())
def test_the_drop_in(data):
    argument = Arguments(data, "module", "name", "n_power_iterations", "eps", "dim")
    module = argument("module", st.sampled_from(LAYERS).map(lambda make: make()))
    name = argument("name", st.sampled_from(["weight", "bias"]), st.sampled_from(["running_mean", "nothing"]))
    options = {
        "n_power_iterations": argument("n_power_iterations", st.integers(1, 4), st.just(0)),
        "eps": argument("eps", epsilons, no_epsilons),
        "dim": argument("dim", st.none() | axes),
    }
    snapshot = Snapshot(module) if isinstance(module, nn.Module) else None
    try:
        result = wx.spectral_norm(module, name, **options)
    except DOCUMENTED:
        if snapshot:
            snapshot.check()
    else:
        assert result is module
        check_normalized(module, name)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def mixed_model() -> nn.Module:
    """Two dtypes and two devices."""
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"), nn.Linear(3, 3).double(), nn.Linear(3, 3))


MODELS = (
    small_model,
    mixed_model,
    lambda: nn.Linear(3, 4),
    lambda: nn.ReLU(),
    lambda: nn.Linear(3, 4, dtype=torch.cfloat),
)
TRANSFORMS = (wx.SpectralNorm, lambda module, path: wx.SpectralNorm(), lambda module, path: None)
WRONG = (wx.SpectralNorm(), nn.Linear, lambda module, path: 3, lambda: wx.SpectralNorm(), torch.ones(2), dict)


@few
@hypothesis.given(data=st.data())
def test_constrain(data):
    argument = Arguments(data, "model", "transform", "include", "exclude", "bucket_bytes", *OPTIONS)
    model = argument("model", st.sampled_from(MODELS).map(lambda make: make()))
    transform = argument("transform", st.sampled_from(TRANSFORMS), st.sampled_from(WRONG))
    patterns = st.none() | st.lists(st.sampled_from(["*", "0", "4", "*.weight", "2"]), max_size=2)
    wrong = st.just(["no such layer"]) | st.just("0") | st.just([3])
    keywords = {
        "include": argument("include", patterns, wrong),
        "exclude": argument("exclude", st.none() | st.just(["2"]), wrong),
        "bucket_bytes": argument("bucket_bytes", st.sampled_from([1, 100, 2**25]), st.integers(-2, 0)),
    }
    chosen = data.draw(st.sets(st.sampled_from(["bound", "eps", "order", "dim"]), max_size=1), "options")
    keywords |= {name: argument(name, *OPTIONS[name]) for name in sorted(chosen)}
    snapshots = [Snapshot(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        result = wx.constrain(model, transform, **keywords)
    except DOCUMENTED:
        for snapshot in snapshots:
            snapshot.check()
    else:
        assert result is model
        for module in model.modules():
            if wx.is_computed(module, "weight"):
                check_normalized(module, "weight")


def test_a_group_of_mixed_devices_and_dtypes():
    """Members that cannot share a call are computed apart."""
    model = wx.constrain(mixed_model(), wx.SpectralNorm)
    torch.manual_seed(0)
    for layer in model:
        check_normalized(layer, "weight")
    first, second, third, _ = model
    assert second.weight.is_meta and third.weight.dtype == torch.float64
    assert torch.linalg.matrix_norm(first.weight.detach(), 2).item() == pytest.approx(1, abs=0.2)


@few
@hypothesis.given(weight=weights(), n=st.integers(0, 3), order=st.sampled_from(["u_first", "v_first"]), dim=axes)
def test_sigma_is_never_above_the_norm(weight, n, order, dim):
    """sigma = u'Wv with unit u and v is at most the norm, and at least what the vectors before gave."""
    hypothesis.assume(weight.ndim and -weight.ndim <= dim < weight.ndim and weight.numel())
    hypothesis.assume(torch.isfinite(weight).all() and weight.abs().max() < 1e10)
    u, v = (vector(weight, dim, i) for i in (0, 1))
    out, _, _, sigma = wx.functional.spectral_norm(weight, u, v, dim=dim, order=order, n_power_iterations=n)
    matrix = weight.double().movedim(dim, 0).reshape(weight.shape[dim], -1)
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    assert abs(sigma.item()) <= norm * (1 + 1e-4) + 1e-30
    assert out.shape == weight.shape


# the errors by name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": 3}, TypeError, "weight must be a Tensor, got int"),
        (
            {"weight": torch.ones(3, 4, dtype=torch.int32)},
            TypeError,
            r"weight must be float64.*got int32\[3, 4\] on cpu",
        ),
        ({"weight": torch.tensor(1.0)}, ValueError, "weight must have at least one axis"),
        ({"weight": torch.ones(3, 4).to_sparse()}, TypeError, "weight must be dense"),
        ({"u": torch.ones(4)}, ValueError, r"u must be float32\[3\] on cpu, got float32\[4\] on cpu"),
        (
            {"v": torch.ones(4, dtype=torch.float64)},
            ValueError,
            r"v must be float32\[4\] on cpu, got float64\[4\] on cpu",
        ),
        ({"v": torch.ones(4, device="meta")}, ValueError, r"v must be float32\[4\] on cpu, got float32\[4\] on meta"),
        ({"u": None}, TypeError, "u must be a Tensor, got NoneType"),
        ({"n_power_iterations": -1}, ValueError, "n_power_iterations must be at least 0, got -1"),
        ({"n_power_iterations": 2.0}, TypeError, r"n_power_iterations must be an int, got 2\.0"),
        ({"eps": 0}, ValueError, "eps must be positive, got 0"),
        ({"eps": math.nan}, ValueError, "eps must be finite in float32, got nan"),
        ({"dim": 2}, IndexError, r"dim must be in \[-2, 1\] for float32\[3, 4\] on cpu, got 2"),
        ({"order": "v"}, ValueError, "order must be 'u_first' or 'v_first', got 'v'"),
        ({"bound": -1}, ValueError, "bound must be positive, got -1"),
        ({"gain": torch.ones(2)}, ValueError, r"gain must be 0-dim on cpu, got float32\[2\] on cpu"),
        ({"gain": 2.0}, TypeError, "gain must be a Tensor, got float"),
        ({"dtype": torch.int8}, TypeError, r"dtype must be float64.*got torch\.int8"),
    ],
)
def test_errors_name_argument_expectation_and_fact(change, error, message):
    arguments = {"weight": torch.ones(3, 4), "u": torch.ones(3), "v": torch.ones(4), **change}
    with pytest.raises(error, match=message):
        wx.functional.spectral_norm(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_power_iterations": -1}, ValueError, "n_power_iterations must be at least 0, got -1"),
        ({"n_power_iterations": True}, TypeError, "n_power_iterations must be an int, got True"),
        ({"n_power_iterations": 2**70}, ValueError, "n_power_iterations must fit into 64 bits"),
        ({"eps": -1e-12}, ValueError, "eps must be positive, got -1e-12"),
        ({"eps": 10**400}, ValueError, "eps must be finite"),
        ({"dim": "0"}, TypeError, "dim must be an int, got '0'"),
        ({"order": None}, ValueError, "order must be 'u_first' or 'v_first', got None"),
        ({"bound": 0}, ValueError, "bound must be positive, got 0"),
        ({"bound": "1"}, TypeError, "bound must be a number, got '1'"),
        ({"gain": math.inf}, ValueError, "gain must be finite in float32, got inf"),
        ({"gain": torch.ones(1)}, TypeError, "gain must be a number, got tensor"),
        ({"learn_gain": 1}, TypeError, "learn_gain must be a bool, got 1"),
        ({"cache": "no"}, TypeError, "cache must be a bool, got 'no'"),
    ],
)
def test_options_by_name(options, error, message):
    with pytest.raises(error, match=f"SpectralNorm: {message}"):
        wx.SpectralNorm(**options)


def test_a_weight_that_is_computed_already():
    module = wx.spectral_norm(nn.Linear(3, 4))
    snapshot = Snapshot(module)
    with pytest.raises(ValueError, match="is computed already"):
        module.weight = wx.ComputedParameter(wx.raw(module, "weight"), wx.SpectralNorm())
    snapshot.check()
    other = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"raw must be a leaf .*got a tensor that was computed"):
        other.weight = wx.ComputedParameter(module.weight, wx.SpectralNorm())
    assert type(other) is nn.Linear and not list(other.children())
    wx.spectral_norm(module)  # and on top, as with torch's
    assert torch.linalg.matrix_norm(module.weight.detach(), 2).item() == pytest.approx(1, abs=0.1)
