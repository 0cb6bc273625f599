"""Small models and helpers of the subspace tests."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.subspace import op
from weightxform.subspace.maps import ImplicitMap, Map
from weightxform.subspace.plan import make_plan

TOY = {"a.weight": 45, "a.bias": 5, "b.weight": 1980, "b.bias": 11, "c.weight": 33, "c.bias": 3, "one": 1}
SMALL = {"a.weight": 45, "a.bias": 5, "b.weight": 148, "b.bias": 11, "c": 1}
EXACT = {"rtol": 1e-11, "atol": 1e-12}
NAMES = ("block_hadamard", "one_hot", "sparse", "rademacher", "gaussian", "fastfood", "kronecker")


def implicit(kind: str, sizes: Mapping[str, int] = TOY, dim: int = 29, seed: int = 5, **options: object) -> ImplicitMap:
    return ImplicitMap(make_plan(kind, sizes, dim, seed, **options))


def zeros(p: Map, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.zeros(sizes[name], dtype=dtype) for name in p.names]


def matrix(p: Map, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64, step: Tensor | None = None) -> Tensor:
    """P as the room computes it, [D, d], in the order of ``p.names``."""
    eye = torch.eye(p.dim, dtype=dtype)
    parts = p.project(eye, zeros(p, sizes, dtype), range(len(p.names)), None, step)
    return torch.cat([part.flatten(1) for part in parts], 1).T


def apply(p: Map, sizes: Mapping[str, int], z: Tensor, step: Tensor | None = None) -> Tensor:
    """P z, [D]."""
    return torch.cat(p.project(z, zeros(p, sizes, z.dtype), range(len(p.names)), None, step))


def transpose(p: Map, sizes: Mapping[str, int], g: Tensor, step: Tensor | None = None) -> Tensor:
    """P' g, [d]."""
    return p.adjoint(g.split([sizes[name] for name in p.names]), range(len(p.names)), None, step)


class Zoo(nn.Module):
    """What models are made of: an embedding tied to the last layer, recurrence, attention, lists, own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.embedding = nn.Embedding(13, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.down = nn.Linear(16, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mixes = nn.ParameterList([torch.randn(8, 8) / 3, torch.randn(8)])
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, factor: float = 1.0) -> dict[str, Tensor]:
        x, _ = self.lstm(self.embedding(tokens))
        x = self.down(x)
        a, _ = self.attention(x, x, x, need_weights=False)
        x = self.norm(x + a) @ self.mixes[0] + self.mixes[1]
        return {"logits": self.head(x) * self.scale * factor, "hidden": x}


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 5 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def inputs(model: nn.Module) -> tuple[torch.Tensor]:
    if isinstance(model, Zoo):
        return (torch.randint(0, 13, (2, 3)),)
    return (torch.randn(2, 2, 5, 5).double() if isinstance(model, Conv) else torch.randn(2, 6).double(),)


def moved(sub: wx.Subspace, seed: int = 7) -> wx.Subspace:
    """With coordinates (and scales) that are not those of the beginning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (sub.coordinates, sub.scales):
            if p is not None:
                p.copy_(p + torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return sub


def thetas(
    sub: wx.Subspace, theta0: Mapping[str, Tensor], z: Tensor, scales: Tensor | None = None
) -> dict[str, Tensor]:
    """The weights by an explicit P, differentiable in z and scales: what ``sub`` must compute (float64)."""
    found, start = {}, 0
    for k, name in enumerate(sub.names):
        p = sub._maps[k if sub.structure == "per_tensor" else 0]
        sizes = {n: theta0[n].numel() for n in p.names}
        P = matrix(p, sizes, step=sub.step)
        row = sum(sizes[n] for n in p.names[: p.names.index(name)])
        own = z[start : start + p.dim] if sub.structure == "per_tensor" else z
        start += p.dim
        y = (P[row : row + sizes[name]] @ own).view(theta0[name].shape)
        found[name] = theta0[name] + (y if scales is None else scales[k] * y)
    return found


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name; of a wrapped model, theta0."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def computed(sub: wx.Subspace) -> dict[str, Tensor]:
    """The weights as layers read them, detached."""
    places = [(name, *of[0]) for name, of in zip(sub.names, sub._places, strict=True)]
    return {name: getattr(module, attribute).detach().clone() for name, module, attribute in places}


class Calls:
    """How often the ops ran: ``forwards`` counts weights, not calls."""

    def __init__(self, monkeypatch) -> None:
        self.forwards = self.backwards = self.forward_calls = self.backward_calls = 0

        def fwd(z, c, theta0, *rest, real=op.subspace_fwd):
            self.forwards += len(theta0)
            self.forward_calls += 1
            return real(z, c, theta0, *rest)

        def bwd(grads, *rest, real=op.subspace_bwd):
            self.backwards += len(grads)
            self.backward_calls += 1
            return real(grads, *rest)

        monkeypatch.setattr(op, "subspace_fwd", fwd)
        monkeypatch.setattr(op, "subspace_bwd", bwd)


def seeded(make=mlp, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def about(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["weightxform"])


def state_of(model: nn.Module) -> tuple:
    """All that loading could change."""
    return (
        {n: t.detach().clone() for n, t in model.state_dict().items()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        [type(m) for m in model.modules()],
        [sum(len(h) for k, h in vars(m).items() if k.endswith("hooks")) for m in model.modules()],
    )


def assert_refused(path, model: nn.Module, message: str, error: type[Exception] = ValueError, **options) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        wx.Subspace.load(path, model, **options)
    after = state_of(model)
    assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)
    assert after[1:] == before[1:]
