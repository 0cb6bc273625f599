"""State dicts, checkpoints, averages and conversion of modules with computed weights."""

from __future__ import annotations

import pytest
import torch
from computed_oracle import (
    Recorder,
    iterations,
    linear,
    net,
    normalized,
    randn,
    sigma,
    state_of,
    through_torch_save,
    unsettle,
)
from torch import nn

import weightxform as wx

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


# checkpoints without what was trained


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0).double())
        self.register_buffer("offset", torch.tensor(1.0).double())

    def forward(self, raw):
        return raw * self.rate + self.offset


@pytest.mark.parametrize(
    ("make", "missing", "stays"),
    [
        (Gain, ["rate"], ["offset"]),
        (lambda: wx.SpectralNorm(learn_gain=True), ["gain"], ["u", "v"]),
        (lambda: nn.Sequential(wx.WeightNorm(), Gain()), ["1.rate"], ["0.g", "1.offset"]),
    ],
    ids=["plain", "gain", "sequential"],
)
def test_a_trained_parameter_of_a_transform_is_missed(make, missing, stays):
    """Nothing gives it back: a strict load must not pass with what happened to be there."""
    layer = nn.Linear(6, 4, dtype=torch.float64)
    plain = layer.state_dict()
    layer.weight = wx.ComputedParameter(layer.weight, make())
    keys = [f"weight_transform.{key}" for key in missing]
    with (
        pytest.warns(UserWarning, match=rf"weight_transform.{stays[0]}.*: (the state was estimated|it stays as it is)"),
        pytest.raises(RuntimeError, match=f'Missing key.*: "{keys[0]}". '),
    ):
        layer.load_state_dict(plain)
    assert set(keys) <= set(layer.load_state_dict(plain, strict=False).missing_keys)
    with pytest.warns(UserWarning, match=f"{stays[-1]}: "):
        layer.load_state_dict({**plain, **{key: layer.state_dict()[key] for key in keys}})


def test_the_norms_of_a_plain_checkpoint_are_estimated():
    layer, plain = nn.Linear(6, 4, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
    layer.weight = wx.ComputedParameter(layer.weight, wx.WeightNorm())
    with pytest.warns(UserWarning, match="weight_transform.g: the state was estimated from the weight"):
        layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer.weight, plain.weight)
