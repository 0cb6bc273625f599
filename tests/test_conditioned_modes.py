"""wx.Conditioned under torch.compile, autocast, checkpointing and torch.func; copies, state, and what is kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conditioned_models import Digits, conditioned, digits, inputs, plain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import weightxform as wx

__all__ = ["digits"]  # a fixture


@pytest.mark.parametrize(("per_sample", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_compiled(digits: nn.Module, per_sample: bool, backend: str) -> None:
    x, angles = inputs()
    x, angles = x.float(), angles.float()
    net = wx.Conditioned(copy.deepcopy(digits).float(), wx.Rotate() + wx.LearnedResidual(), sample=x)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.1)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    condition = angles if per_sample else angles[0]
    grads = []
    for call in (net, compiled):
        net.zero_grad()
        y = call(x, condition)
        y.square().sum().backward()
        grads.append([y, *(p.grad for p in net.transform_parameters())])
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-4, atol=2e-5)


def test_autocast_gives_the_layer_its_dtype(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.float(), angles.float())
        with net.at(angles.float(), 6):
            assert net.model.first.weight.dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), plain(digits, x, angles), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(digits: nn.Module, remake: Any) -> None:
    x, angles = inputs()
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x)
    other = remake(net)
    torch.testing.assert_close(other(x, angles), net(x, angles), rtol=0, atol=0)
    first = next(other.transform_parameters())
    with torch.no_grad():
        first += 1
    assert not torch.equal(other(x, 0.5), net(x, 0.5))
    assert other.model.first.weight_transform.owner is other


def test_state_dict_is_stable_and_has_the_base_under_its_names(digits: nn.Module) -> None:
    x, angles = inputs()
    names = list(digits.state_dict())
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x)
    keys = set(net.state_dict())
    assert {f"model.{n}" for n in names} <= keys
    for mode in (True, False):
        net.train(mode)
        with torch.no_grad():
            net(x, angles)
        assert set(net.state_dict()) == keys
    fresh = wx.Conditioned(Digits().double(), wx.Rotate() + wx.LearnedResidual(), sample=x)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh.eval()(x, angles), net.eval()(x, angles))


def test_weights_are_kept_for_each_condition_where_no_gradient_is_wanted(digits: nn.Module) -> None:
    x, angles = inputs()
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x, cache_size=2).eval()
    own = net.model.first.weight_transform
    computed, compute = [], own._compute
    own.__dict__["_compute"] = lambda raw, given, dtype: computed.append(1) or compute(raw, given, dtype)

    def calls(*conditions: Any) -> int:
        computed.clear()
        for c in conditions:
            net(x, c)
        return len(computed)

    with torch.no_grad():
        assert calls(0.1, 0.2, 0.1, 0.2, torch.tensor(0.2, dtype=torch.float64)) == 2
        assert calls(0.3, 0.1, 0.2) == 3  # two are kept
        assert calls(angles, angles.clone()) == 2  # more at a time than are kept
        expected = net(x, 0.2)
        with torch.no_grad():
            next(net.transform_parameters()).add_(1)
        assert calls(0.2) == 1
        assert not torch.equal(net(x, 0.2), expected)
        wx.raw(digits.first).mul_(2)
        assert calls(0.2) == 1
    assert calls(0.2, 0.2) == 2  # a graph each


def test_repeated_backward_and_accumulation(digits: nn.Module) -> None:
    x, angles = inputs()
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.1)
    parts = [net(x[k : k + 2], angles[k : k + 2]).square().sum() for k in (0, 2, 4)]
    sum(parts).backward()
    together = [p.grad.clone() for p in net.transform_parameters()]
    net.zero_grad()
    for k in (4, 0, 2):
        net(x[k : k + 2], angles[k : k + 2]).square().sum().backward()
    torch.testing.assert_close(together, [p.grad for p in net.transform_parameters()])


class Checkpointed(Digits):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return F.max_pool2d(self.point(torch.relu(self.second(torch.relu(self.norm(self.first(x)))))), 2)

        x = checkpoint(body, x, use_reentrant=self.reentrant)
        return self.fc(torch.flatten(x, 1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_again_at_the_condition_of_its_forward(digits: nn.Module, reentrant: bool) -> None:
    x, angles = inputs()
    grads = []
    for cls in (Digits, Checkpointed):
        model = cls().double().eval()
        model.reentrant = reentrant
        model.load_state_dict(digits.state_dict())
        net = wx.Conditioned(model, wx.Rotate() + wx.LearnedResidual(), flattened={"fc": (4, 3, 3)})
        generator = torch.Generator().manual_seed(0)
        for p in net.transform_parameters():
            nn.init.normal_(p, std=0.1, generator=generator)
        xs = x.clone().requires_grad_()
        one, two = net(xs, angles), net(xs, 0.4)  # the second is the present condition when backward begins
        (one.square().sum() + two.sin().sum()).backward()
        grads.append([xs.grad, *(p.grad for p in net.transform_parameters())])
    torch.testing.assert_close(grads[0], grads[1])


def test_vmap_and_functional_call(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits)

    def one(sample: Tensor, angle: Tensor) -> Tensor:
        return net(sample[None], angle)[0]

    torch.testing.assert_close(torch.vmap(one)(x, angles), plain(digits, x, angles))
    ours = torch.func.grad(lambda a: net(x, a).square().sum())(angles)
    leaf = angles.clone().requires_grad_()
    plain(digits, x, leaf).square().sum().backward()
    torch.testing.assert_close(ours, leaf.grad)
    torch.testing.assert_close(
        torch.func.jacrev(lambda a: net(x, a).sum(1))(angles).diagonal(),
        torch.func.jvp(lambda a: net(x, a).sum(1), (angles,), (torch.ones_like(angles),))[1],
    )
    scaled = {name: 2 * p for name, p in net.named_parameters()}
    other = copy.deepcopy(digits)
    with torch.no_grad():
        for p in other.parameters():
            p *= 2
    torch.testing.assert_close(torch.func.functional_call(net, scaled, (x, angles)), plain(other, x, angles))


def test_a_parameter_that_the_user_gave_is_that_of_all_layers(digits: nn.Module) -> None:
    x, _ = inputs()
    angle = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    net = wx.Conditioned(copy.deepcopy(digits), wx.Rotate(angle=angle) + wx.Flip(-1), sample=x)
    net(x).square().sum().backward()
    assert list(net.transform_parameters()) == [angle]
    leaf = angle.detach().clone().requires_grad_()
    other = wx.Conditioned(digits, wx.Rotate() + wx.Flip(-1), sample=x)
    other(x, leaf).square().sum().backward()
    torch.testing.assert_close(angle.grad, leaf.grad)


def test_keywords_and_integers(digits: nn.Module) -> None:
    x, _ = inputs()
    net = conditioned(digits)
    expected = plain(digits, x, torch.tensor([1.0, 2, 3, 1, 2, 3], dtype=torch.float64))
    torch.testing.assert_close(net(x=x, condition=torch.tensor([1, 2, 3, 1, 2, 3])), expected)
    torch.testing.assert_close(net(x, condition={"angle": torch.tensor([1, 2, 3, 1, 2, 3])}), expected)


def test_bake_of_any_module_needs_one_condition(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits)
    with pytest.raises(RuntimeError, match="no condition yet"):
        wx.bake(net)
    with (
        net.at(angles, 6),
        pytest.raises(RuntimeError, match=r"each sample has its own: net.bake\(condition\)"),
    ):
        wx.bake(net)
    expected = net(x, 0.3)
    with net.at(0.3):
        assert wx.bake(net) is net and type(net.model.first) is nn.Conv2d
    torch.testing.assert_close(net.model(x), expected)
