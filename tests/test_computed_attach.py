"""How a computed weight lives in a module: attaching, the swapped class, other tools on it, and what must raise."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from computed_oracle import (
    Recorder,
    Symmetric,
    iterated,
    iterations,
    linear,
    normalized,
    randn,
    set_raw,
    state_of,
    transform_of,
    unsettle,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import weightxform as wx

# the literal line, and what stays as it was


def test_the_raw_tensor_keeps_its_object_name_and_place():
    layer = nn.Linear(6, 4)
    raw, bias = layer.weight, layer.bias
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert layer._parameters["weight"] is raw
    assert wx.raw(layer) is raw and wx.raw(layer, "weight") is raw
    assert dict(layer.named_parameters()) == {"weight": raw, "bias": bias}
    assert raw.is_leaf and raw.requires_grad and type(raw) is nn.Parameter
    assert not layer.weight.is_leaf
    before = raw.detach().clone()
    y = layer(randn(3, 6, dtype=torch.float32))
    y.backward(randn(*y.shape, seed=1, dtype=torch.float32))
    optimizer.step()
    torch.testing.assert_close(raw.detach(), before - 0.5 * raw.grad)


def test_torch_is_not_patched():
    here = os.path.dirname(inspect.getfile(torch))
    for cls in (nn.Module, nn.Linear, nn.RNNBase, nn.LSTM, nn.MultiheadAttention, nn.Parameter, torch.optim.Optimizer):
        for name, member in vars(cls).items():
            if inspect.isfunction(member):
                assert inspect.unwrap(member).__code__.co_filename.startswith((here, "<")), f"{cls.__name__}.{name}"


def test_the_class_still_looks_like_its_base():
    a, b = linear(), linear(seed=1)
    assert type(a) is type(b), "one class for one base and the same names (stack_module_state needs it)"
    assert type(a) is not nn.Linear and isinstance(a, nn.Linear)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(a), attribute) == getattr(nn.Linear, attribute)
    a.bias = wx.ComputedParameter(a.bias, Recorder())
    assert type(a) is not type(b)
    assert type(a).__mro__[1] is nn.Linear, "a second name starts from the unswapped class"
    assert nn.Module.__setattr__ is type(a).__setattr__, "FSDP2 leaves its fast path otherwise"


def test_the_iterates_are_those_of_torch_under_one_seed():
    for training in (True, False):
        torch.manual_seed(5)
        ours = nn.Linear(9, 7, dtype=torch.float64).train(training)
        ours.weight = wx.ComputedParameter(ours.weight, wx.SpectralNorm())
        torch.manual_seed(5)
        theirs = parametrizations.spectral_norm(nn.Linear(9, 7, dtype=torch.float64).train(training))
        peer = theirs.parametrizations.weight[0]
        for read in range(2):
            torch.testing.assert_close(state_of(ours), (peer._u, peer._v))
            if read == 0:
                torch.testing.assert_close(ours.weight, theirs.weight)


def test_repr_shows_the_transform():
    text = repr(nn.Sequential(linear()))
    assert "SpectralNorm(n_power_iterations=1" in text and "Linear(" in text and "in_features=6" in text


def test_attaching_and_assigning_do_not_read():
    layer = nn.Linear(3, 4)
    recorder = Recorder()
    layer.weight = wx.ComputedParameter(layer.weight, recorder)
    layer.weight = nn.Parameter(torch.zeros(4, 3))
    layer.bias = nn.Parameter(torch.zeros(4))
    layer.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    assert recorder.calls == [], "hasattr inside register_parameter must not compute the weight"
    assert layer.weight.count_nonzero() == 0 and recorder.calls == [True]


# what a transform may be


def test_any_module_whose_call_returns_the_weight():
    layer = nn.Linear(5, 5, dtype=torch.float64)
    raw = layer.weight
    layer.weight = wx.ComputedParameter(layer.weight, Symmetric())
    x, g = randn(3, 5), randn(3, 5, seed=1)
    layer(x).backward(g)
    full = g.T @ x
    torch.testing.assert_close(layer.weight, (raw + raw.T) / 2)
    torch.testing.assert_close(raw.grad, (full + full.T) / 2)


class LowRank(nn.Module):
    """A weight with no raw tensor: the module owns the factors."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(randn(rows, rank, seed=1))
        self.b = nn.Parameter(randn(rank, columns, seed=2))
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += 1
        return self.a @ self.b


def test_a_module_that_owns_its_parameters():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    factors = LowRank(4, 6, 2)
    layer.weight = wx.ComputedParameter(factors)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"bias", "weight_transform.a", "weight_transform.b"}
    assert set(layer.state_dict()) == names
    x, g = randn(3, 6), randn(3, 4, seed=3)
    calls = factors.calls
    layer(x).backward(g)
    layer(x).backward(g)
    assert factors.calls - calls <= 2, "at most once a forward (a plain-autograd weight frees its graph)"
    full = 2 * g.T @ x
    torch.testing.assert_close(factors.a.grad, full @ factors.b.T)
    torch.testing.assert_close(factors.b.grad, factors.a.T @ full)
    with torch.no_grad():
        factors.a.mul_(3)
    torch.testing.assert_close(layer.weight, factors.a @ factors.b)


def test_several_computed_weights_on_one_module():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    layer.bias = wx.ComputedParameter(layer.bias, Recorder())
    unsettle(layer)
    before = state_of(layer)
    x, g = randn(3, 6), randn(3, 4, seed=1)
    y = layer(x)
    y.backward(g)
    w, b = (p.detach().clone().requires_grad_() for p in (wx.raw(layer), wx.raw(layer, "bias")))
    expected = nn.functional.linear(x, normalized(w, iterated(w, before)), 2 * b)
    expected.backward(g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(wx.raw(layer).grad, w.grad)
    torch.testing.assert_close(wx.raw(layer, "bias").grad, b.grad)
    assert wx.is_computed(layer, "weight") and wx.is_computed(layer, "bias")


@pytest.mark.parametrize("how", ["on_top", "sequential"])
def test_two_transforms_stacked_on_one_weight(how):
    layer = nn.Linear(5, 5, dtype=torch.float64)
    raw = layer.weight
    if how == "sequential":
        layer.weight = wx.ComputedParameter(layer.weight, nn.Sequential(Symmetric(), wx.SpectralNorm()))
    else:
        layer.weight = wx.ComputedParameter(layer.weight, Symmetric())
        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert wx.raw(layer) is raw
    norm = next(m for m in layer.modules() if isinstance(m, wx.SpectralNorm))
    unsettle(layer)
    set_raw(layer, randn(5, 5, seed=3))
    before = norm.u.clone(), norm.v.clone()
    x, g = randn(3, 5), randn(3, 5, seed=1)
    for _ in range(2):
        layer(x).backward(g)
    w = raw.detach().clone().requires_grad_()
    inner = (w + w.T) / 2
    nn.functional.linear(x, normalized(inner, iterated(inner, before))).backward(2 * g)
    assert iterations(before, (norm.u, norm.v), inner) == 1, "two forwards, one value of the raw tensor"
    torch.testing.assert_close(raw.grad, w.grad)
    set_raw(layer, randn(5, 5, seed=4))
    inner = (raw.detach() + raw.detach().T) / 2
    torch.testing.assert_close(layer.weight.detach(), normalized(inner, (norm.u, norm.v)))


def test_a_weight_that_is_computed_already_is_refused():
    """Except to put a transform on top, where the computed tensor itself is given."""
    layer = linear()
    before, keys = state_of(layer), list(layer.state_dict())
    transform = transform_of(layer)
    stale = layer.weight
    set_raw(layer, randn(4, 6, seed=5))
    _ = layer.weight
    before = state_of(layer)
    for raw in (wx.raw(layer), stale, nn.Parameter(randn(4, 6))):
        with pytest.raises(ValueError, match="computed"):
            layer.weight = wx.ComputedParameter(raw, wx.SpectralNorm())
    with pytest.raises(ValueError, match="computed"):
        nn.Linear(6, 4).weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert transform_of(layer) is transform and list(layer.state_dict()) == keys
    assert iterations(before, state_of(layer), wx.raw(layer)) == 0
    torch.testing.assert_close(layer.weight.detach(), normalized(wx.raw(layer).detach(), before))


class Broken(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.no_such_attribute


def test_an_attribute_error_in_a_transform_is_not_taken_for_a_missing_weight():
    layer = nn.Linear(3, 3)
    try:
        layer.weight = wx.ComputedParameter(layer.weight, Broken())
    except (RuntimeError, AttributeError) as e:
        assert "no_such_attribute" in str(e) + str(e.__cause__)
        return
    with pytest.raises(RuntimeError) as caught:
        _ = layer.weight
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))


# other tools on the same weight


def still_works(layer: nn.Module) -> None:
    x = randn(2, 6)
    torch.testing.assert_close(layer(x), x @ normalized(wx.raw(layer), state_of(layer)).T + layer.bias)
    assert wx.raw(layer).is_leaf and set(layer._buffers) == set()


def test_delete_parametrize_and_prune_raise_before_anything_changed():
    layer = linear()
    cls, raw = type(layer), wx.raw(layer)
    with pytest.raises((AttributeError, RuntimeError), match="bake"):
        del layer.weight
    with pytest.raises((AttributeError, RuntimeError), match="bake"):
        parametrize.register_parametrization(layer, "weight", Symmetric(), unsafe=True)
    with pytest.raises((AttributeError, RuntimeError), match="bake"):
        parametrizations.weight_norm(layer)
    with pytest.raises(TypeError):
        prune.random_unstructured(layer, "weight", 0.5)
    assert type(layer) is cls and wx.raw(layer) is raw and not parametrize.is_parametrized(layer)
    still_works(layer)


def test_the_old_weight_norm_raises():
    layer = linear()
    errors = AttributeError, RuntimeError, TypeError
    with pytest.warns(FutureWarning), pytest.raises(errors, match=r"bake|broken|computed"):
        torch.nn.utils.weight_norm(layer)


def test_parametrizing_another_name_and_removing_it():
    layer = linear()
    parametrize.register_parametrization(layer, "bias", Recorder())
    x = randn(2, 6)
    torch.testing.assert_close(
        layer(x), x @ normalized(wx.raw(layer), state_of(layer)).T + 2 * layer.parametrizations.bias.original
    )
    parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
    assert wx.is_computed(layer)
    still_works(layer)


def test_attaching_to_a_parametrized_module_raises_up_front():
    for name in ("weight", "bias"):
        layer = nn.Linear(3, 3)
        parametrize.register_parametrization(layer, name, Recorder())
        cls, keys = type(layer), list(layer.state_dict())
        with pytest.raises((ValueError, KeyError), match=r"parametri|exists"):
            layer.weight = wx.ComputedParameter(nn.Parameter(torch.zeros(3, 3)), wx.SpectralNorm())
        assert type(layer) is cls and list(layer.state_dict()) == keys


def test_attaching_to_one_of_two_tied_modules_warns():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.b.weight = model.a.weight
    raw = model.a.weight
    with pytest.warns(UserWarning, match="tie"):
        wx.constrain(model, wx.SpectralNorm, include=["a"])
    assert wx.is_computed(model.a) and not wx.is_computed(model.b) and model.b.weight is raw


def test_lazy_modules_raise_at_attach():
    layer = nn.LazyLinear(4)
    with pytest.raises((ValueError, TypeError), match=r"[Ll]azy|forward|uninitialized|Uninitialized"):
        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert not wx.is_computed(layer)
    layer(torch.zeros(2, 3))
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert layer(torch.zeros(2, 3)).shape == (2, 4)


def test_max_norm_raises_at_attach():
    layer = nn.Embedding(5, 4, max_norm=1.0)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="max_norm"):
        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    assert type(layer) is nn.Embedding and torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("raw", "transform", "error", "match"),
    [
        (torch.zeros(3, 3, dtype=torch.int64), "sn", TypeError, "int64"),
        (torch.zeros(3, 3, dtype=torch.complex64), "sn", TypeError, "complex64"),
        ("weight", "sn", TypeError, "str"),
        (torch.zeros(3, 3), lambda w: w, TypeError, "Module|function"),
        (torch.zeros(3, 3), None, TypeError, "Module|None"),
        (torch.zeros(()), "sn", ValueError, "axis"),
    ],
)
def test_bad_arguments_raise_and_change_nothing(raw, transform, error, match):
    layer = nn.Linear(3, 3)
    before, keys = layer.weight, list(layer.state_dict())
    with pytest.raises(error, match=match):
        layer.weight = wx.ComputedParameter(raw, wx.SpectralNorm() if transform == "sn" else transform)
    assert layer.weight is before and type(layer) is nn.Linear and list(layer.state_dict()) == keys
    assert "weight_transform" not in layer._modules


# tracing that would freeze the weight


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T


def test_fx_symbolic_trace():
    model = nn.Sequential(linear(), nn.Tanh(), linear(4, 3))
    x = randn(2, 6)
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 3, "the layers are leaves"
    torch.testing.assert_close(traced(x), model(x))
    set_raw(model[0], randn(4, 6, seed=5))
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(RuntimeError, match=r"bake|export"):
        torch.fx.symbolic_trace(ReadsTheWeight())


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_jit_raises():
    layer = linear().eval()
    with pytest.raises(RuntimeError, match=r"bake|export"):
        torch.jit.trace(layer, randn(2, 6))
    with pytest.raises(RuntimeError, match=r"bake|export"):
        torch.jit.script(layer)
    wx.bake(layer)
    x = randn(2, 6)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
