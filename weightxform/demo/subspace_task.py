"""The task of the subspace pillar: the networks of Li et al. 2018 on MNIST digits, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits import mnist

BATCH = 128
RATE = 1e-3  # of the full model, as published
REACH = 47.0  # rate times steps of the published runs (100 epochs of 60,000 digits), and of ours
FASTEST = 0.1  # but the rate for z is never more
BETAS = (0.9, 0.99)
L2 = 1e-4


@dataclass(frozen=True)
class Published:
    """Li et al. 2018, "Measuring the intrinsic dimension of objective landscapes": the authors' notebook."""

    full: float
    d90: int
    accuracy: Mapping[int, float]


@dataclass(frozen=True)
class Network:
    name: str
    published: Published

    def make(self, seed: int) -> nn.Sequential:
        """The same weights for the same seed: normal, of variance 2 / fan_in; biases are zero."""
        torch.manual_seed(seed)
        model = mlp() if self.name == "MLP" else lenet()
        for layer in layers_of(model):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        return model


def mlp() -> nn.Sequential:
    """784-200-200-10, 199,210 weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def lenet() -> nn.Sequential:
    """44,426 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


# MLP: the mean of three runs.
_MLP = {100: 0.590, 200: 0.758, 300: 0.818, 500: 0.865, 750: 0.894, 1000: 0.907, 1500: 0.925}
_LENET = {100: 0.7626, 200: 0.8642, 290: 0.9012, 500: 0.9392, 1000: 0.9628, 5000: 0.9834}
MLP = Network("MLP", Published(0.9811, 750, MappingProxyType(_MLP)))
LENET = Network("LeNet", Published(0.991, 290, MappingProxyType(_LENET)))


def layers_of(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 28, 28] in [0, 1] and labels [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: Tensor) -> Digits:
        return Digits(self.images[mask], self.labels[mask])


def split(seed: int) -> tuple[Digits, Digits]:
    """4,000 digits to train on and 1,000 to test on, by chance."""
    images, labels = mnist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, last = order.split([len(order) * 4 // 5, len(order) // 5])
    return Digits(images[first] / 255, labels[first]), Digits(images[last] / 255, labels[last])


def rate_for(steps: int) -> float:
    """Of z. Adam moves a number by at most about its rate in a step: fewer steps need a higher one to get as far."""
    return min(REACH / steps, FASTEST)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and the penalty on the weights of the layers, which a Subspace computes."""
    penalty = torch.stack([layer.weight.square().sum() for layer in layers_of(model)]).sum()
    return F.cross_entropy(model(images), labels) + L2 * penalty


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are not faster on two, and far slower where another program has one of the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(model: nn.Module, digits: Digits, steps: int, rate: float, seed: int) -> nn.Module:
    """Adam over what ``model`` has to train."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate, BETAS)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(digits), (BATCH,), generator=random)
        optimizer.zero_grad()
        loss_of(model, digits.images[index], digits.labels[index]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    return float((model(digits.images).argmax(1) == digits.labels).double().mean())
