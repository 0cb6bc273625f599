"""Spectral normalization: single weights, lists of layers, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weightxform as wx

from ... import backends
from ...registry import OPS
from ...spectral_norm import reference
from ...spectral_norm.repeated import Prepared
from .. import models
from ..case import Case, Problem, Room, Variant, layers
from ..gate import Oracle
from ..summary import MIB, Verdict, main_row, of_case, verdict

EPS = 1e-12
MANY_SMALL = "mlp-64x64x64"
OPTIONS = 0, 1, EPS, False, None, None  # dim, n_iter, eps, v_first, bound, out_dtype


def _single(h: int, w: int, quick: bool = False) -> Case:
    return Case(f"linear-{h}x{w}", "single", partial(models.linear, h, w), quick=quick)


SIZES = 256, 512, 1024, 2048, 4096, 8192
CASES = (
    *(_single(n, n, quick=n in (512, 2048)) for n in SIZES),
    *(_single(n, n // 4) for n in SIZES),
    Case("layer-1024x1024", "layer", partial(models.linear, 1024, 1024), (64, 1024), quick=True),
    Case("mlp-64x64x64", "list", models.mlp, (256, 64), quick=True),
    Case("sngan-discriminator", "list", models.sngan_discriminator, (32, 3, 32, 32)),
    Case("resnet-18", "list", models.resnet18, (8, 3, 64, 64), quick=True),
    Case("resnet-50", "list", models.resnet50, (8, 3, 64, 64)),
    Case("biggan-discriminator", "list", models.biggan_discriminator, (2, 3, 128, 128)),
    Case("transformer-12", "list", models.transformer, (1, 128, 768)),
)


def initial_state(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """Random unit (u, v): not converged, so that a wrong derivative shows."""
    generator = torch.Generator().manual_seed(problem.seed + 1)
    state = []
    for weight in problem.weights:
        u, v = (torch.randn(n, generator=generator) for n in reference.matrix_shape(weight, 0))
        state.append((reference.unit(u, EPS).to(problem.device), reference.unit(v, EPS).to(problem.device)))
    return state


def oracle(problem: Problem, steps: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    outs, grads = [], []
    for weight, (u, v), dout in zip(problem.weights, initial_state(problem), problem.douts, strict=True):
        weight = weight.to(dtype)
        u, v = reference.iterate(weight.flatten(1), u.to(dtype), v.to(dtype), steps - 1, EPS, False)
        out, state = reference.forward(weight, u, v, None, *OPTIONS)
        outs.append(out)
        grads.append(reference.backward(dout.to(dtype), weight, state, None, 0, None)[0])
    return outs, grads


def floor(problem: Problem) -> tuple[int, int]:
    fwd, bwd = OPS["spectral_norm_fwd"].bytes_moved, OPS["spectral_norm_bwd"].bytes_moved
    return sum(fwd(w, None, None, None, *OPTIONS) for w in problem.weights), sum(bwd(w, w) for w in problem.weights)


def constrain(model: nn.Module, how: str) -> nn.Module:
    if how != "eager":
        wx.constrain(model, wx.SpectralNorm, fold=how == "folded")
    else:
        for layer in layers(model):
            parametrizations.spectral_norm(layer)
    return model


Built = tuple[Callable[[], Sequence[Tensor]], list[Tensor]]


def _read(modules: Iterable[Any]) -> list[Tensor]:
    return [layer.weight for layer in modules]


def ours(problem: Problem, grouped: bool) -> Built:
    modules: Any = problem.copy_layers()
    if grouped:
        wx.constrain(modules, wx.SpectralNorm)
    else:
        for layer in modules:
            layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    with torch.no_grad():
        for layer, (u, v) in zip(modules, initial_state(problem), strict=True):
            transform: Any = next(m for m in layer.modules() if isinstance(m, wx.SpectralNorm))
            transform.u.copy_(u)
            transform.v.copy_(v)
    return partial(_read, modules), [wx.raw(layer, "weight") for layer in modules]


class OpsAlone(Variant):
    """The grouped ops as ``wx.constrain`` calls them at every step, without autograd and modules."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__("ours, ops alone", "ours", partial(functional, problem), backend, main=False)
        self.problem = problem

    def start(self) -> None:
        self.raws = _leaves(self.problem)
        weights = [w.detach() for w in self.raws]
        us, vs = (list(x) for x in zip(*initial_state(self.problem), strict=True))
        n = len(weights)
        dim, n_iter, *rest = OPTIONS
        self.arguments: Any = (weights, us, vs, [], [dim] * n, [n_iter] * n, *rest)
        self.prepared = Prepared.of(self.arguments)
        self.offsets = [0, *accumulate(u.numel() + v.numel() + 1 for u, v in zip(us, vs, strict=True))][:-1]
        self.state: Any = None

    def _forward(self) -> Sequence[Tensor]:
        if self.prepared is not None:
            outs, self.state = self.prepared.forward()
            return outs
        outs, self.state = OPS["spectral_norm_fwd_list"](*self.arguments)
        _, us, vs, *_ = self.arguments
        parts = self.state.split_with_sizes([k for u, v in zip(us, vs, strict=True) for k in (len(u), len(v), 1)])
        torch._foreach_copy_([*us, *vs], [*parts[::3], *parts[1::3]])
        return outs

    def backward(self, outs: Sequence[Tensor], douts: Sequence[Tensor]) -> None:
        if self.prepared is not None:
            grads, _ = self.prepared.backward(list(douts), self.prepared.everyone, self.state, [])
        else:
            weights, _, _, _, dims, *_ = self.arguments
            grads, _ = OPS["spectral_norm_bwd_list"](list(douts), weights, self.state, self.offsets, [], dims, None)
        for raw, grad in zip(self.raws, grads, strict=True):
            raw.grad = grad


def _leaves(problem: Problem) -> list[Tensor]:
    return [w.clone().requires_grad_() for w in problem.weights]


def functional(problem: Problem) -> Built:
    raws, state = _leaves(problem), initial_state(problem)

    def forward() -> list[Tensor]:
        outs = []
        for i, (raw, (u, v)) in enumerate(zip(raws, state, strict=True)):
            out, u, v, _ = wx.functional.spectral_norm(raw, u, v)
            outs.append(out)
            state[i] = u, v
        return outs

    return forward, raws


def eager(problem: Problem) -> Built:
    modules: Any = problem.copy_layers()
    for layer, (u, v) in zip(modules, initial_state(problem), strict=True):
        parametrizations.spectral_norm(layer)
        layer.parametrizations.weight[0]._u.copy_(u)
        layer.parametrizations.weight[0]._v.copy_(v)
    return partial(_read, modules), [layer.parametrizations.weight.original for layer in modules]


def compiled_modules(problem: Problem) -> Built:
    read, raws = eager(problem)
    return torch.compile(lambda: read(), dynamic=False, fullgraph=True), raws


def by_hand(raws: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What somebody who wants it fast would write for the compiler: state in and out, nothing written in place."""
    outs, us, new_vs = [], [], []
    for raw, v in zip(raws, vs, strict=True):
        matrix = raw.flatten(1)
        with torch.no_grad():
            u = F.normalize(matrix @ v, dim=0, eps=EPS)
            v = F.normalize(matrix.T @ u, dim=0, eps=EPS)
        outs.append(raw / torch.dot(u, matrix @ v))
        us.append(u)
        new_vs.append(v)
    return outs, us, new_vs


def compiled_by_hand(problem: Problem, mode: str | None = None) -> Built:
    raws, vs = _leaves(problem), [v for _, v in initial_state(problem)]
    step = torch.compile(by_hand, dynamic=False, fullgraph=True, mode=mode)

    def forward() -> list[Tensor]:
        outs, _, new_vs = step(raws, vs)
        vs[:] = new_vs if mode is None else [v.clone() for v in new_vs]  # a replay overwrites what the last returned
        return outs

    return forward, raws


def variants(problem: Problem) -> Iterator[Variant]:
    device = problem.device.type
    (one, _), (many, _) = (backends.serving(f"spectral_norm_fwd{kind}", device) for kind in ("", "_list"))
    grouped = problem.case.group == "list"
    served = many if grouped else one
    yield Variant("ours", "ours", partial(ours, problem, grouped), served)
    if grouped:
        yield OpsAlone(problem, many)
        yield Variant("ours, ungrouped", "ours", partial(ours, problem, False), one, main=False)
    yield Variant("ours, functional", "ours", partial(functional, problem), one, main=False)
    for other in () if backends.forced else backends.available("spectral_norm_fwd"):
        if other != served and device in backends.DEVICES.get(other, (device,)):
            yield Variant(f"ours, {other}", "ours", partial(ours, problem, grouped), other, main=False, forced=other)
    yield Variant("torch, eager", "eager", partial(eager, problem), "torch")
    yield Variant("torch.compile, by hand", "compiled", partial(compiled_by_hand, problem), "inductor")
    yield Variant("torch.compile, modules", "compiled", partial(compiled_modules, problem), "inductor")
    if device == "cuda":
        build = partial(compiled_by_hand, problem, "reduce-overhead")
        yield Variant("torch.compile, by hand, graphs", "compiled", build, "inductor")


def _ops_alone(case: dict[str, Any]) -> float | None:
    row = next((v for v in case["variants"] if v["name"] == "ours, ops alone"), None)
    return None if row is None or row["status"] != "ok" else row["fwd_bwd"].get("vs_eager")


def _cost_ratio(case: dict[str, Any]) -> float | None:
    """How many times more torch's constraint adds to a training step than ours."""
    cost = case.get("step", {}).get("cost")
    return None if cost is None else cost["eager"] / max(cost["ours"], 1e-9)


def _folded_step(case: dict[str, Any]) -> float | None:
    """A step of the folded layers over that of plain ones."""
    return 1 + case["step"]["cost"]["folded"] if "folded" in case.get("step", {}).get("cost", {}) else None


def verdicts(cases: Sequence[dict[str, Any]], device: str) -> list[Verdict]:
    """Forward and backward through the public API, against the targets of a CPU with two threads, float32, training."""
    single = [c for c in cases if c["group"] == "single"]
    lists = [c for c in cases if c["group"] == "list"]
    resnets = [c for c in lists if c["name"].startswith("resnet")]
    large = [c for c in single if c["bytes"] >= 4 * MIB]
    both = "fwd_bwd"
    return [
        verdict("single weights against torch, geometric mean", single, both, "vs_eager", 4),
        verdict("single weights against the best torch.compile, geometric mean", single, both, "vs_compiled", 1.5),
        verdict("slowest case against torch", cases, both, "vs_eager", 1, worst=True),
        verdict("slowest case against the best torch.compile", cases, both, "vs_compiled", 1, worst=True),
        verdict("over a copy's floor, single weights from 4 MiB, worst", large, both, "x_floor", 1.4, True, True),
        verdict("over a copy's floor, single weights from 4 MiB, geometric mean", large, both, "x_floor", 1.4, True),
        verdict("ResNet lists, grouped, against torch, worst", resnets, both, "vs_eager", 5, worst=True),
        verdict("lists, grouped, against torch, geometric mean", lists, both, "vs_eager", 1),
        of_case("64 layers of 64x64, ops alone, against torch", cases, MANY_SMALL, 25, _ops_alone),
        of_case("64 layers of 64x64, through autograd, against torch", cases, MANY_SMALL, 5,
                 lambda c: main_row(c)[both]["vs_eager"]),
        of_case("64 layers of 64x64, through autograd, against the best torch.compile", cases, MANY_SMALL, 1.8,
                 lambda c: main_row(c)[both]["vs_compiled"]),
        of_case("64 layers of 64x64: what torch adds to a training step over what ours adds", cases, MANY_SMALL, 8,
                 _cost_ratio),
        of_case("step of a folded Linear(1024, 1024) at batch 64 over a plain one's", cases, "layer-1024x1024", 1.3,
                 _folded_step, at_most=True),
    ]  # fmt: skip


ROOM = Room(
    name="spectral_norm",
    ops=(
        "spectral_norm_fwd",
        "spectral_norm_bwd",
        "spectral_norm_fwd_list",
        "spectral_norm_bwd_list",
        "spectral_norm_state_list",
    ),
    cases=CASES,
    variants=variants,
    judge=partial(Oracle, oracle),
    floor=floor,
    verdicts=verdicts,
    constrain=constrain,
    constraints=("ours", "folded", "eager"),
)
