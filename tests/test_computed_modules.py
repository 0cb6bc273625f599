"""Computed weights in torch's own modules: convolutions, recurrent layers, attention, embeddings, lazy ones."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from computed_oracle import (
    State,
    computed,
    generator,
    iterated,
    iterations,
    normalized,
    randn,
    set_raw,
    state_of,
    unsettle,
)
from torch import Tensor, nn
from torch.func import functional_call

import weightxform as wx

D = {"dtype": torch.float64}
X = randn(2, 4, 5, 5, seed=50)


def index() -> Tensor:
    return torch.randint(7, (3, 4), generator=generator(3))


# factory, names of the computed weights, inputs, and the axis of the outputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[], tuple], int]] = {
    "linear_no_bias": (lambda: nn.Linear(4, 3, bias=False, **D), ("weight",), lambda: (randn(2, 4),), 0),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5, **D), ("weight",), lambda: (randn(2, 3), randn(2, 4)), 0),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1, **D), ("weight",), lambda: (X[..., 0],), 0),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, **D), ("weight",), lambda: (X,), 0),
    "conv2d_circular": (
        lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", **D), ("weight",), lambda: (X,), 0,
    ),
    "conv3d": (lambda: nn.Conv3d(4, 3, (1, 3, 2), **D), ("weight",), lambda: (X[:, :, None],), 0),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, **D), ("weight",), lambda: (X[..., 0],), 1),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, **D), ("weight",), lambda: (X,), 1),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 3, (1, 2, 2), **D), ("weight",), lambda: (X[:, :, None],), 1),
    "embedding": (lambda: nn.Embedding(7, 5, **D), ("weight",), lambda: (index(),), 0),
    "embedding_bag": (lambda: nn.EmbeddingBag(7, 5, **D), ("weight",), lambda: (index(),), 0),
    "lstm_cell": (lambda: nn.LSTMCell(4, 3, **D), ("weight_ih", "weight_hh"), lambda: (randn(2, 4),), 0),
    "gru_cell": (lambda: nn.GRUCell(4, 3, **D), ("weight_ih", "weight_hh"), lambda: (randn(2, 4),), 0),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True, **D),
        ("in_proj_weight",),
        lambda: (randn(2, 3, 6), randn(2, 3, 6, seed=1), randn(2, 3, 6, seed=2)),
        0,
    ),
    "attention_self": (
        lambda: nn.MultiheadAttention(6, 2, **D), ("in_proj_weight",), lambda: (randn(2, 3, 6),) * 3, 0,
    ),
    "attention_kdim": (
        lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True, **D),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
        lambda: (randn(2, 3, 6), randn(2, 4, 5), randn(2, 4, 4)),
        0,
    ),
}  # fmt: skip


def first_tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(output[0])  # type: ignore[index]


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_iterations(case):
    factory, names, inputs, dim = CASES[case]
    torch.manual_seed(0)
    plain = factory()
    layer = copy.deepcopy(plain)
    for name in names:
        computed(layer, name)
    unsettle(layer)
    before = {name: state_of(layer, name) for name in names}
    args = inputs()
    y = first_tensor(layer(*args))
    g = randn(*y.shape, seed=9)
    y.backward(g, retain_graph=False)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    values = dict(leaves)
    for name in names:
        values[name] = normalized(leaves[name], iterated(leaves[name], before[name], dim=dim), dim)
    expected = first_tensor(functional_call(plain, values, args))
    expected.backward(g)
    torch.testing.assert_close(y, expected)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    layer(*args)
    for name in names:
        assert iterations(before[name], state_of(layer, name), leaves[name], dim) == 1, "however often it is read"
    state = {name: state_of(layer, name) for name in names}
    layer.eval()
    layer(*args)
    for name in names:
        assert iterations(state[name], state_of(layer, name), leaves[name], dim) == 0


# recurrent layers

RNNS = {
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, **D),
    "gru": lambda: nn.GRU(4, 3, **D),
    "rnn": lambda: nn.RNN(4, 3, **D),
    "lstm_proj": lambda: nn.LSTM(4, 3, proj_size=2, **D),
}


def run_rnn(layer: nn.RNNBase, x: Tensor, weights: list[Tensor]) -> Tensor:
    """The layer's forward as a function of its flat weights."""
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    h = x.new_zeros(directions, x.shape[1], layer.proj_size or layer.hidden_size)
    c = x.new_zeros(directions, x.shape[1], layer.hidden_size)
    call = {"LSTM": torch._VF.lstm, "GRU": torch._VF.gru, "RNN_TANH": torch._VF.rnn_tanh}[layer.mode]
    state = (h, c) if layer.mode == "LSTM" else h
    return call(x, state, weights, True, layer.num_layers, 0.0, layer.training, layer.bidirectional, False)[0]


def spectral_rnn(kind: str, **options: object) -> tuple[nn.RNNBase, list[str]]:
    torch.manual_seed(0)
    layer = RNNS[kind]()
    names = [n for n, p in layer.named_parameters() if p.ndim == 2]
    for name in names:
        computed(layer, name, **options)
    return unsettle(layer), names


def check_rnn(layer: nn.RNNBase, names: list[str]) -> None:
    before = {name: state_of(layer, name) for name in names}
    leaves = [wx.raw(layer, n) if n in names else getattr(layer, n) for n in layer._flat_weights_names]
    leaves = [p.detach().clone().requires_grad_() for p in leaves]
    weights = [
        normalized(w, iterated(w, before[n], int(layer.training))) if n in names else w
        for n, w in zip(layer._flat_weights_names, leaves, strict=True)
    ]
    x = randn(5, 2, 4, seed=6)
    y, _ = layer(x)
    g = randn(*y.shape, seed=7)
    y.backward(g)
    expected = run_rnn(layer, x, weights)
    expected.backward(g)
    torch.testing.assert_close(y, expected)
    for name, w in zip(layer._flat_weights_names, leaves, strict=True):
        p = dict(layer.named_parameters())[name]
        torch.testing.assert_close(p.grad, w.grad, msg=lambda m, n=name: f"{n}: {m}")
        if name in names:
            assert iterations(before[name], state_of(layer, name), w) == int(layer.training)
    layer.zero_grad()


@pytest.mark.parametrize("kind", RNNS)
def test_recurrent_layers(kind):
    layer, names = spectral_rnn(kind)
    for step in range(3):
        check_rnn(layer, names)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(randn(*p.shape, seed=30 * step + i))
    layer.eval()
    check_rnn(layer, names)


def test_recurrent_layers_advance_once_a_forward_without_a_cache():
    layer, names = spectral_rnn("gru", cache=False)
    check_rnn(layer, names)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_recurrent_layers(how):
    layer, names = spectral_rnn("lstm")
    layer(randn(5, 2, 4))  # _flat_weights could now hold non-leaf tensors
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    for i, name in enumerate(names):
        set_raw(twin, randn(*wx.raw(twin, name).shape, seed=i), name)
        set_raw(layer, randn(*wx.raw(layer, name).shape, seed=40 + i), name)
    check_rnn(twin, names)
    check_rnn(layer, names)


def test_recurrent_layers_follow_conversions_loading_and_baking():
    layer, names = spectral_rnn("gru")
    other, _ = spectral_rnn("gru")
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    layer.load_state_dict(other.state_dict())
    check_rnn(layer, names)
    layer.float().double()
    layer.flatten_parameters()
    for i, name in enumerate(names):
        set_raw(layer, randn(*wx.raw(layer, name).shape, seed=60 + i), name)
    check_rnn(layer, names)
    layer.eval()
    x = randn(5, 2, 4)
    y = layer(x)[0]
    for name in names:
        wx.bake(layer, name)
    assert type(layer) is nn.GRU and all(isinstance(w, nn.Parameter) for w in layer._flat_weights)
    torch.testing.assert_close(layer(x)[0], y)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.bias_ih_l0.add_(1)
    expected = run_rnn(layer, x, [getattr(layer, n) for n in layer._flat_weights_names])
    torch.testing.assert_close(layer(x)[0], expected)


# attention


def test_the_fast_path_of_an_encoder_layer_in_eval():
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **D)
    layer = copy.deepcopy(plain)
    targets = {"self_attn": "in_proj_weight", "self_attn.out_proj": "weight", "linear1": "weight", "linear2": "weight"}
    for path, name in targets.items():
        computed(layer.get_submodule(path), name)
    unsettle(layer)
    x = randn(2, 3, 8)
    before = {path: state_of(layer.get_submodule(path), name) for path, name in targets.items()}
    for training in (True, False):
        layer.train(training), plain.train(training)
        values = {}
        for path, name in targets.items():
            raw = wx.raw(layer.get_submodule(path), name)
            assert training or iterations(before[path], state_of(layer.get_submodule(path), name), raw) == 1
            values[f"{path}.{name}"] = normalized(raw.detach(), iterated(raw, before[path]))
        torch.testing.assert_close(layer(x), functional_call(plain, values, (x,)))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), functional_call(plain, values, (x,)))


def test_constrain_covers_what_it_says_and_leaves_the_rest():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    wx.constrain(model, wx.SpectralNorm, exclude=["self_attn*"])
    assert wx.is_computed(model.linear1) and wx.is_computed(model.linear2)
    assert not wx.is_computed(model.self_attn.out_proj) and not wx.is_computed(model.norm1)
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)


# embeddings


def test_the_padding_row_of_an_embedding_stays_zero():
    torch.manual_seed(0)
    layer = computed(nn.Embedding(7, 5, padding_idx=2, **D))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    i = torch.tensor([[0, 2, 6], [2, 2, 1]])
    for step in range(3):
        before: State = state_of(layer)
        w = wx.raw(layer).detach().clone().requires_grad_()
        y = layer(i)
        assert not y[i == 2].count_nonzero()
        g = randn(*y.shape, seed=step)
        optimizer.zero_grad()
        y.backward(g)
        nn.functional.embedding(i, normalized(w, iterated(w, before)), padding_idx=2).backward(g)
        torch.testing.assert_close(wx.raw(layer).grad, w.grad)
        optimizer.step()
    assert not wx.raw(layer)[2].count_nonzero()


# lazy modules, and modules of one's own


def test_lazy_modules_after_their_first_forward():
    torch.manual_seed(0)
    layer = nn.LazyConv2d(3, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: lazy modules are a new feature
        layer(X)
    assert type(layer) is nn.Conv2d
    computed(layer)
    before, w = state_of(layer), wx.raw(layer).detach().clone()
    torch.testing.assert_close(layer(X), nn.functional.conv2d(X, normalized(w, iterated(w, before)), layer.bias))


class Own(nn.Module):
    """A weight under a name and with a use of its own, next to slots, properties and __getattr__."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(randn(4, 6))

    @property
    def twice(self) -> Tensor:
        return 2 * self.kernel

    def __getattr__(self, name: str) -> object:
        if name == "virtual":
            return "virtual"
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.twice.T + x @ self.kernel.T


def test_a_module_of_ones_own():
    module = Own()
    computed(module, "kernel")
    before, w = state_of(module, "kernel"), wx.raw(module, "kernel").detach().clone().requires_grad_()
    x, g = randn(2, 6), randn(2, 4, seed=1)
    module(x).backward(g)
    (3 * x @ normalized(w, iterated(w, before)).T).backward(g)
    torch.testing.assert_close(wx.raw(module, "kernel").grad, w.grad)
    assert module.virtual == "virtual" and set(module.state_dict()) == {
        "kernel", "kernel_transform.u", "kernel_transform.v",
    }  # fmt: skip
    with pytest.raises(AttributeError):
        _ = module.nothing_here


def test_parameter_lists_and_dicts():
    for container, name in ((nn.ParameterList([randn(4, 6)]), "0"), (nn.ParameterDict({"a": randn(4, 6)}), "a")):
        computed(container, name)
        before, w = state_of(container, name), wx.raw(container, name).detach().clone()
        value = container[0] if name == "0" else container["a"]
        torch.testing.assert_close(value.detach(), normalized(w, iterated(w, before)))
