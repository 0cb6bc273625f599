"""State dicts, checkpoints, copies, pickles, ties and averages of modules with computed weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from computed_oracle import (
    Recorder,
    computed,
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
from torch import nn

import weightxform as wx


def sigma(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.detach().flatten(1))[0]


def net(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(linear(seed=seed), nn.Tanh(), linear(4, 3, seed=seed + 1))


def through_torch_save(value: object, weights_only: bool = False) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle_protocol_2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "torch_save": through_torch_save,
}

# state_dict


def test_keys_are_the_plain_keys_and_the_state():
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    keys = set(plain.state_dict())
    extra = {f"{i}.weight_transform.{x}" for i in (0, 2) for x in "uv"}
    assert set(net().state_dict()) == keys | extra
    assert [k for k, _ in net().named_parameters()] == list(plain.state_dict())
    raw_first = list(net()[0].state_dict())
    assert raw_first[0] == "weight"


def test_state_dict_holds_the_raw_tensor_and_does_not_read():
    layer = nn.Linear(3, 4)
    recorder = Recorder()
    layer.weight = wx.ComputedParameter(layer.weight, recorder)
    value = layer.state_dict()["weight"]
    assert value.data_ptr() == wx.raw(layer).data_ptr() and recorder.calls == []


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_round_trip(assign, weights_only):
    a, b = net(), net(seed=5)
    a(randn(2, 6)), b(randn(2, 6))
    b.load_state_dict(through_torch_save(a.state_dict(), weights_only), assign=assign)
    before = [state_of(b[i]) for i in (0, 2)]
    for i, state in zip((0, 2), before, strict=True):
        torch.testing.assert_close(state, state_of(a[i]))
    x, g = randn(3, 6), randn(3, 3, seed=1)
    for m in (a, b):
        m.eval()
    torch.testing.assert_close(b(x), a(x))
    for m in (a, b):
        m.zero_grad()
        m.train()
        with torch.no_grad():
            m[0].bias.zero_()
            for i in (0, 2):
                wx.raw(m[i]).mul_(1.5)  # a new value for both: one iteration from the loaded state
        m(x).backward(g)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for i, state in zip((0, 2), before, strict=True):
        assert iterations(state, state_of(b[i]), wx.raw(b[i])) == 1


def test_assign_takes_the_loaded_tensor_itself():
    layer = linear()
    _ = layer.weight
    values = {k: v.clone() for k, v in linear(seed=3).state_dict().items()}
    layer.load_state_dict(values, assign=True)
    assert wx.raw(layer).data_ptr() == values["weight"].data_ptr()
    assert type(wx.raw(layer)) is nn.Parameter
    torch.testing.assert_close(layer.eval().weight, normalized(values["weight"], state_of(layer)))


def test_a_plain_checkpoint_loads_before_and_after():
    plain = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(randn(4, 6, seed=4) @ torch.diag(torch.tensor([9.0, 4, 2, 1, 0.5, 0.1]).double()))
    checkpoint = plain.state_dict()

    before = nn.Linear(6, 4, dtype=torch.float64)
    before.load_state_dict(checkpoint)
    before.weight = wx.ComputedParameter(before.weight, wx.SpectralNorm())

    lenient = linear().eval()
    missing, unexpected = lenient.load_state_dict(checkpoint, strict=False)
    assert set(missing) == {"weight_transform.u", "weight_transform.v"} and unexpected == []

    for layer in (before.eval(), lenient):
        torch.testing.assert_close(wx.raw(layer), plain.weight)
        torch.testing.assert_close(sigma(layer.weight), torch.ones(()).double(), rtol=1e-4, atol=1e-4)


def test_a_plain_checkpoint_with_strict_fills_the_state_in():
    plain = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 3, dtype=torch.float64))
    model = net(seed=3).eval()
    with pytest.warns(UserWarning, match=r"weight_transform|state"):
        model.load_state_dict(plain.state_dict())
    for i in (0, 2):
        torch.testing.assert_close(wx.raw(model[i]), plain[i].weight)
        torch.testing.assert_close(sigma(model[i].weight), torch.ones(()).double(), rtol=1e-2, atol=1e-2)


def test_strict_errors_are_torchs():
    model = net()
    full = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"'):
        model.load_state_dict({k: v for k, v in full.items() if k != "0.bias"})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        model.load_state_dict({k: v for k, v in full.items() if k != "0.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.other"'):
        model.load_state_dict({**full, "0.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight:"):
        model.load_state_dict({**full, "0.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight_transform.u"):
        model.load_state_dict({**full, "0.weight_transform.u": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nn.Linear(6, 4).load_state_dict(model[0].state_dict())


def test_half_a_state_is_an_error_or_filled_with_notice():
    layer = linear().eval()
    half = {k: v for k, v in layer.state_dict().items() if not k.endswith(".u")}
    missing, _ = layer.load_state_dict(half, strict=False)
    assert missing == ["weight_transform.u"]
    torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))


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


# averages


def test_averaged_model():
    model = net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(randn(*p.shape, seed=step + p.numel()) * 2)
        model(randn(2, 6))
        averaged.update_parameters(model)
        averaged.eval()
        for i in (0, 2):
            layer = averaged.module[i]
            torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), state_of(layer)))
    for i in (0, 2):
        mean = sum(randn(*wx.raw(model[i]).shape, seed=s + wx.raw(model[i]).numel()) * 2 for s in range(4)) / 4
        torch.testing.assert_close(wx.raw(averaged.module[i]).detach(), mean)
    for _ in range(4):
        wx.refresh(averaged)
    for i in (0, 2):
        torch.testing.assert_close(sigma(averaged.module[i].weight), torch.ones(()).double(), rtol=1e-3, atol=1e-3)


def test_averaged_buffers_are_renormalised():
    """``use_buffers=True`` averages u and v, which are then no unit vectors: the weight would be too large."""
    model = net()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(3):
        unsettle(model, seed=step)
        averaged.update_parameters(model)
    averaged.eval()
    for i in (0, 2):
        layer = averaged.module[i]
        unit_state = tuple(x / x.norm() for x in state_of(layer))
        torch.testing.assert_close(layer.weight, normalized(wx.raw(layer), unit_state))


# swap_tensors


def test_swap_module_params_on_conversion():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = linear()
        x = randn(2, 6)
        layer(x)
        raw = wx.raw(layer)
        layer.float()
        assert wx.raw(layer) is raw and raw.dtype == torch.float32
        layer.double()
        before = state_of(layer)
        layer.load_state_dict(linear(seed=4).state_dict())
        assert wx.raw(layer) is raw and before is not None
        torch.testing.assert_close(layer.eval().weight, normalized(raw, state_of(layer)))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
