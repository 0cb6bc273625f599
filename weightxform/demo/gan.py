"""A small GAN for 28 x 28 digits, and one training step of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT = 64


def generator() -> nn.Sequential:
    """[n, LATENT] -> [n, 1, 28, 28] in (-1, 1)."""
    return nn.Sequential(
        nn.Linear(LATENT, 128 * 7 * 7, bias=False),
        nn.Unflatten(1, (128, 7, 7)),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, 4, 2, 1),
        nn.Tanh(),
    )


def discriminator() -> nn.Sequential:
    """[n, 1, 28, 28] -> [n, 1]. No batch norm: a constraint on every weight is what keeps it smooth."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(64, 128, 3, 1, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(128, 128, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 1),
    )


@dataclass
class Contender:
    """One GAN in training.

    Attributes:
        once: a context in which the discriminator's weights are computed once; ours need none.
        losses: (discriminator, generator) of every step.
        seconds: what each step took.
    """

    name: str
    generator: nn.Module
    discriminator: nn.Module
    once: Callable[[], AbstractContextManager] = nullcontext
    losses: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizers = [
            torch.optim.Adam(model.parameters(), lr=4e-4, betas=(0.0, 0.9))
            for model in (self.discriminator, self.generator)
        ]

    def step(self, real: Tensor, first: Tensor, second: Tensor) -> None:
        """Train on ``real`` [n, 1, 28, 28] with the noise ``first``, ``second`` [n, LATENT]; hinge losses.

        Both networks are updated from the same weights, so the discriminator's are computed once, for two forwards.
        """
        began = time.perf_counter()
        with torch.no_grad():
            fake = self.generator(first)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.once():
            on_real, on_fake = self.discriminator(torch.cat([real, fake])).chunk(2)
            loss_d = (F.relu(1 - on_real) + F.relu(1 + on_fake)).mean()
            loss_d.backward()
            loss_g = -self.discriminator(self.generator(second)).mean()
            loss_g.backward(inputs=list(self.generator.parameters()))
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.append((loss_d.item(), loss_g.item()))
        self.seconds.append(time.perf_counter() - began)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """[n, 28, 28] in [0, 1]."""
        self.generator.eval()
        images = self.generator(noise)
        self.generator.train()
        return (images[:, 0] + 1) / 2


def initial(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A generator and a discriminator; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return generator(), discriminator()


def weight_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose parameters differ in the last bit: how far two runs drift apart through rounding alone."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return other


def sigmas(model: nn.Module) -> list[float]:
    """The largest singular value, by SVD, of the weight that each layer uses."""
    with torch.no_grad():
        return [float(torch.linalg.matrix_norm(m.weight.flatten(1).double(), 2)) for m in weight_layers(model.eval())]


@torch.no_grad()
def settle(model: nn.Module, iterations: int) -> None:
    """Power iterations with the weights as they are: each read of a weight after a write makes one."""
    model.train()
    for _ in range(iterations):
        for p in model.parameters():
            p[:0].zero_()
        for layer in weight_layers(model):
            layer.weight  # noqa: B018
