"""The model of a wx.Conditioned: what it keeps, what it is outside of a call, and odd ones."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from conditioned_small import ANGLES, F64, X, cnn, learning, plain
from torch import Tensor, nn

import weightxform as wx
from weightxform.conditioned.condition import Given
from weightxform.conditioned.forms import best


def watched(net: wx.Conditioned) -> list[weakref.ref]:
    """References to all that is computed for the first weight, from now on."""
    own = net.model[0].weight_transform  # type: ignore[index]
    computed, compute = [], own._compute

    def watch(*args: Any) -> Tensor:
        out = compute(*args)
        computed.append(weakref.ref(out))
        return out

    own.__dict__["_compute"] = watch
    return computed


def alive(computed: list[weakref.ref]) -> int:
    return sum(0 if w() is None else w().shape[0] if w().ndim == 5 else 1 for w in computed)


@pytest.mark.parametrize(("size", "kept"), [(8, 8), (7, 4), (3, 0), (0, 0)])
def test_no_more_conditions_are_kept_than_asked_for(size: int, kept: int) -> None:
    net = wx.Conditioned(cnn(), wx.Rotate(), cache_size=size)
    computed = watched(net)
    for k in range(6):
        net(X, ANGLES + k)
    last = ANGLES.count_nonzero().item() if kept == 0 else 0  # which the weight itself holds
    assert len(computed) == 6 and alive(computed) in (kept, kept + last)


def test_training_drops_what_evaluation_kept() -> None:
    net = learning()
    computed = watched(net)
    with torch.no_grad():
        for k in range(5):
            net(X, 0.1 * k)
    assert alive(computed) == 5
    net(X, 0.3).sum().backward()
    assert alive(computed) <= 1


def test_outside_of_a_call_there_is_no_condition() -> None:
    base = cnn()
    net = wx.Conditioned(base, wx.Rotate())
    net(X, 0.3)
    with pytest.raises(RuntimeError, match="no condition yet"):
        base(X)
    with net.at(0.4):
        torch.testing.assert_close(base(X), plain(cnn(), X, 0.4))
    with pytest.raises(RuntimeError, match="no condition yet"):
        base[0].weight  # noqa: B018


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("leave", [lambda net: net.unwrap(), lambda net: wx.bake(net)])
def test_what_was_left_cannot_be_called_any_more(leave: Any, deduplicate: bool) -> None:
    net = wx.Conditioned(cnn(), wx.Rotate(), deduplicate=deduplicate)
    with net.at(0.0):
        leave(net)
    with pytest.raises(RuntimeError, match=r"0\.weight does not follow the condition any more"):
        net(X, 0.3)
    torch.testing.assert_close(net.model(X), cnn()(X))


class Failing(wx.LearnedResidual):
    def create(self, weight: Tensor, module: nn.Module | None) -> None:
        if weight.shape[0] == 2:
            raise MemoryError
        super().create(weight, module)


def test_a_wrapper_that_fails_changes_nothing() -> None:
    base, names = cnn(), [*cnn().state_dict()]
    with pytest.raises(MemoryError):
        wx.Conditioned(base, Failing())
    assert [*base.state_dict()] == names and all(p.requires_grad for p in base.parameters())
    torch.testing.assert_close(base(X), cnn()(X))


class Knowing(nn.Module):
    """A transform that holds the model that it is for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gain = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        return self.gain * weight + angle


def test_a_transform_that_holds_the_model_does_not_train_it() -> None:
    base = cnn()
    transform = Knowing(base)
    net = wx.Conditioned(base, transform)
    assert [*net.transform_parameters()] == [transform.gain]
    net(X, 0.3).sum().backward()
    assert transform.gain.grad is not None
    assert [n for n, p in base.named_parameters() if p.requires_grad or p.grad is not None] == []


class Several(nn.Conv2d):
    """Returns more than the map."""

    extra: Any = (None, 3)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), *self.extra


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Several(1, 3, 3, dtype=F64)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


def test_a_layer_that_returns_what_is_no_tensor() -> None:
    torch.manual_seed(0)
    net = wx.Conditioned(Outer(), wx.Rotate())
    got = net(X, ANGLES)
    each = [net(X[k : k + 1], angle) for k, angle in enumerate(ANGLES)]
    torch.testing.assert_close(got[0], torch.cat([y[0] for y in each]))
    assert got[1:] == (None, 3)


def test_a_layer_that_returns_what_cannot_be_joined() -> None:
    net = wx.Conditioned(Outer(), wx.Rotate())
    net.model.conv.extra = (torch.tensor(1.0),)
    assert len(net(X, 0.3)) == 2
    with pytest.raises(RuntimeError, match=r"must return tensors \[B, \.\.\.\]"):
        net(X, ANGLES)


def test_tied_layers_that_are_not_alike() -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"0 and 1 share one weight.*\(2, 2\).*untie them"):
        wx.Conditioned(nn.Sequential(first, second), wx.Rotate())
    assert type(first) is nn.Conv2d and first.weight is second.weight


def test_a_copy_that_was_baked_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        baked = wx.Conditioned(cnn(), wx.Rotate()).bake(0.3)
    baked(X).sum().backward()
    assert baked[0].weight.grad is not None


class Dropping(wx.FilterTransform):
    """A transform of the user's own that is random in training mode."""

    def at(self, weight: Tensor, conditions: Any, dtype: Any = None) -> Tensor:
        return nn.functional.dropout(weight, 0.5, self.training)[None]


def test_a_random_transform_is_not_kept() -> None:
    net = wx.Conditioned(cnn(), Dropping())
    with torch.no_grad():
        net.train()
        assert not torch.equal(net(X, None), net(X, None))
        torch.testing.assert_close(net.eval()(X, None), cnn()(X))


def test_inductor_gets_no_groups_of_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of them, torch 2.13's fails at the backward, also for plain torch."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    given = Given({"angle": ANGLES}, 4, None, 4)
    forms = [best(nn.Conv2d(n, 2, 3), wx.Rotate(), torch.zeros(4, n, 7, 7), given) for n in (1, 2)]
    assert forms == ["activation", "grouped"]
