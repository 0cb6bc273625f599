"""A Conditioned on two processes gives the outputs and gradients of one: DDP and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import weightxform as wx

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def model(freeze: bool) -> wx.Conditioned:
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 2))
    net = wx.Conditioned(cnn.double(), wx.Rotate() + wx.LearnedResidual(), flattened={"4": (2, 4, 4)}, freeze=freeze)
    for p in net.transform_parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    count = workers.WORLD * workers.ROWS
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    angles = torch.rand(count, generator=generator, dtype=torch.float64)
    return x, angles, torch.randn(count, 2, generator=generator, dtype=torch.float64)


def train(ours: nn.Module, alone: wx.Conditioned, rank: int, where: str) -> None:
    steppers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05) for m in (ours, alone)]
    for step in range(3):
        x, angles, dy = batch(step)
        for stepper in steppers:
            stepper.zero_grad()
        y, expected = ours(workers.part(x, rank), workers.part(angles, rank)), alone(x, angles)
        torch.testing.assert_close(y, workers.part(expected, rank), msg=lambda m, s=step: f"{where}, step {s}: {m}")
        y.backward(workers.part(dy, rank))
        expected.backward(dy)
        trained = [p for p in ours.parameters() if p.requires_grad]
        for p, q in zip(trained, [q for q in alone.parameters() if q.requires_grad], strict=True):
            torch.testing.assert_close(workers.full(p.grad), q.grad / workers.WORLD, msg=lambda m: f"{where}: {m}")
            q.grad /= workers.WORLD
        for stepper in steppers:
            stepper.step()


def ddp(rank: int, folder: str) -> None:
    with workers.group(rank, folder):
        for freeze in (True, False):
            train(DistributedDataParallel(model(freeze)), model(freeze), rank, f"ddp, freeze={freeze}")


def fsdp(rank: int, folder: str) -> None:
    with workers.group(rank, folder):
        for freeze in (True, False):
            ours = model(freeze)
            fully_shard(ours.model[2])
            fully_shard(ours)
            train(ours, model(freeze), rank, f"fsdp, freeze={freeze}")


@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    workers.spawn(worker, str(tmp_path))
