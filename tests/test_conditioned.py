"""wx.Conditioned: what its numbers and gradients are, against plain torch.func.functional_call with grid_sample."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import weightxform as wx


class Digits(nn.Module):
    """Two convolutions, the second grouped and strided, batch normalization, and a Linear on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 5)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.point(torch.relu(self.second(x))), 2)
        return self.fc(self.drop(torch.flatten(x, 1)))


def turned(weight: Tensor, angle: Tensor) -> Tensor:
    """[O, I, k, k], by grid_sample."""
    zero = torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = F.affine_grid(theta[None], [1, 1, *weight.shape[2:]], align_corners=True)
    flat = weight.reshape(1, -1, *weight.shape[2:])
    return F.grid_sample(flat, grid, align_corners=True).reshape(weight.shape)


def plain(model: nn.Module, x: Tensor, angles: Tensor) -> Tensor:
    """``model`` with its kernels turned, one sample after the other."""
    weights = dict(model.named_parameters())
    outs = []
    for k, angle in enumerate(angles):
        bent = dict(weights)
        for name in ("first.weight", "second.weight"):
            bent[name] = turned(weights[name], angle)
        bent["fc.weight"] = turned(weights["fc.weight"].reshape(5, 4, 3, 3), angle).reshape(5, 36)
        outs.append(torch.func.functional_call(model, bent, (x[k : k + 1],)))
    return torch.cat(outs)


@pytest.fixture
def digits() -> nn.Module:
    torch.manual_seed(0)
    model = Digits().double()
    model(torch.randn(16, 1, 17, 17, dtype=torch.float64))  # statistics
    return model.eval()


def inputs(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 17, 17, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64) * 6 - 3


def conditioned(model: nn.Module, **options: Any) -> wx.Conditioned:
    return wx.Conditioned(copy.deepcopy(model), wx.Rotate(), sample=inputs(2)[0], **options)


def test_the_flattened_linear_is_found_and_one_tap_is_left_alone(digits: nn.Module) -> None:
    assert conditioned(digits).names == ("first", "second", "fc")


@pytest.mark.parametrize("form", ["auto", "loop", "grouped", "activation"])
def test_each_sample_its_own_angle(digits: nn.Module, form: str) -> None:
    x, angles = inputs()
    net = conditioned(digits, form=form)
    ours, theirs = (a.clone().requires_grad_() for a in (angles, angles))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = net(xs[0], ours), plain(digits, xs[1], theirs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("form", ["auto", "loop", "grouped", "activation"])
def test_equal_angles_are_computed_once(digits: nn.Module, form: str) -> None:
    x, angles = inputs()
    net = conditioned(digits, form=form)
    repeated = angles[[2, 0, 2, 2, 0, 1]]
    torch.testing.assert_close(net(x, repeated), plain(digits, x, repeated))
    with net.at(repeated, batch=6):
        assert net.model.first.weight.shape == (3, 6, 1, 5, 5)
    torch.testing.assert_close(net(x, repeated[:1].expand(6)), plain(digits, x, repeated[:1].expand(6)))
    net.deduplicate = False
    torch.testing.assert_close(net(x, repeated), plain(digits, x, repeated))


@pytest.mark.parametrize("angle", [0.7, torch.tensor(0.7, dtype=torch.float64), {"angle": 0.7}, torch.tensor([0.7])])
def test_one_angle_for_the_batch(digits: nn.Module, angle: Any) -> None:
    x, _ = inputs()
    net = conditioned(digits)
    expected = plain(digits, x, torch.full((6,), 0.7, dtype=torch.float64))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if isinstance(angle, Tensor) and angle.dtype == torch.float32 else {}
    torch.testing.assert_close(net(x, angle), expected, **tolerance)
    assert net.model.first.weight.shape == digits.first.weight.shape


def test_one_condition_is_one_plain_convolution(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                calls.append(args[8])
            return func(*args, **(kwargs or {}))

    with Count():
        net(x, angles[:1].expand(6))
    assert calls == [1, 2, 1]  # the layers' own groups


def test_gradients_of_a_base_that_is_not_frozen(digits: nn.Module) -> None:
    x, angles = inputs()
    net = conditioned(digits, freeze=False)
    other = copy.deepcopy(digits)
    y, expected = net(x, angles), plain(other, x, angles)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for (name, p), q in zip(net.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_frozen_base_gets_no_gradient_and_keeps_its_statistics(digits: nn.Module) -> None:
    x, angles = inputs()
    net = wx.Conditioned(copy.deepcopy(digits), wx.Rotate() + wx.LearnedResidual(), sample=x).train()
    net(x, angles).sum().backward()
    assert all(p.grad is None for p in digits.parameters())
    ours = list(net.transform_parameters())
    assert ours and any(bool(p.grad.any()) for p in ours if p.grad is not None)
    assert {id(p) for p in net.parameters() if p.grad is not None} <= set(map(id, ours))
    torch.testing.assert_close(net.model.norm.running_mean, digits.norm.running_mean, rtol=0, atol=0)
    assert net.model.drop.training and not net.model.norm.training


def test_training_moves_what_a_residual_can_learn(digits: nn.Module) -> None:
    """The residual learns that filters should be mirrored, which no angle does."""
    torch.manual_seed(0)
    x, _ = inputs(4)
    net = wx.Conditioned(copy.deepcopy(digits), wx.LearnedResidual(harmonics=1), layers=["first"])
    target = nn.functional.conv2d(x, digits.first.weight.flip(-1), digits.first.bias).detach()
    optimizer = torch.optim.Adam(net.transform_parameters(), 0.05)

    def loss() -> Tensor:
        with net.at(0.3):
            return (net.model.first(x) - target).square().mean()

    before = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 0.01 * before


class Forum(nn.Module):
    """The question's own network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 9, bias=False)

    def forward(self, weights: Tensor, condition: Any) -> Tensor:
        param = condition["angle"] if isinstance(condition, Mapping) else condition
        rows = weights.reshape(-1, 9)
        return self.linear(torch.cat([rows, param.reshape(1, 1).expand(len(rows), 1)], 1)).reshape(weights.shape)


@pytest.mark.parametrize("named", [False, True])
def test_the_network_of_the_question(named: bool) -> None:
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    other, own = copy.deepcopy(cnn), Forum()
    net = wx.Conditioned(cnn, own)
    x, angles = torch.randn(4, 1, 9, 9), torch.rand(4)
    y = net(x, {"angle": angles} if named else angles)
    y.sum().backward()
    ours = own.linear.weight.grad.clone()
    own.zero_grad()
    expected = torch.cat(
        [
            torch.func.functional_call(
                other, {n: own(other.get_parameter(n), a) for n in ("0.weight", "2.weight")}, (x[k : k + 1],)
            )
            for k, a in enumerate(angles)
        ]
    )
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    torch.testing.assert_close(ours, own.linear.weight.grad)
    assert list(net.transform_parameters()) == [own.linear.weight]


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
@pytest.mark.parametrize("form", ["loop", "grouped"])
def test_every_kind_of_convolution(kind: str, form: str) -> None:
    torch.manual_seed(0)
    axes = int(kind[-2])
    layer = getattr(nn, kind)(4, 6, 3, stride=2, padding=1, dilation=1, groups=2).double()
    own = Scaled()
    net = wx.Conditioned(nn.Sequential(copy.deepcopy(layer)), own, form=form)
    x, c = torch.randn(3, 4, *[7] * axes, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = [
        torch.func.functional_call(layer, {"weight": own(layer.weight, a)}, (x[k : k + 1],)) for k, a in enumerate(c)
    ]
    torch.testing.assert_close(net(x, c), torch.cat(expected))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, weights: Tensor, condition: Tensor) -> Tensor:
        return weights * torch.exp(self.rate * condition)


def test_output_size_of_a_transposed_convolution_and_other_padding() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double()
    around = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dilation=1).double()
    x, c = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for form in ("loop", "grouped"):
        net = wx.Conditioned(nn.ModuleList([copy.deepcopy(up), copy.deepcopy(around)]), Scaled(), form=form)
        with net.at(c, batch=3):
            y, z = net.model[0](x, output_size=[16, 16]), net.model[1](x)
        own = net.transform
        for k, a in enumerate(c):
            one = F.conv_transpose2d(x[k : k + 1], own(up.weight, a), up.bias, 2, 1, 1)
            torch.testing.assert_close(y[k : k + 1], one)
            torch.testing.assert_close(
                z[k : k + 1], torch.func.functional_call(around, {"weight": own(around.weight, a)}, (x[k : k + 1],))
            )


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


def test_bake_and_unwrap(digits: nn.Module) -> None:
    x, _ = inputs()
    keys = list(digits.state_dict())
    net = wx.Conditioned(digits, wx.Rotate() + wx.LearnedResidual(), sample=x)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.1)
    plain_model = net.bake(0.8)
    assert type(plain_model) is Digits and type(plain_model.first) is nn.Conv2d
    assert list(plain_model.state_dict()) == keys
    assert all(p.requires_grad for p in plain_model.parameters())
    torch.testing.assert_close(plain_model(x), net(x, 0.8), rtol=0, atol=0)
    before = net(x, 0.0)
    with torch.no_grad():
        plain_model.first.weight.zero_()
    torch.testing.assert_close(net(x, 0.0), before, rtol=0, atol=0)
    model = net.unwrap()
    assert model is digits and type(model.first) is nn.Conv2d and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


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
        assert calls(angles, angles.clone(), angles) == 1
        expected = net(x, 0.2)
        with torch.no_grad():
            next(net.transform_parameters()).add_(1)
        assert calls(0.2) == 1
        assert not torch.equal(net(x, 0.2), expected)
        digits.first.weight  # noqa: B018
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


def test_tied_layers_share_one_map(digits: nn.Module) -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    net = wx.Conditioned(nn.Sequential(first, second), wx.Rotate() + wx.LearnedResidual())
    assert first.weight_transform is second.weight_transform
    y = net(torch.randn(2, 3, 6, 6), 0.3)
    assert y.shape == (2, 3, 6, 6) and first.weight is second.weight


def test_a_hook_and_a_subclass_of_a_layer(digits: nn.Module) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    layer = Doubled(1, 2, 3).double()
    x, angles = inputs(3)
    net = wx.Conditioned(nn.Sequential(copy.deepcopy(layer)), wx.Rotate())
    seen = []
    net.model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    y = net(x, angles)
    expected = [2 * F.conv2d(x[k : k + 1], turned(layer.weight, a), layer.bias) for k, a in enumerate(angles)]
    torch.testing.assert_close(y, torch.cat(expected))
    assert seen == [(3, 2, 15, 15)]
    assert type(pickle.loads(pickle.dumps(wx.Conditioned(nn.Sequential(nn.Conv2d(1, 2, 3)), wx.Rotate()))).model[0])
