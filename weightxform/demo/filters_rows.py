"""The rows of the table: what a frozen CNN reaches on turned digits, with weightxform and in plain torch."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightxform as wx

from .filters_plain import Literal, Map, PerFilter, PlainConditioned, Turned
from .filters_task import BATCH, Digits, Head, turn
from .progress import Progress

HIDDEN = 128
OURS, PLAIN = "weightxform", "plain torch"


class ByShape(nn.Module):
    """A transform of a whole model, as a user writes it: a network for each shape of weight."""

    def __init__(self, maps: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(maps)

    def forward(self, weight: Tensor, angle: Tensor) -> Tensor:
        return self.maps[key_of(weight.shape)](weight, angle)


def key_of(shape: torch.Size | tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def kernels(model: nn.Module, head: Head) -> dict[str, Tensor]:
    """Layer name -> weight [O, I, k, k], of what has to turn."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            found[name] = layer.weight.detach()
        elif name in head.flattened:
            weight: Tensor = layer.weight
            found[name] = weight.detach().view(-1, *head.flattened[name])
    return found


@dataclass(frozen=True)
class Row:
    """``rate``, ``steps``: of Adam in the full run; 0: nothing is trained. ``ours``, ``plain``: by (model, head)."""

    name: str
    title: str
    steps: int
    rate: float
    ours: Callable[[nn.Module, Head], nn.Module]
    plain: Callable[[nn.Module, Head], PlainConditioned]


Make = Callable[[Tensor], nn.Module]


def _plain(model: nn.Module, head: Head, make: Make) -> PlainConditioned:
    return PlainConditioned(model, {name: make(w) for name, w in kernels(model, head).items()}, head.flattened)


def _by_shape(model: nn.Module, head: Head, make: Make) -> nn.Module:
    """A module of the user's own, and the layers by name."""
    of = kernels(model, head)
    maps = ByShape({key_of(w.shape): make(w) for w in of.values()})
    return wx.Conditioned(model, maps, layers=[*of], flattened=head.flattened)


def _by(transform: nn.Module) -> Callable[[nn.Module, Head], nn.Module]:
    """One of weightxform's; the flattened Linear is found by a forward of the sample."""

    def make(model: nn.Module, head: Head) -> nn.Module:
        sample = torch.zeros(1, 1, 28, 28, dtype=next(model.parameters()).dtype)
        return wx.Conditioned(model, transform, sample=sample)

    return make


def _map(harmonics: int, analytic: bool) -> Callable[[nn.Module, Head], PlainConditioned]:
    return lambda model, head: _plain(model, head, lambda w: Map(w, 32, harmonics, analytic))


ANALYTIC = Row("analytic", "analytic rotation, no training", 0, 0.0,
               _by(wx.Rotate()), lambda m, h: _plain(m, h, lambda w: Turned()))  # fmt: skip
ROWS = (
    Row("literal", "Linear(w, angle), the question's", 1200, 1e-2,
        lambda m, h: _by_shape(m, h, Literal), lambda m, h: _plain(m, h, Literal)),
    Row("mlp", "per-filter MLP of w, cos, sin", 1200, 3e-3,
        _by(wx.FilterMLP(HIDDEN)), lambda m, h: _plain(m, h, lambda w: PerFilter(w, HIDDEN))),
    Row("learned", "learned A(c), A = 1 at first", 1200, 1e-3,  # at 3e-3 one seed of three stayed at 24 %
        _by(wx.Learned(harmonics=1, init="identity")), _map(1, False)),
    Row("residual", "analytic + learned residual", 600, 1e-3,
        _by(wx.Rotate() + wx.LearnedResidual(harmonics=1)), _map(1, True)),
)  # fmt: skip


@dataclass
class Run:
    """One training. ``net``: called with images and an angle; ``trained``: what the optimizer gets."""

    net: nn.Module
    trained: list[nn.Parameter]
    rate: float
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.trained, self.rate)
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.rate, total_steps=self.steps)

    def step(self, images: Tensor, labels: Tensor, angle: float) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(images, angle), labels)
        loss.backward()
        self.optimizer.step()
        self.cycle.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)


def pair(row: Row, model: nn.Module, head: Head, steps: int, seed: int) -> dict[str, Run]:
    """Ours and plain torch, with copies of ``model``; the same numbers at the start."""
    torch.manual_seed(seed)
    ours, plain = row.ours(copy.deepcopy(model), head), row.plain(copy.deepcopy(model), head)
    mine, theirs = list(ours.transform_parameters()), list(plain.maps.parameters())  # type: ignore[operator]
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            b.copy_(a)
    return {OURS: Run(ours, mine, row.rate, steps), PLAIN: Run(plain, theirs, row.rate, steps)}


def train(runs: Mapping[str, Run], digits: Digits, steps: int, seed: int, progress: Progress | None = None) -> None:
    """The same turned digits for all, one angle for a batch; the order alternates: times are fair."""
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        index = torch.randint(len(digits), (BATCH,), generator=random)
        angle = 2 * math.pi * float(torch.rand((), generator=random, dtype=torch.float64))
        images = turn(digits.images[index], angle)
        for run in [*runs.values()][:: 1 if step % 2 else -1]:
            run.step(images, digits.labels[index], angle)
    if progress is not None:
        progress.advance(f"loss {next(iter(runs.values())).losses[-1]:.3f}")


def median_ms(run: Run) -> float:
    """The first steps pay for what is set up once."""
    return 1e3 * statistics.median(run.seconds[len(run.seconds) // 5 :])
