"""Copies and pickles of modules with computed weights, and ties, which copies keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from computed_oracle import (
    computed,
    iterated,
    iterations,
    linear,
    net,
    normalized,
    randn,
    set_raw,
    state_of,
    through_torch_save,
    transform_of,
    unsettle,
)
from torch import nn

import weightxform as wx

COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle_protocol_2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "torch_save": through_torch_save,
}


# copies


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_copies_are_right_and_independent(how, training):
    model = net().train(training)
    x, g = randn(3, 6), randn(3, 3, seed=1)
    model(x).backward(g)  # weights are cached, non-leaf tensors now
    model.zero_grad()
    states = [state_of(model[i]) for i in (0, 2)]
    twin = COPIES[how](model)
    for i, state in zip((0, 2), states, strict=True):
        assert isinstance(twin[i], nn.Linear) and type(twin[i]) is type(model[i]), "one class (stack_module_state)"
        assert wx.raw(twin[i]) is not wx.raw(model[i]) and wx.raw(twin[i]).is_leaf
        assert transform_of(twin[i]) is not transform_of(model[i])
        assert iterations(state, state_of(twin[i]), wx.raw(model[i])) == 0, "copying does not iterate"
        assert iterations(state, state_of(model[i]), wx.raw(model[i])) == 0
        torch.testing.assert_close(wx.raw(twin[i]), wx.raw(model[i]))
        set_raw(twin[i], randn(*wx.raw(twin[i]).shape, seed=7 + i))
    # now they differ, and so do their weights, gradients and states
    kept = [wx.raw(model[i]).detach().clone() for i in (0, 2)]
    twin(x).backward(g)
    assert all(wx.raw(model[i]).grad is None for i in (0, 2))
    for i, state in zip((0, 2), states, strict=True):
        assert iterations(state, state_of(twin[i]), wx.raw(twin[i])) == int(training)
        torch.testing.assert_close(twin[i].weight, normalized(wx.raw(twin[i]), state_of(twin[i])))
        assert iterations(state, state_of(model[i]), wx.raw(model[i])) == 0
        torch.testing.assert_close(model[i].weight, normalized(wx.raw(model[i]), state))
    for i, raw in zip((0, 2), kept, strict=True):
        torch.testing.assert_close(wx.raw(model[i]).detach(), raw)
    w = [wx.raw(twin[i]).detach().clone().requires_grad_() for i in (0, 2)]
    ws = [normalized(a, iterated(a, s, int(training))) for a, s in zip(w, states, strict=True)]
    nn.functional.linear(nn.functional.linear(x, ws[0], twin[0].bias).tanh(), ws[1]).backward(g, inputs=w)
    for i, a in zip((0, 2), w, strict=True):
        torch.testing.assert_close(wx.raw(twin[i]).grad, a.grad)


def test_a_copy_of_a_copy_and_removal_on_a_copy():
    layer = linear()
    twin = copy.deepcopy(copy.deepcopy(layer))
    wx.bake(twin)
    assert type(twin) is nn.Linear and wx.is_computed(layer)
    torch.testing.assert_close(layer.eval().weight, normalized(wx.raw(layer), state_of(layer)))


def test_shallow_copy_shares_the_raw_tensor():
    layer = linear().eval()
    twin = copy.copy(layer)
    assert wx.raw(twin) is wx.raw(layer)
    torch.testing.assert_close(twin.weight, layer.weight)


class Cyclic(nn.Linear):
    """A class with attributes of its own, a cycle, and its own __deepcopy__ and __setstate__."""

    def __init__(self) -> None:
        super().__init__(6, 4, dtype=torch.float64)
        self.__dict__["me"] = self
        self.copies, self.loads = 0, 0

    def __deepcopy__(self, memo):
        twin = Cyclic.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.copies += 1
        return twin

    def __setstate__(self, state):
        super().__setstate__(state)
        self.loads += 1


def test_classes_with_cycles_and_their_own_protocols():
    layer = computed(Cyclic())
    _ = layer.weight
    twin = copy.deepcopy(layer)
    assert twin.copies == 1 and twin.me is twin
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.loads == 1 and loaded.me is loaded
    for m in (twin, loaded):
        assert isinstance(m, Cyclic) and wx.is_computed(m)
        torch.testing.assert_close(m.eval().weight, normalized(wx.raw(layer), state_of(m)))


def test_a_whole_model_refuses_weights_only_as_any_module():
    for module in (linear(), nn.Linear(3, 3)):
        with pytest.raises(pickle.UnpicklingError):
            through_torch_save(module, weights_only=True)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_constrained_model(how):
    """Members of a group refer to one another: cycles."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    wx.constrain(model, wx.SpectralNorm)
    unsettle(model)
    x, g = randn(3, 6), randn(3, 3, seed=1)
    model(x)
    states = [state_of(model[i]) for i in (0, 2, 4)]
    twin = COPIES[how](model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * randn(*p.shape, seed=p.numel()))
    y = twin(x)
    y.backward(g)
    ws = [wx.raw(twin[i]).detach().clone().requires_grad_() for i in (0, 2, 4)]
    h = x
    for n, (i, w, s) in enumerate(zip((0, 2, 4), ws, states, strict=True)):
        h = nn.functional.linear(h.tanh() if n else h, normalized(w, iterated(w, s)), twin[i].bias)
    torch.testing.assert_close(y, h)
    h.backward(g, inputs=ws)
    for i, w, s in zip((0, 2, 4), ws, states, strict=True):
        torch.testing.assert_close(wx.raw(twin[i]).grad, w.grad)
        assert iterations(s, state_of(twin[i]), w) == 1
        assert iterations(s, state_of(model[i]), wx.raw(model[i])) == 0
        assert wx.raw(model[i]).grad is None


# ties


def check_tied(a: nn.Module, b: nn.Module) -> None:
    assert wx.raw(a) is wx.raw(b) and transform_of(a) is transform_of(b)
    before = state_of(a)
    set_raw(a, randn(*wx.raw(a).shape, seed=11))
    assert a.weight is b.weight, "computed once"
    assert iterations(before, state_of(a), wx.raw(a)) == 1
    for m in (a, b):
        m.zero_grad()
    x, g = randn(2, wx.raw(a).shape[1]), randn(2, wx.raw(a).shape[0], seed=1)
    (nn.functional.linear(x, a.weight) + nn.functional.linear(2 * x, b.weight)).backward(g)
    w = wx.raw(a).detach().clone().requires_grad_()
    nn.functional.linear(3 * x, normalized(w, iterated(w, before))).backward(g)
    torch.testing.assert_close(wx.raw(a).grad, w.grad)


@pytest.mark.parametrize("how", ["as_is", *COPIES])
def test_constrain_finds_ties(how):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "hidden": nn.Linear(5, 5), "head": nn.Linear(5, 7)}).double()
    model["head"].weight = model["embed"].weight
    wx.constrain(model, wx.SpectralNorm)
    unsettle(model)
    model["head"](model["hidden"](model["embed"](torch.tensor([1, 2]))))
    model = model if how == "as_is" else COPIES[how](model)
    check_tied(model["embed"], model["head"])
    keys = set(model.state_dict())
    assert {"embed.weight_transform.u", "head.weight_transform.u"} <= keys, "keys appear twice, as tied keys do"
    model.load_state_dict(model.state_dict())
    check_tied(model["embed"], model["head"])


@pytest.mark.parametrize("how", ["as_is", *COPIES])
def test_tie(how):
    model = nn.ModuleList([linear(seed=0), nn.Linear(6, 4, dtype=torch.float64)])
    _ = model[0].weight
    with pytest.raises(TypeError):
        model[1].weight = model[0].weight
    wx.tie(model[1], model[0])
    model = model if how == "as_is" else COPIES[how](model)
    check_tied(model[0], model[1])
    assert len({id(p) for p in model.parameters()}) == 3


@pytest.mark.parametrize("how", ["assignment", "load_assign"])
def test_untying_gives_each_its_own_state(how):
    """As in torch, a tie ends where one module gets another parameter."""
    model = nn.ModuleList([linear(seed=0), nn.Linear(6, 4, dtype=torch.float64)])
    wx.tie(model[1], model[0])
    _ = model[1].weight
    if how == "assignment":
        model[1].weight = nn.Parameter(randn(4, 6, seed=9))
    else:
        values = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict({**values, "1.weight": randn(4, 6, seed=9)}, assign=True)
    a, b = model
    assert wx.raw(a) is not wx.raw(b) and transform_of(a) is not transform_of(b)
    for step in range(2):
        for layer in model:
            set_raw(layer, randn(4, 6, seed=20 + step + len(model)) * (1 + step))
            before = state_of(layer)
            other = state_of(b if layer is a else a)
            torch.testing.assert_close(layer.weight.detach(), normalized(wx.raw(layer).detach(), state_of(layer)))
            assert iterations(before, state_of(layer), wx.raw(layer)) == 1
            torch.testing.assert_close(state_of(b if layer is a else a), other)


def test_tie_refuses_what_does_not_fit():
    a, plain = linear(), nn.Linear(6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="computed"):
        wx.tie(a, plain)
    with pytest.raises(ValueError):
        wx.tie(nn.Linear(3, 3), a)
    with pytest.raises(ValueError, match="nothing_here"):
        wx.tie(plain, a, "nothing_here")
    assert not wx.is_computed(plain)
