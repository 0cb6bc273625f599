"""A wrapped model is the model it was: structure, names, modes, buffers, ties, hooks; and when weights are computed."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from textwrap import dedent

import pytest
import torch
from subspace_models import EXACT, Calls, Conv, Zoo, computed, mlp, moved, thetas, values_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import weightxform as wx

P = wx.subspace


def tokens() -> torch.Tensor:
    return torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(1))


def image(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# it computes theta0 + P z


@pytest.mark.parametrize("structure", ["shared", "said", "per_tensor"])
@pytest.mark.parametrize("normalize", ["global", "per_tensor", "init"])
@pytest.mark.parametrize("projection", ["block_hadamard", P.OneHot(tile=64, signed=False), P.Sparse(nonzeros=2)])
def test_output_and_gradients_are_those_of_the_explicit_matrix(projection, normalize, structure):
    """Every kind of layer; gradients of z and scales go through the network as through plain weights."""
    if structure == "per_tensor" and normalize != "global":
        with pytest.raises(ValueError, match="normalize must be 'global' for structure='per_tensor'"):
            wx.Subspace(Zoo(), 23, projection, 3, normalize, structure=structure)
        return
    model = Zoo().double()
    theta0, plain = values_of(model), copy.deepcopy(model)
    sub = moved(wx.Subspace(model, 23, projection, 3, normalize, structure=structure))
    out = sub(tokens(), factor=2.0)
    g = {k: torch.randn_like(v) for k, v in out.items()}
    torch.autograd.backward(list(out.values()), list(g.values()))

    z = sub.coordinates.detach().clone().requires_grad_()
    scales = None if sub.scales is None else sub.scales.detach().clone().requires_grad_()
    weights = thetas(sub, theta0, z, scales)
    expected = functional_call(plain, weights, (tokens(),), {"factor": 2.0})
    torch.autograd.backward(list(expected.values()), list(g.values()))
    assert_close(computed(sub), {k: v.detach() for k, v in weights.items()}, **EXACT)
    assert_close(out, expected, **EXACT)
    assert_close(sub.coordinates.grad, z.grad, rtol=1e-9, atol=1e-9)
    if scales is not None:
        assert_close(sub.scales.grad, scales.grad, rtol=1e-9, atol=1e-9)


def test_number_of_coordinates_by_structure():
    model = mlp()  # 54, 9, 36, 4
    assert [p.shape for p in wx.Subspace(model, 12, structure="per_tensor").parameters() if p.requires_grad] == [
        (12 + 9 + 12 + 4,),
        (4,),
    ]
    assert len(wx.Subspace(mlp(), 12, structure="said").coordinates) == 12
    assert wx.Subspace(mlp(), 12).scales is None


def test_at_first_it_computes_what_the_model_did():
    for structure in P.module.STRUCTURES:
        model = Zoo().double()
        before = model(tokens())
        assert_close(wx.Subspace(model, 40, structure=structure)(tokens()), before, rtol=0, atol=0)


# the model stays what it was


def test_structure_and_names():
    model = Zoo()
    parameters = dict(model.named_parameters())
    keys, kinds = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    text = str(model)
    sub = wx.Subspace(model, 9)
    assert sub.model is model
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules() if not isinstance(m, P.module.ProjectedWeight)] == kinds
    assert isinstance(model.lstm, nn.LSTM) and isinstance(model.mixes, nn.ParameterList)
    assert set(sub.names) == set(parameters)
    assert text.splitlines()[0] == str(model).splitlines()[0]
    assert "9 of" in repr(sub) and "BlockHadamard" in repr(sub)


def test_modes_and_buffers():
    """BatchNorm counts, Dropout obeys; a change of mode computes nothing."""
    model = Conv().double()
    sub, plain = wx.Subspace(model, 10), copy.deepcopy(Conv().double())
    plain.load_state_dict(model.state_dict())
    for step in range(2):
        torch.manual_seed(step)
        y = sub.train()(image())
        torch.manual_seed(step)
        assert_close(y, plain.train()(image()), **EXACT)
    assert int(model.norm.num_batches_tracked) == 2
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), **EXACT)
    sub.eval()
    assert not any(m.training for m in (model, model.norm, model.drop, model.conv))
    assert_close(sub(image()), plain.eval()(image()), **EXACT)
    assert int(model.norm.num_batches_tracked) == 2


def test_tied_weights_stay_tied():
    model = Zoo()
    sub = moved(wx.Subspace(model, 9))
    assert sum(n.endswith(("embedding.weight", "head.weight")) for n in sub.names) == 1
    assert model.head.weight is model.embedding.weight
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    sub(tokens())
    baked = sub.bake()
    assert baked.head.weight is baked.embedding.weight
    with torch.no_grad():
        baked.embedding.weight.zero_()
    assert not baked.head.weight.any()


def test_a_module_used_twice_and_a_parameter_in_two_models():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    theta0, plain = values_of(model), copy.deepcopy(model)
    sub = moved(wx.Subspace(model, 7))
    x = torch.randn(2, 4, dtype=torch.float64)
    z = sub.coordinates.detach().clone().requires_grad_()
    y, expected = sub(x), functional_call(plain, thetas(sub, theta0, z), (x,))
    assert_close(y, expected, **EXACT)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    assert_close(sub.coordinates.grad, z.grad, **EXACT)
    assert len(sub.names) == 2 and type(sub.unwrap()[2]) is nn.Linear


def test_hooks_before_and_after():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda *a: seen.append("before"))
    model.register_forward_pre_hook(lambda *a: seen.append("pre"))
    sub = wx.Subspace(model, 5)
    model[2].register_full_backward_hook(lambda *a: seen.append("backward"))
    sub.register_forward_hook(lambda *a: seen.append("sub"))
    sub(torch.randn(2, 6)).sum().backward()
    assert seen == ["pre", "before", "sub", "backward"]
    seen.clear()
    sub.unwrap()(torch.randn(2, 6).requires_grad_()).sum().backward()
    assert seen == ["pre", "before", "backward"]


def test_any_signature():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, input_ids=None, *more, attention_mask=None, **kwargs):
            return self.layer(input_ids), len(more), attention_mask, kwargs

    sub = wx.Subspace(Model(), 2)
    x = torch.randn(1, 3)
    y, more, mask, rest = sub(input_ids=x, attention_mask="m", labels=1)
    assert (more, mask, rest) == (0, "m", {"labels": 1}) and y.shape == (1, 3)
    assert sub(x, 1, 2)[1] == 2


# when weights are computed


def test_once_for_each_change_of_z(monkeypatch):
    """Micro-batches, evaluation, no_grad and changes of mode pay nothing; a step does."""
    calls = Calls(monkeypatch)
    sub = wx.Subspace(Conv().double(), 11)
    n = len(sub.names)
    optimizer = torch.optim.SGD(sub.parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            sub.train()(image()).sum().backward()
        with torch.no_grad():
            sub.eval()(image())
        assert calls.forwards == n * step
        optimizer.step()
        optimizer.zero_grad()
    assert calls.forward_calls == 3  # all weights of one bucket in one call
    assert calls.backwards == 3 * 3 * n


def test_buckets(monkeypatch):
    calls = Calls(monkeypatch)
    sub = wx.Subspace(mlp(), 11, bucket_bytes=40)
    sub(torch.randn(2, 6)).sum().backward()
    assert calls.forward_calls == 3 and calls.forwards == 4  # 216; 36 + 144; 16 bytes
    assert calls.backward_calls == 3 and calls.backwards == 4


def test_eval_before_train_keeps_the_gradient():
    """A weight computed under no_grad must not serve a forward that needs gradients."""
    sub = moved(wx.Subspace(mlp(), 5))
    x = torch.randn(2, 6)
    with torch.no_grad():
        first = sub(x)
    with torch.inference_mode():
        sub(x)
    y = sub(x)
    y.sum().backward()
    assert torch.equal(first, y) and sub.coordinates.grad.abs().sum() > 0


@pytest.mark.parametrize("write", ["copy", "data", "vector", "load", "optimizer", "theta0", "scales", "scales_data"])
def test_writes_are_seen(write):
    sub = moved(wx.Subspace(mlp().double(), 5, structure="said"))
    x = torch.randn(2, 6, dtype=torch.float64)
    sub(x)
    with torch.no_grad():
        if write == "copy":
            sub.coordinates.copy_(torch.ones(5))
        elif write == "data":
            sub.coordinates.data = torch.ones(5, dtype=torch.float64)
        elif write == "vector":  # of the forum question
            nn.utils.vector_to_parameters(torch.arange(9.0).double(), [sub.coordinates, sub.scales])
        elif write == "scales_data":
            sub.scales.data = torch.arange(4.0, dtype=torch.float64)
        elif write == "load":
            sub.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in sub.state_dict().items()})
        elif write == "optimizer":
            sub.coordinates.grad = torch.ones_like(sub.coordinates)
            torch.optim.Adam([sub.coordinates], 0.1).step()
        elif write == "theta0":
            wx.raw(sub.model[0]).add_(1)
        else:
            sub.scales.mul_(2)
    expected = thetas(sub, values_of(sub.model), sub.coordinates, sub.scales)
    assert_close(computed(sub), {k: v.detach() for k, v in expected.items()}, **EXACT)


def test_reset():
    sub = moved(wx.Subspace(mlp(), 5, structure="said"))
    theta0 = values_of(sub.model)
    sub(torch.randn(2, 6))
    sub.reset()
    assert not sub.coordinates.any() and (sub.scales == 1).all()
    assert_close(computed(sub), theta0, rtol=0, atol=0)


# what is trained, and memory


def test_only_coordinates_are_trained():
    model = Conv()
    model.conv.bias.requires_grad_(False)
    sub = wx.Subspace(model, 10, extra_trainable=["norm*"])
    assert "conv.bias" not in sub.names
    asks = {n for n, p in sub.named_parameters() if p.requires_grad}
    assert asks == {"coordinates", "model.norm.weight", "model.norm.bias"}
    sub(image().float()).sum().backward()
    assert {n for n, p in sub.named_parameters() if p.grad is not None} == asks
    optimizer = torch.optim.Adam(sub.parameters())
    optimizer.step()
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * (10 + 4 + 4)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": ["conv.*"]}, {"conv.weight", "conv.bias"}),
        ({"include": ["conv"]}, {"conv.weight", "conv.bias"}),
        ({"include": ["*.weight"], "exclude": ["norm"]}, {"conv.weight", "head.weight"}),
        ({"exclude": ["*.bias"]}, {"conv.weight", "norm.weight", "head.weight"}),
        ({"extra_trainable": ["norm*"]}, {"conv.weight", "conv.bias", "head.weight", "head.bias"}),
        ({"exclude": ["head", "norm"], "extra_trainable": ["head.bias"]}, {"conv.weight", "conv.bias"}),
    ],
)
def test_choice(options, names):
    model = Conv()
    sub = wx.Subspace(model, 5, **options)
    assert set(sub.names) == names
    left = {n for n, _ in model.named_parameters()} - names
    for n, p in model.named_parameters():
        module = model.get_submodule(n.rpartition(".")[0])
        assert wx.is_computed(module, n.rpartition(".")[2]) == (n in names)
        assert p.requires_grad == (n in left and n in sub.extra_names)


def test_memory_is_the_weights_and_their_gradients():
    """No D-vector and no P: the most that a fresh process ever holds over a forward and a backward."""
    code = """
        import torch, weightxform as wx

        def held(what):
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith(what)) << 10

        n = 3000
        model = torch.nn.Sequential(*[torch.nn.Linear(n, n, bias=False) for _ in range(3)])
        sub = wx.Subspace(model, 512)
        small = wx.Subspace(torch.nn.Linear(20, 20), 64)
        small(torch.randn(1, 20)).sum().backward()  # what torch makes at first use
        before = held("VmRSS")
        sub(torch.randn(1, n)).sum().backward()
        print((held("VmHWM") - before) / (3 * 4 * n * n))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 2.2  # of D numbers: theta, and what autograd makes of it, a gradient


def test_a_dropped_model_is_freed():
    sub = wx.Subspace(mlp(), 5, redraw="step")
    sub(torch.randn(1, 6))
    dead = weakref.ref(sub), weakref.ref(sub.model[0])
    del sub
    gc.collect()
    assert dead[0]() is None and dead[1]() is None


# around it


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, monkeypatch):
    """The same gradient, and no weight computed twice."""
    calls, results = Calls(monkeypatch), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        sub = moved(wx.Subspace(mlp().double(), 5))
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        y = checkpoint(sub, x, use_reentrant=reentrant) if checkpointed else sub(x)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, sub.coordinates.grad))
    assert_close(results[0], results[1], **EXACT)
    assert calls.forwards == 2 * 4


def test_autocast():
    """The weights are computed in their own dtype; the layers cast them, as plain ones."""
    sub = moved(wx.Subspace(mlp(), 5))
    plain = mlp()
    plain.load_state_dict(computed(sub))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = sub(x), plain(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert sub.coordinates.grad.dtype == torch.float32 and sub.coordinates.grad.abs().sum() > 0


def test_functional_call_with_other_tensors():
    sub = moved(wx.Subspace(mlp().double(), 5))
    x, z = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64, requires_grad=True)
    theta0 = values_of(sub.model)
    other = {k: v + 1 for k, v in theta0.items()}
    y = functional_call(sub, {"coordinates": z, **{f"model.{k}": v for k, v in other.items()}}, (x,))
    weights = thetas(sub, other, z)
    plain = mlp().double()
    expected = functional_call(plain, weights, (x,))
    assert_close(y, expected, **EXACT)
    assert_close(torch.autograd.grad(y.sum(), z), torch.autograd.grad(expected.sum(), z), **EXACT)
    assert_close(values_of(sub.model), theta0, rtol=0, atol=0)


def test_double_backward_through_a_model():
    sub = moved(wx.Subspace(mlp().double(), 5))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def penalty(z):
        y = functional_call(sub, {"coordinates": z}, (x,))
        (g,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
        return g.square().sum()

    assert torch.autograd.gradcheck(penalty, sub.coordinates.detach().clone().requires_grad_())
