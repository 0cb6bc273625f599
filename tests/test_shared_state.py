"""A group that shares a state (a Subspace) is computed again as a whole when that was written, and rightly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import weightxform as wx
from weightxform.subspace.function import Call

NAMES = [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The members of every computation."""
    calls: list[list[int]] = []
    forward = Call.forward

    def counting(call: Call, z: Tensor, tables: object, theta0: list[Tensor]) -> list[Tensor]:
        calls.append(sorted(call.members))
        return forward(call, z, tables, theta0)

    monkeypatch.setattr(Call, "forward", counting)
    yield calls


def make(**options: object) -> wx.Subspace:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    sub = wx.Subspace(net, 11, **options)
    with torch.no_grad():
        sub.coordinates.copy_(torch.linspace(-1, 1, 11))
    return sub


def weights(sub: wx.Subspace) -> list[Tensor]:
    return [getattr(sub.model[int(n[0])], n[2:]) for n in NAMES]


def fresh(sub: wx.Subspace) -> list[Tensor]:
    """The weights as a Subspace that was never read computes them."""
    other = make(redraw=sub.redraws)
    other.load_state_dict(sub.state_dict())
    return weights(other)


def same(sub: wx.Subspace) -> None:
    for name, a, b in zip(NAMES, weights(sub), fresh(sub), strict=True):
        assert torch.equal(a, b), name


ALL = [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_one_call_after_each_step(computed, options):
    sub = make()
    optimizer = torch.optim.Adam(sub.parameters(), lr=0.1, **options)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            sub(x).square().sum().backward()
        sub.eval()(x)
        sub.train()
        before = sub.coordinates.detach().clone()
        optimizer.step()
        assert not torch.equal(before, sub.coordinates)
    assert computed == [ALL] * 4
    same(sub)


def test_a_written_raw_is_computed_alone(computed):
    sub = make()
    weights(sub)
    with torch.no_grad():
        sub.model[2]._parameters["weight"].mul_(2)
    computed.clear()
    weights(sub)
    assert [len(c) for c in computed] == [1]
    same(sub)


def test_state_and_a_raw_written(computed):
    sub = make()
    for _ in range(2):
        weights(sub)
        with torch.no_grad():
            sub.coordinates.add_(1)
            sub.model[2]._parameters["weight"].mul_(2)
        computed.clear()
        weights(sub)
        assert computed == [ALL]
        same(sub)


def test_a_replaced_raw():
    sub = make()
    for value in (1.0, 2.0):
        weights(sub)
        sub.model[2].weight = nn.Parameter(torch.full((6, 7), value, dtype=torch.float64), requires_grad=False)
        with torch.no_grad():
            sub.coordinates.mul_(-1)
        same(sub)


def test_other_coordinates_for_one_call():
    sub = make()
    x, z = torch.randn(4, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    own = sub(x).detach()
    other = torch.func.functional_call(sub, {"coordinates": z}, (x,))
    assert not torch.allclose(own, other)
    assert torch.equal(sub(x), own)
    with torch.no_grad():
        sub.coordinates.copy_(z)
    assert torch.equal(sub(x), other)


def test_a_written_weight_raises_after_a_write_of_the_state():
    sub = make()
    weights(sub)
    with torch.no_grad():
        sub.model[0].weight.zero_()
        sub.coordinates.add_(1)
    with pytest.raises(RuntimeError, match="'weight' was written in place"):
        weights(sub)


def test_modes_and_the_state():
    sub = make()
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        expected = sub(x).detach().clone()
        with torch.inference_mode():
            assert torch.equal(sub(x), expected)
        with torch.no_grad():
            sub.coordinates.mul_(0.5)
        sub(x).square().sum().backward()
        same(sub)


def test_moved_to_another_dtype():
    sub = make()
    weights(sub)
    sub.float()
    with torch.no_grad():
        sub.coordinates.add_(1)
    assert all(w.dtype == torch.float32 for w in weights(sub))


def test_redrawn_after_each_step(computed):
    sub = make(redraw="step")
    optimizer = torch.optim.SGD(sub.parameters(), lr=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        sub(x).square().sum().backward()
        optimizer.step()
        same(sub)
    assert int(sub.step) == 3
