"""What the tests on a GPU share: where they run, and what the right answer is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from computed_oracle import State, iterated, normalized, randn, state_of, unsettle
from torch import Tensor, nn

import weightxform as wx
from weightxform.numerics import relative_error
from weightxform.registry import OPS
from weightxform.spectral_norm.op import make_inputs

DEVICE = torch.device(os.environ.get("WEIGHTXFORM_TEST_DEVICE", "cuda"))
CYCLES = 200_000_000  # of torch.cuda._sleep: about a tenth of a second

needs_gpu = pytest.mark.gpu


def anywhere(test: Callable) -> Callable:
    """A test that also means something on a CPU."""
    return test if DEVICE.type == "cpu" else pytest.mark.gpu(test)


ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal but for the rounding of ``dtype``; by default of that of ``actual``."""
    error, bound = relative_error(actual, exact), ROUNDING[dtype or actual.dtype]
    assert error <= bound, f"error {error:.2e} > {bound:.2e}"


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().cpu().double() for t in tensors)


@torch.enable_grad()
def answer(raw: Tensor, state: State, dout: Tensor, times: int = 1, dim: int = 0) -> tuple[Tensor, Tensor, State]:
    """(weight, gradient of raw, new state) in float64 on the CPU."""
    w, u, v, g = double(raw, *state, dout)
    after = iterated(w, (u, v), times, dim)
    w.requires_grad_()
    out = normalized(w, after, dim)
    return out.detach(), torch.autograd.grad(out, w, g)[0], after


# ops, without the module above them


def list_inputs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weights, us, vs = zip(*(make_inputs(s, 0, dtype, DEVICE, generator) for s in shapes), strict=True)
    douts = [torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in shapes]
    return {"weights": list(weights), "us": list(us), "vs": list(vs), "douts": douts}


def run_list(inputs: dict, n_iter: int = 1) -> list[Tensor]:
    """Every output of the forward and of the backward over a list."""
    weights, us, vs, douts = (inputs[k] for k in ("weights", "us", "vs", "douts"))
    n = len(weights)
    outs, state = OPS["spectral_norm_fwd_list"](weights, us, vs, [], [0] * n, [n_iter] * n, 1e-12, False, None, None)
    return [*outs, state, *run_backward(weights, douts, state, us, vs)]


def run_backward(
    weights: list[Tensor], douts: list[Tensor], state: Tensor, us: list[Tensor], vs: list[Tensor]
) -> list[Tensor]:
    offsets, at = [], 0
    for u, v in zip(us, vs, strict=True):
        offsets.append(at)
        at += u.numel() + v.numel() + 1
    grads, _ = OPS["spectral_norm_bwd_list"](douts, weights, state, offsets, [], [0] * len(weights), None)
    return grads


def run_single(inputs: dict, n_iter: int = 1) -> list[Tensor]:
    """The same of each weight by itself, through autograd."""
    found: list[Tensor] = []
    for weight, u, v, dout in zip(*(inputs[k] for k in ("weights", "us", "vs", "douts")), strict=True):
        raw = weight.detach().requires_grad_()
        out, u, v, sigma = wx.functional.spectral_norm(raw, u, v, n_power_iterations=n_iter)
        found += [out.detach(), u, v, sigma, *torch.autograd.grad(out, raw, dout)]
    return found


RUNS = {"list": run_list, "single": run_single}
# In one block, in a cluster or co-resident, streamed; tall, wide, one row; a convolution.
SHAPES = ((64, 64), (257, 13), (7, 1031), (1, 37), (512, 768), (16, 5, 3, 3), (2048, 1536))


# models

FOLDED = "folded"


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers with spectrally normalised weights, alone, in a group or folded; u and v have not converged."""
    torch.manual_seed(0)
    linear = nn.Linear
    if kind == FOLDED:
        from weightxform.nn import SpectralLinear as linear
    model = nn.Sequential(linear(48, 64), nn.Tanh(), linear(64, 40), nn.Tanh(), linear(40, 8)).to(dtype)
    if kind == "alone":
        for layer in model[::2]:
            wx.spectral_norm(layer)
    elif kind == "group":
        wx.constrain(model, wx.SpectralNorm)
    return unsettle(model).to(DEVICE)


KINDS = ("alone", "group", FOLDED)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs of :func:`build`'s models, and an upstream gradient."""
    return randn(5, 48, seed=seed, dtype=dtype).to(DEVICE), randn(5, 8, seed=100 + seed, dtype=dtype).to(DEVICE)


@torch.enable_grad()
def oracle_step(model: nn.Sequential, states: list[State], x: Tensor, g: Tensor, times: int = 1) -> dict[str, list]:
    """What a forward and backward of such a model must give, in plain torch and float64 on the CPU."""
    layers = list(model[::2])
    raws = [double(wx.raw(layer))[0] for layer in layers]
    after = [iterated(w, double(*s), times) for w, s in zip(raws, states, strict=True)]
    leaves = [w.requires_grad_() for w in raws]
    y = double(x)[0]
    for i, (w, state, layer) in enumerate(zip(leaves, after, layers, strict=True)):
        y = nn.functional.linear(y, normalized(w, state), double(layer.bias)[0])
        y = y.tanh() if i + 1 < len(layers) else y
    return {"y": [y.detach()], "grads": list(torch.autograd.grad(y, leaves, double(g)[0])), "states": after}


def states_of(model: nn.Sequential) -> list[State]:
    return [state_of(layer) for layer in model[::2]]


def check_step(model: nn.Sequential, y: Tensor, expected: dict[str, list], dtype: torch.dtype | None = None) -> None:
    """``y``, the gradients and the states of ``model`` are those of :func:`oracle_step`."""
    assert_near(y, expected["y"][0], dtype)
    for layer, grad, state in zip(model[::2], expected["grads"], expected["states"], strict=True):
        assert_near(wx.raw(layer).grad, grad, dtype)
        for actual, exact in zip(state_of(layer), state, strict=True):
            assert_near(actual, exact, dtype)


def write_raws(model: nn.Sequential, seed: int) -> None:
    """New raw weights, in place, as an optimizer writes them."""
    with torch.no_grad():
        for i, layer in enumerate(model[::2]):
            raw = wx.raw(layer)
            raw.copy_(randn(*raw.shape, seed=10 * seed + i, dtype=raw.dtype))
