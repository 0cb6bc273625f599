"""``wx.constrain``: the weights of a model computed together are the weights computed alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from computed_oracle import Recorder, iterated, iterations, normalized, randn, set_raw, state_of, unsettle
from torch import Tensor, nn

import weightxform as wx


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2), nn.Flatten(),
        nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5),
    ).to(dtype)  # fmt: skip


LAYERS = (0, 2, 4, 6)


def pair(dtype: torch.dtype = torch.float64, **options: object) -> tuple[nn.Sequential, nn.Sequential]:
    """The same model with its weights computed together, and one by one."""
    together, alone = net(dtype), net(dtype)
    wx.constrain(together, wx.SpectralNorm, **options)
    for i in LAYERS:
        alone[i].weight = wx.ComputedParameter(alone[i].weight, wx.SpectralNorm())
    return unsettle(together), unsettle(alone)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """The ``advance`` flags of each call that computes several weights."""
    seen: list[list[bool]] = []
    original = wx.SpectralNorm.compute_group.__func__

    def compute_group(cls, transforms, raws, advance):
        seen.append(list(advance))
        return original(cls, transforms, raws, advance)

    repeated = wx.SpectralNorm.repeat_group.__func__

    def repeat_group(cls, transforms, raws, advance, accumulates):
        again = repeated(cls, transforms, raws, advance, accumulates)

        def counted(stamps):
            seen.append(list(advance))
            return again(stamps)

        return counted if again is not None and len(raws) > 1 else again

    monkeypatch.setattr(wx.SpectralNorm, "compute_group", classmethod(compute_group))
    monkeypatch.setattr(wx.SpectralNorm, "repeat_group", classmethod(repeat_group))
    return seen


def same(a: nn.Sequential, b: nn.Sequential, rtol: float | None = None, atol: float | None = None) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=atol)
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    for i in LAYERS:
        torch.testing.assert_close(state_of(a[i]), state_of(b[i]), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training_together_is_training_alone(dtype, calls):
    together, alone = pair(dtype)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (together, alone)]
    for step in range(4):
        x, g = randn(3, 3, 6, seed=step, dtype=dtype), randn(3, 5, seed=9 + step, dtype=dtype)
        outs = []
        for m, optimizer in zip((together, alone), optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(m(x))
            outs[-1].backward(g)
        torch.testing.assert_close(*outs)
        for optimizer in optimizers:
            optimizer.step()
        same(together, alone)
    assert calls == [[True] * 4] * 4, "one call a step"
    together.eval(), alone.eval()
    torch.testing.assert_close(together(x), alone(x))
    assert calls[4:] == [[False] * 4]


def test_many_forwards_and_backwards_through_one_computation(calls):
    together, alone = pair()
    for i in range(3):
        x, g = randn(2, 3, 6, seed=i), randn(2, 5, seed=10 + i)
        for m in (together, alone):
            (m(x) + m(2 * x)).backward(g)
    same(together, alone)
    assert len(calls) == 1


def test_one_member_read_of_several():
    model, _ = pair()
    before = [state_of(model[i]) for i in LAYERS]
    w = wx.raw(model[4]).detach().clone().requires_grad_()
    g = randn(6, 10, seed=3)
    model[4].weight.backward(g)
    normalized(w, iterated(w, before[2])).backward(g)
    torch.testing.assert_close(wx.raw(model[4]).grad, w.grad)
    assert all(wx.raw(model[i]).grad is None for i in (0, 2, 6))


def test_a_write_to_one_member_computes_that_one_only(calls):
    model, _ = pair()
    kept = [model[i].weight for i in LAYERS]
    states = [state_of(model[i]) for i in LAYERS]
    old = wx.raw(model[4]).detach().clone()
    set_raw(model[4], randn(6, 10, seed=5))
    weights = [model[i].weight for i in LAYERS]
    assert [a is b for a, b in zip(kept, weights, strict=True)] == [True, True, False, True]
    assert [len(c) for c in calls] == [4]
    for i, dim, before in zip(LAYERS, (0, 1, 0, 0), states, strict=True):
        assert iterations(before, state_of(model[i]), wx.raw(model[i]), dim) == int(i == 4)
    torch.testing.assert_close(kept[2].detach(), normalized(old, states[2]))
    with pytest.raises(RuntimeError, match="written between"):
        kept[2].backward(randn(6, 10))
    kept[0].backward(g := randn(4, 3, 3))  # of the same call: its own raw tensor was not written
    assert g.shape == wx.raw(model[0]).grad.shape


def test_a_member_is_stale_for_its_own_reasons(calls):
    model, _ = pair()
    model(randn(1, 3, 6))
    set_raw(model[0], randn(4, 3, 3, seed=1))
    set_raw(model[6], randn(5, 6, seed=2))
    model[4].weight_transform.u.copy_(-model[4].weight_transform.u)
    model(randn(1, 3, 6))
    assert calls[1:] == [[True, False, True]], "two raw tensors and one state were written"


def test_groups_do_not_mix_modes_dtypes_or_options(calls):
    model = net()
    wx.constrain(model, lambda m, name: wx.SpectralNorm(eps=1e-6 if name.startswith("6") else 1e-12))
    model[4].float()
    model[2].eval()
    for i in LAYERS:
        weight = model[i].weight
        dim = model[i].weight_transform.dim
        rtol = 1e-5 if i == 4 else 1e-9
        torch.testing.assert_close(weight, normalized(wx.raw(model[i]), state_of(model[i]), dim), rtol=rtol, atol=rtol)
    assert calls == []
    model[2].train()
    set_raw(model[0], randn(4, 3, 3))
    for i in LAYERS:
        _ = model[i].weight
    assert [len(c) for c in calls] == [2]


def test_buckets(calls):
    small, _ = pair(bucket_bytes=1)
    small(randn(1, 3, 6))
    assert calls == [], "one weight each"
    halves = net()
    halves[4], halves[6] = nn.Linear(10, 3).double(), nn.Linear(3, 5).double()
    halves.insert(5, nn.Linear(3, 3).double())
    size = sum(p.numel() * 8 for p in (halves[0].weight, halves[2].weight))
    wx.constrain(halves, wx.SpectralNorm, bucket_bytes=size)
    x, g = randn(1, 3, 6), randn(1, 5, seed=1)
    y = halves(x)
    assert [len(c) for c in calls] == [2, 3]
    order: list[int] = []
    for i in (0, 2, 4, 5, 7):
        wx.raw(halves[i]).register_post_accumulate_grad_hook(lambda p, i=i: order.append(i))
    y.backward(g)
    assert set(order[:3]) == {4, 5, 7} and set(order[3:]) == {0, 2}, "the last bucket has its gradients first"


def test_cache_false_computes_each_alone(calls):
    model = wx.constrain(net(), wx.SpectralNorm, cache=False)
    before = state_of(unsettle(model)[4])
    model(randn(1, 3, 6)), model(randn(1, 3, 6))
    assert iterations(before, state_of(model[4]), wx.raw(model[4])) == 2 and calls == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_groups_of_their_own(how: Callable, calls):
    model, _ = pair()
    model(randn(1, 3, 6))
    twin = how(how(model))
    for m in (model, twin):
        for i in LAYERS:
            set_raw(m[i], randn(*wx.raw(m[i]).shape, seed=40 + i))
    del calls[:]
    before = state_of(model[4])
    twin(randn(1, 3, 6))
    assert calls == [[True] * 4]
    assert iterations(before, state_of(model[4]), wx.raw(model[4])) == 0
    assert iterations(before, state_of(twin[4]), wx.raw(twin[4])) == 1
    model(randn(1, 3, 6))
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_copy_of_one_layer_does_not_take_the_others_along():
    model, _ = pair()
    layer = copy.deepcopy(model[4])
    assert len(pickle.dumps(model[4])) < 3 * len(pickle.dumps(net()[4]))
    torch.testing.assert_close(layer.eval().weight, model.eval()[4].weight)


def test_baked_members_leave_the_group(calls):
    model, _ = pair()
    wx.bake(model[2])
    x, g = randn(2, 3, 6), randn(2, 5, seed=1)
    model(x).backward(g)
    assert calls == [[True] * 3]
    wx.bake(model)
    assert [k for k, _ in model.named_parameters()] == list(net().state_dict()) == list(model.state_dict())
    assert all(type(model[i].weight) is nn.Parameter for i in LAYERS)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training(backend, calls):
    model, twin = pair(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, twin)]
    for step in range(3):
        x, g = randn(2, 3, 6, seed=step, dtype=torch.float32), randn(2, 5, seed=9 + step, dtype=torch.float32)
        for optimizer in optimizers:
            optimizer.zero_grad()
        y, expected = compiled(x), twin(x)
        torch.testing.assert_close(y, expected)
        y.backward(g), expected.backward(g)
        same(model, twin, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    # and back to eager
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    same(model, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_one_op_for_a_compiled_bucket(grad):
    model, _ = pair(torch.float32)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        names = [str(node.target) for g in graph.modules() for node in g.graph.nodes]
        targets.extend(n for n in names if "spectral_norm" in n)
        return graph.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, fullgraph=True, backend=backend)(randn(2, 3, 6, dtype=torch.float32))
    assert sum("fwd" in t for t in targets) == 1 and all("_list" in t for t in targets)


def test_functional_call_and_vmap_take_members_alone(calls):
    model, alone = pair()
    ws = randn(3, 6, 10, seed=8)
    before = [state_of(model[i]) for i in LAYERS]

    def f(m: nn.Module) -> Callable:
        return lambda w, x: torch.func.functional_call(m, {"4.weight": w}, (x,))

    x = randn(2, 3, 6)
    torch.testing.assert_close(torch.func.vmap(f(model), (0, None))(ws, x), torch.func.vmap(f(alone), (0, None))(ws, x))
    for i, state in zip(LAYERS, before, strict=True):
        assert iterations(state, state_of(model[i]), wx.raw(model[i]), int(i == 2)) == 0
    assert calls == []


# which weights


def test_patterns_name_layers_or_weights():
    def computed(**patterns: object) -> set[str]:
        model = nn.ModuleDict({"conv1": nn.Conv1d(2, 2, 1), "layer2": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
        wx.constrain(model, wx.SpectralNorm, **patterns)
        return {path for path, m in model.named_modules() if wx.is_computed(m)}

    everything = {"conv1", "layer2.0", "layer2.1"}
    assert computed() == computed(include=["*"]) == computed(include=["*.weight"]) == everything
    assert computed(include=["layer2.*"]) == computed(exclude=["conv1"]) == {"layer2.0", "layer2.1"}
    assert computed(include=["layer2.0.weight", "conv?"]) == {"conv1", "layer2.0"}
    assert computed(include=["layer2*"], exclude=["*.1"]) == {"layer2.0"}


def test_a_function_chooses():
    seen: list[str] = []

    def choose(module: nn.Module, name: str) -> nn.Module | None:
        seen.append(name)
        return wx.SpectralNorm(bound=2.0) if isinstance(module, nn.Linear) else None

    model = wx.constrain(net(), choose)
    assert seen == ["0.weight", "2.weight", "4.weight", "6.weight"]
    assert [wx.is_computed(model[i]) for i in LAYERS] == [False, False, True, True]
    assert model[4].weight_transform.bound == 2.0


def test_transforms_that_cannot_be_grouped_are_computed_alone():
    model = wx.constrain(net(), Recorder)
    model(randn(1, 3, 6)), model(randn(1, 3, 6))
    assert all(model[i].weight_transform.calls == [True] for i in LAYERS)


def test_a_single_layer_is_a_model():
    layer = wx.constrain(nn.Linear(3, 3), wx.SpectralNorm)
    assert wx.is_computed(layer) and "weight_transform" in dict(layer.named_modules())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((wx.SpectralNorm, nn.Linear(2, 2)), {}, TypeError, "model must be an nn.Module, got the class SpectralNorm"),
        ((None, wx.SpectralNorm()), {}, TypeError, "instance of SpectralNorm"),
        ((None, nn.Linear(2, 2)), {}, TypeError, "instance of Linear"),
        ((None, dict), {}, TypeError, "the class dict"),
        ((None, None), {}, TypeError, "NoneType"),
        ((None, lambda m, n: None), {"eps": 1.0}, TypeError, "eps"),
        ((None, lambda m, n: "sn"), {}, TypeError, "str"),
        ((None, lambda m, n: None), {}, ValueError, "got none"),
        ((None, wx.SpectralNorm, "conv1"), {}, TypeError, "include must be a list"),
        ((None, wx.SpectralNorm, ["nowhere"]), {}, ValueError, "include pattern 'nowhere' matches no weight"),
        ((None, wx.SpectralNorm, None, ["nowhere"]), {}, ValueError, "exclude pattern 'nowhere' matches no weight"),
        ((None, wx.SpectralNorm), {"bucket_bytes": 0}, ValueError, "bucket_bytes"),
        ((None, wx.SpectralNorm), {"bucket_bytes": 1.5}, TypeError, "bucket_bytes"),
        ((None, wx.SpectralNorm), {"eps": -1.0}, ValueError, "eps"),
        ((None, wx.SpectralNorm), {"no_such_option": 1}, TypeError, "no_such_option"),
        ((None, wx.SpectralNorm), {"dim": 2}, IndexError, "dim"),
    ],
)
def test_mistakes_raise_and_change_nothing(arguments, options, error, match):
    model = net()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        wx.constrain(*((model, *arguments[1:]) if arguments[0] is None else arguments), **options)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert not model._forward_pre_hooks


def test_two_groups_cannot_claim_one_weight():
    model = net()
    wx.constrain(model, wx.SpectralNorm, include=["4"])
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"4\.weight is computed already"):
        wx.constrain(model, wx.SpectralNorm)
    assert list(model.state_dict()) == keys
    shared = wx.SpectralNorm()
    with pytest.raises(ValueError, match="one of its own"):
        wx.constrain(model, lambda m, n: shared, exclude=["4"])
    assert list(model.state_dict()) == keys
    wx.constrain(model, wx.SpectralNorm, exclude=["4"])
    assert all(wx.is_computed(model[i]) for i in LAYERS)


def test_layers_that_cannot_be_computed_stop_the_call_before_it_changes_anything():
    for odd, match in ((nn.LazyLinear(3), "lazy"), (nn.Embedding(3, 2, max_norm=1.0), "max_norm")):
        model = nn.ModuleList([nn.Linear(3, 3), odd])
        with pytest.raises(ValueError, match=match):
            wx.constrain(model, wx.SpectralNorm)
        assert not wx.is_computed(model[0]) and "weight_transform" not in model[0]._modules


def test_dtypes_and_devices_of_one_group(calls):
    """One call for each dtype and device, at every step."""

    def mixed() -> nn.ModuleList:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 5, dtype=dtype) for dtype in (torch.float32, torch.float64) for _ in range(2)]
        return nn.ModuleList([*layers, nn.Linear(6, 5, device="meta"), nn.Linear(6, 5, device="meta")])

    together, alone = wx.constrain(mixed(), wx.SpectralNorm), mixed()
    for layer in alone:
        layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    unsettle(together[:4]), unsettle(alone[:4])
    alone.load_state_dict(together.state_dict(), strict=False)
    for step in range(3):
        for layers in (together, alone):
            for i, layer in enumerate(layers):
                raw = wx.raw(layer)
                g = torch.randn(5, 6, generator=torch.Generator().manual_seed(9 * step + i)).to(raw)
                layer.weight.backward(g)
                with torch.no_grad():
                    raw -= 0.1 * raw.grad
                raw.grad = None
    assert calls == [[True, True]] * 9
    assert together[5].weight.is_meta
    for a, b in zip(together[:4], alone[:4], strict=True):
        torch.testing.assert_close(wx.raw(a), wx.raw(b))
        torch.testing.assert_close(state_of(a), state_of(b))
