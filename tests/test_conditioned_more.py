"""wx.Conditioned under use that is not tidy: odd gradients, checkpoints, threads, odd models."""

from __future__ import annotations

import copy
import threading
from fractions import Fraction
from typing import Any

import pytest
import torch
from conditioned_small import ANGLES, F64, X, cnn, learning, plain, turned
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import weightxform as wx


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_not_served_from_what_is_kept(grad: bool) -> None:
    net, other, one = wx.Conditioned(cnn(), wx.Rotate()), cnn(), torch.ones((), dtype=F64)
    net(X, 0.5)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        got = forward_ad.unpack_dual(net(X, forward_ad.make_dual(0.5 * one, one))).tangent
    near = [plain(other, X, 0.5 + h) for h in (-1e-6, 1e-6)]
    torch.testing.assert_close(got, (near[1] - near[0]) / 2e-6, rtol=1e-7, atol=1e-7)


def test_an_expanded_condition_that_takes_gradients_is_one_for_each_sample() -> None:
    net, each = wx.Conditioned(cnn(), wx.Rotate()), torch.full((4,), 0.3, dtype=F64, requires_grad=True)
    plain(cnn(), X, each).square().sum().backward()
    leaf = torch.tensor([0.3], dtype=F64).expand(4).requires_grad_()
    net(X, leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, each.grad)
    one = torch.tensor([0.3], dtype=F64, requires_grad=True)
    among = one.expand(4)
    among.retain_grad()
    net(X, among).square().sum().backward()
    torch.testing.assert_close(among.grad, each.grad)
    torch.testing.assert_close(one.grad, each.grad.sum()[None])


def test_second_derivatives() -> None:
    x, a = X[:2, :, :5, :5].clone().requires_grad_(), ANGLES[:2].clone().requires_grad_()
    for form in ("loop", "grouped", "activation"):
        net = wx.Conditioned(cnn(), wx.Rotate(), form=form)
        assert torch.autograd.gradgradcheck(lambda x, a, net=net: net(x, a), (x, a))


def test_the_output_may_be_written_into() -> None:
    net = learning()
    net(X, 0.5).add_(1).view(-1).mul_(2).sum().backward()
    assert all(p.grad is not None for p in net.transform_parameters())


class Checkpointed(nn.Module):
    """Its output in a dict, or for ``hide`` in an object of which torch knows nothing."""

    def __init__(self, checkpoints: bool, reentrant: bool, hide: bool = False) -> None:
        super().__init__()
        self.cnn, self.checkpoints, self.reentrant, self.hide = cnn(), checkpoints, reentrant, hide

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(self.cnn, x, use_reentrant=self.reentrant) if self.checkpoints else self.cnn(x)
        return (lambda: y) if self.hide else {"y": y}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_around_the_call_and_inside_with_several_pending(reentrant: bool, inside: bool) -> None:
    grads = []
    for around in (False, True):
        net = learning(Checkpointed(inside and around, reentrant))
        x, a = X.clone().requires_grad_(), ANGLES.clone().requires_grad_()

        def call(c: Tensor, net: nn.Module = net, x: Tensor = x, around: bool = around) -> Tensor:
            run = lambda x, c: net(x, c)["y"]  # noqa: E731
            return checkpoint(run, x, c, use_reentrant=reentrant) if around else run(x, c)

        loss = call(a).square().sum() + 2 * call(ANGLES.flip(0)).sum() + call(torch.tensor(0.3, dtype=F64)).sin().sum()
        loss.backward()
        grads.append([a.grad, x.grad, *(p.grad for p in net.transform_parameters())])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_checkpoint_whose_condition_cannot_be_known() -> None:
    net, x = learning(Checkpointed(True, False, hide=True)), X.clone().requires_grad_()
    y = net(x, 0.3)()
    net(x, 0.9)
    with pytest.raises(RuntimeError, match=r"its condition is not known.*inside `with net\.at"):
        y.sum().backward()
    x.grad = None
    with net.at(0.3):
        net.model(x)().sum().backward()
    other = X.clone().requires_grad_()
    learning()(other, 0.3).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_inside_at_the_condition_stays() -> None:
    net = learning()
    pending = net(X, 0.9)
    with net.at(0.3):
        weight = net.model[0].weight.clone()
        net(X, 0.7)
        torch.testing.assert_close(net.model[0].weight, weight, rtol=0, atol=0)
        pending.sum().backward()
        torch.testing.assert_close(net.model[0].weight, weight, rtol=0, atol=0)


def test_threads() -> None:
    net, wrong = wx.Conditioned(cnn(), wx.Rotate()), []
    expected = [plain(cnn(), X, 0.1 * i) for i in range(4)]

    def run(i: int) -> None:
        for _ in range(20):
            wrong.extend([i] if not torch.allclose(net(X, 0.1 * i), expected[i]) else [])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# conditions and models


def test_an_empty_batch() -> None:
    net, angles = wx.Conditioned(cnn(), wx.Rotate()), ANGLES[:0].clone().requires_grad_()
    y = net(X[:0], angles)
    y.sum().backward()
    assert y.shape == (0, 2, 5, 5) and angles.grad is not None and angles.grad.shape == (0,)


def test_numbers_that_are_no_floats() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    for c in (1, Fraction(1, 2)):  # as NumPy's scalars, registered with `numbers`
        torch.testing.assert_close(net(X, c), plain(cnn(), X, float(c)))


def test_the_meta_device() -> None:
    net = wx.Conditioned(cnn().to("meta"), wx.Rotate())
    for c in (0.5, torch.empty(4, device="meta", dtype=F64)):
        assert net(X.to("meta"), c).shape == (4, 2, 5, 5)


def test_the_dtype_of_the_condition_is_that_of_the_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.cnn = nn.Parameter(torch.ones(1)), cnn()

        def forward(self, images: dict[str, Tensor]) -> Tensor:
            return self.cnn(images["x"]) * self.scale

    torch.testing.assert_close(
        wx.Conditioned(Mixed(), wx.Rotate())({"x": X}, ANGLES / 3), plain(cnn(), X, ANGLES / 3), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", ["loop", "grouped", "activation"])
def test_autocast_gives_one_dtype_in_all_forms(form: str) -> None:
    net = wx.Conditioned(cnn().float(), wx.Rotate(), form=form)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(X.float(), ANGLES).dtype == torch.bfloat16
    net = wx.Conditioned(cnn(), wx.Rotate(), form=form)  # which it leaves at float64
    expected = net(X, ANGLES)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(X, ANGLES), expected)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("form", ["auto", "loop", "grouped", "activation"])
def test_a_layer_that_overrides_what_its_forward_calls(form: str) -> None:
    layer = Standardized(1, 2, 3).double()
    net = wx.Conditioned(nn.Sequential(copy.deepcopy(layer)), wx.Rotate(), form=form)
    torch.testing.assert_close(net(X, ANGLES), plain(layer, X, ANGLES))


def test_a_layer_with_more_arguments_and_results() -> None:
    class Partial(nn.Conv2d):
        def forward(self, x: Tensor, mask: Tensor, gain: float) -> tuple[Tensor, Tensor]:
            return gain * super().forward(x * mask), mask.sum((1, 2, 3))

    layer, mask = Partial(1, 2, 3).double(), torch.rand_like(X)
    net = wx.Conditioned(nn.ModuleList([copy.deepcopy(layer)]), wx.Rotate())
    for angles in (ANGLES, ANGLES[[1, 0, 1, 1]]):
        with net.at(angles, batch=4):
            y, total = net.model[0](X, mask, gain=2.0)
        bent = [turned(layer.weight, a) for a in angles]
        expected = [2 * F.conv2d((X * mask)[k : k + 1], w, layer.bias) for k, w in enumerate(bent)]
        torch.testing.assert_close(y, torch.cat(expected))
        torch.testing.assert_close(total, mask.sum((1, 2, 3)))


def test_one_inside_another() -> None:
    inner = learning()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Conv2d(2, 1, 3).double()

        def forward(self, x: Tensor, angle: Any = 0.5) -> Tensor:
            return self.last(self.inner(x, angle))

    outer = learning(Outer(), layers=["last"])
    assert not {id(p) for p in inner.transform_parameters()} & {id(p) for p in outer.transform_parameters()}
    torch.testing.assert_close(outer.bake(0.3)(X), outer(X, 0.3))
    before = inner(X, 0.2)
    outer.unwrap()
    torch.testing.assert_close(inner(X, 0.2), before)


def test_a_transform_on_top_is_refused() -> None:
    net = wx.Conditioned(cnn(), wx.Rotate())
    with net.at(0.5):
        net.model[0].weight = wx.ComputedParameter(net.model[0].weight, nn.Identity())
    for call in (lambda: net(X, 0.5), lambda: net.bake(0.5)):
        with pytest.raises(RuntimeError, match=r"another transform was put on 0\.weight"):
            call()
    torch.testing.assert_close(net.unwrap()(X), cnn()(X))


def test_modes_and_requires_grad_are_those_of_before() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()

    partly = model()
    partly[2].eval()
    wx.Conditioned(partly, wx.Rotate(), freeze=False)
    assert [m.training for m in partly] == [True, True, False]
    net = wx.Conditioned(model(), wx.Rotate())
    assert [m.training for m in net.model] == [True, False, True]
    net.model.add_module("head", nn.Linear(2, 2))
    for copied in (net.bake(0.3), net.unwrap()):
        assert copied[1].training and all(p.requires_grad for p in copied.parameters())
