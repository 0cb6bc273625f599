"""A small model whose weights are computed in one call, again and again, and its twin: each alone and from scratch.

Equal down to the last bit: the kernels do the same arithmetic for a member as for a weight alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from computed_oracle import randn, unsettle
from torch import Tensor, nn

import weightxform as wx
from weightxform.spectral_norm.repeated import Prepared

LAYERS = (0, 2, 4, 6)


class FromScratch(wx.SpectralNorm):
    """Never computed again by what was prepared."""

    @classmethod
    def repeat_group(cls, transforms, raws, advance, accumulates):
        return None


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2), nn.Flatten(),
        nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 6),
    ).to(dtype)  # fmt: skip


def pair(
    dtype: torch.dtype = torch.float64, accumulate_grad: bool = False, **options: object
) -> tuple[nn.Sequential, nn.Sequential]:
    """(together, from scratch)."""
    together, alone = net(dtype), net(dtype)
    wx.constrain(together, wx.SpectralNorm, accumulate_grad=accumulate_grad, **options)
    for i in LAYERS:
        alone[i].weight = wx.ComputedParameter(alone[i].weight, FromScratch(**options))
    return unsettle(together), unsettle(alone)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(3, 3, 6, seed=step, dtype=dtype), randn(3, 6, seed=50 + step, dtype=dtype)


def run(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, g = batch(step, dtype)
    y = model(x)
    y.backward(g.to(y.dtype))
    return y


def write(model: nn.Module, step: int) -> None:
    """What an optimizer does to every parameter, and not what it does it from."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(p.numel(), seed=1000 * step + i, dtype=p.dtype).view(p.shape), alpha=0.1)


def same(a: nn.Module, b: nn.Module, where: object = "") -> None:
    """Parameters, gradients and states, bit by bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), f"{where}: {name}"
        assert (p.grad is None) == (q.grad is None), f"{where}: {name}.grad"
        assert p.grad is None or torch.equal(p.grad, q.grad), f"{where}: {name}.grad"
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q), f"{where}: {name}"


def train(
    models: tuple[nn.Module, nn.Module], event: Callable[[nn.Module], object], steps: int = 5, at: int = 3
) -> None:
    """Steps of both models, with an event between a write and the forward; the same numbers throughout."""
    for step in range(steps):
        outs = []
        for model in models:
            if step:
                write(model, step)
            if step == at:
                event(model)
            outs.append(run(model, step, next(model.parameters()).dtype))
        assert torch.equal(*outs), f"step {step}"
        same(*models, f"step {step}")


class Count:
    """How many members each call of the prepared kernel computed."""

    def __init__(self, monkeypatch) -> None:
        self.forwards: list[int] = []
        forward = Prepared.forward

        def counted(prepared: Prepared):
            self.forwards.append(len(prepared.weights))
            return forward(prepared)

        monkeypatch.setattr(Prepared, "forward", counted)
