"""No angle is given: a network that estimates it, of convolutions whose kernels turn by themselves."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightxform as wx

from .filters_rows import ANALYTIC
from .filters_task import BATCH, FLAT, Digits, turn
from .pillar import Check, Table
from .progress import Progress
from .subspace_task import one_thread

RATE = 3e-3
KERNELS = 2
GAIN = 20.0  # points of accuracy
NEAR = math.radians(20)
ADAPTIVE, PLAIN = "AdaptiveRotatedConv2d", "Conv2d"


def estimator(kind: str, seed: int) -> nn.Sequential:
    """[n, 1, 28, 28] -> [n, 2], (cos, sin) times any length. The plain one has as many weights, and more channels."""
    torch.manual_seed(seed)
    width = 32 if kind == ADAPTIVE else 58
    middle: nn.Module = nn.Conv2d(16, width, 5, padding=2)
    if kind == ADAPTIVE:
        middle = wx.AdaptiveRotatedConv2d(16, width, 5, padding=2, n_kernels=KERNELS, max_angle=None)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 7 * 7, 2),
    )  # fmt: skip


def random_angles(count: int, random: torch.Generator) -> Tensor:
    return 2 * math.pi * torch.rand(count, generator=random)


@one_thread()
def train(model: nn.Module, digits: Digits, steps: int, seed: int) -> nn.Module:
    """On digits, each turned by an angle of its own."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(digits), (BATCH,), generator=random)
        angles = random_angles(BATCH, random)
        optimizer.zero_grad()
        found = model(turn(digits.images[index], angles))
        F.mse_loss(found, torch.stack([angles.cos(), angles.sin()], 1)).backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def angle_of(found: Tensor) -> Tensor:
    return torch.atan2(found[:, 1], found[:, 0])


@dataclass
class Result:
    """``errors``: kind -> degrees, of each digit; ``accuracy``: what gives the angle -> percent of the digits."""

    errors: dict[str, Tensor]
    sizes: dict[str, int]
    accuracy: dict[str, float]
    steps: int


@one_thread()
def measure(
    model: nn.Module, data: tuple[Digits, Digits], steps: int, test: int, seed: int, progress: Progress
) -> Result:
    """``model``: a frozen CNN with the flatten head, whose filters then turn by the estimated angle of each digit."""
    learned, digits = data
    digits = Digits(digits.images[:test], digits.labels[:test])
    angles = random_angles(test, torch.Generator().manual_seed(seed + 1))
    images = turn(digits.images, angles)
    turned = ANALYTIC.ours(copy.deepcopy(model), FLAT).eval()

    def accuracy(logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == digits.labels).double().mean())

    found = Result({}, {}, {}, steps)
    progress.start("the angle estimated", 2)
    with torch.no_grad():
        found.accuracy["none: frozen"] = accuracy(model(images))
        found.accuracy["given"] = accuracy(turned(images, angles))
    for kind in (ADAPTIVE, PLAIN):
        net = train(estimator(kind, seed), learned, steps, seed)
        with torch.no_grad():
            estimate = angle_of(net(images))
            found.accuracy[kind] = accuracy(turned(images, estimate))
        apart = torch.remainder(estimate - angles + math.pi, 2 * math.pi) - math.pi
        found.errors[kind] = apart.abs().rad2deg()
        found.sizes[kind] = sum(p.numel() for p in net.parameters())
        progress.advance(f"{kind}: {found.errors[kind].median():.0f} degrees off")
    return found


def table(found: Result) -> Table:
    rows = []
    for name, percent in found.accuracy.items():
        cells = ["", "", ""]
        if name in found.errors:
            errors = found.errors[name]
            near = 100 * float((errors <= math.degrees(NEAR)).double().mean())
            cells = [f"{found.sizes[name]:,}", f"{errors.median():.1f}", f"{near:.0f}"]
        rows.append((name, *cells, f"{percent:.1f}"))
    header = "angle by", "weights", "median error, degrees", "within 20 degrees, %", "digits right, %"
    count = len(next(iter(found.errors.values())))
    title = f"Each of {count} digits at an angle of its own, which is not given ({found.steps} steps)"
    return Table(title, header, rows)


def check(found: Result) -> Check:
    """Filters turned by an estimate read turned digits better than the frozen CNN does."""
    frozen, estimated = found.accuracy["none: frozen"], found.accuracy[ADAPTIVE]
    fact = f"{estimated:.1f} % by the angles of {ADAPTIVE}, {frozen:.1f} % frozen (limit +{GAIN:g})"
    return Check("digits are read where no angle is given", estimated >= frozen + GAIN, fact)


def figures(found: Result) -> dict:
    medians = {name: float(errors.median()) for name, errors in found.errors.items()}
    return {"median_degrees": medians, "weights": found.sizes, "accuracy": found.accuracy, "steps": found.steps}
