"""A whole model: a small residual network whose filters turn by an angle, with a learned residual, and its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

import weightxform as wx

from .... import backends
from ...case import Case, Problem, Variant
from . import plain
from .variants import Built

CALL, PER_SAMPLE = "torch, functional_call", "torch, vmap"
BATCH, SIDE = 32, 32


@dataclass(frozen=True)
class ModelCase(Case):
    """``count``: C, how many different angles the ``BATCH`` images have."""

    count: int = 1
    frozen: bool = True

    @property
    def memory(self) -> int:
        return 4 << 30


class Block(nn.Module):
    """Two convolutions beside a shortcut, with silu: a relu at its kink would decide which gradient is right."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(y)) + self.shortcut(x))


def _resnet() -> nn.Module:
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU()
    blocks = Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def case(count: int) -> ModelCase:
    return ModelCase(f"model-resnet-B{BATCH}-C{count}", "filters", _resnet, count=count)


@dataclass
class ModelProblem(Problem):
    """``residuals``: of each 3x3 convolution L [3, 81], of ``wx.LearnedResidual(hidden=0)``, the raw tensors;
    ``parts``: the images of each angle."""

    case: ModelCase
    images: Tensor = field(init=False)
    angles: Tensor = field(init=False)
    parts: list[Tensor] = field(init=False)
    names: list[str] = field(init=False)
    residuals: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.case.model().to(self.device).requires_grad_(False).eval()
        of = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
        self.names, self.weights = [*of], [m.weight.detach() for m in of.values()]
        self.images = self.randn(BATCH, 3, SIDE, SIDE)
        self.angles = (torch.rand(self.case.count) * 6).to(self.device)
        index = torch.arange(BATCH) % self.case.count
        self.parts = [(index == c).nonzero().flatten().to(self.device) for c in range(self.case.count)]
        self.residuals = [0.05 * self.randn(3, 81) for _ in self.names]
        self.douts = [self.randn(BATCH, 10)]

    @property
    def index(self) -> Tensor:
        """[B], which angle each image has."""
        index = torch.empty(BATCH, dtype=torch.long, device=self.device)
        for c, part in enumerate(self.parts):
            index[part] = c
        return index

    def answer(self, factor: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [(r * factor).to(dtype).requires_grad_() for r in self.residuals]
        out = looped(self, copy.deepcopy(self.model).to(dtype), leaves, dtype)
        out.backward(self.douts[0].to(dtype))
        return [out.detach()], [leaf.grad for leaf in leaves]  # type: ignore[misc]


def filters(weight: Tensor, angle: Tensor, residual: Tensor) -> Tensor:
    """[C, O, I, 3, 3] at ``angle`` [C]: turned by grid_sample, and (L_0 + L_1 cos + L_2 sin) times the filter."""
    phi = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], 1)
    change = plain.matmul(weight, (phi @ residual).view(-1, 9, 9))
    return plain.grid_sample(weight, plain.rotation(angle), "zeros") + change


def _weights(problem: ModelProblem, model: nn.Module, angle: Tensor, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, leaf in zip(problem.names, leaves, strict=True):
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        found[f"{name}.weight"] = filters(weight, angle, leaf)
    return found


def looped(problem: ModelProblem, model: nn.Module, leaves: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One ``functional_call`` for each angle, on its images: nothing is computed twice."""
    banks = _weights(problem, model, problem.angles.to(dtype), leaves)
    images = problem.images.to(dtype)
    outs = []
    for c, part in enumerate(problem.parts):
        given = images if len(problem.parts) == 1 else images[part]
        outs.append(functional_call(model, {n: w[c] for n, w in banks.items()}, (given,)))
    if len(outs) == 1:
        return outs[0]
    return torch.cat(outs)[torch.argsort(torch.cat(problem.parts))]


def per_sample(problem: ModelProblem, leaves: Sequence[Tensor], angle: Tensor) -> Tensor:
    """Filters for each image; vmap makes of a convolution one with a group for each of them."""
    banks = _weights(problem, problem.model, angle, leaves)

    def one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(problem.model, weights, (image[None],))[0]

    return vmap(one)(banks, problem.images)


def _ours(problem: ModelProblem, form: str) -> Built:
    transform: Any = wx.Rotate() + wx.LearnedResidual("angle", harmonics=1, hidden=0)
    net = wx.Conditioned(copy.deepcopy(problem.model), transform, form=form)
    raws = list(net.transform_parameters())
    with torch.no_grad():
        for raw, residual in zip(raws, problem.residuals, strict=True):
            raw.copy_(residual)
    angle = problem.angles[0] if problem.case.count == 1 else problem.angles[problem.index]
    return lambda: [net(problem.images, angle)], raws  # type: ignore[return-value]


def _leaves(problem: ModelProblem) -> list[Tensor]:
    return [r.clone().requires_grad_() for r in problem.residuals]


def _functional(problem: ModelProblem, compiled: bool) -> Built:
    leaves = _leaves(problem)
    function: Callable[[list[Tensor]], Tensor] = lambda given: looped(problem, problem.model, given, torch.float32)  # noqa: E731
    if compiled:
        function = torch.compile(function, dynamic=False)
    return lambda: [function(leaves)], leaves


def _vmapped(problem: ModelProblem) -> Built:
    leaves, angle = _leaves(problem), problem.angles[problem.index]
    return lambda: [per_sample(problem, leaves, angle)], leaves


def variants(problem: ModelProblem) -> Iterator[Variant]:
    served, _ = backends.serving("filter_warp_fwd", problem.device.type)
    yield Variant("ours", "ours", partial(_ours, problem, "auto"), served)
    if problem.case.count > 1:
        for form in ("loop", "grouped"):
            yield Variant(f"ours, {form}", "ours", partial(_ours, problem, form), served, main=False)
    yield Variant(CALL, "eager", partial(_functional, problem, False), "torch")
    if problem.case.count > 1:
        yield Variant(PER_SAMPLE, "eager", partial(_vmapped, problem), "torch", main=False)
    yield Variant("torch.compile, functional_call", "compiled", partial(_functional, problem, True), "inductor")


def floor(problem: ModelProblem) -> tuple[int, int]:
    """Of the filters alone, without what the convolutions move: C banks written, their gradients read."""
    banks = problem.case.count * problem.nbytes
    return problem.nbytes + banks, problem.nbytes + banks
