"""A Subspace on two processes gives the outputs and the d gradients of one: DDP and FSDP2."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import weightxform as wx

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

SHARED = {"projection": "block_hadamard"}
OPTIONS: tuple[dict, ...] = (SHARED, {"projection": "one_hot", "structure": "said"}, {"redraw": "step"})


def model(**options: object) -> wx.Subspace:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sub = wx.Subspace(net, 7, **{**SHARED, **options})
    with torch.no_grad():
        sub.coordinates.copy_(torch.linspace(-1, 1, len(sub.coordinates)))
    return sub


def step_of(ours: nn.Module, alone: nn.Module, rank: int, step: int, micro: int, where: str) -> None:
    for m in range(micro):
        x, g = workers.batch(10 * step + m)
        later = ours.no_sync() if m < micro - 1 else nullcontext()
        with later:
            y, e = ours(workers.part(x, rank)), alone(x)
            torch.testing.assert_close(y, workers.part(e, rank), msg=lambda text: f"{where}: {text}")
            y.backward(workers.part(g, rank))
            e.backward(g)


def same_gradients(ours: wx.Subspace, alone: wx.Subspace, where: str) -> None:
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, f"{where}, {name}"
        else:
            expected = q.grad / workers.WORLD
            torch.testing.assert_close(workers.full(p.grad), expected, msg=lambda m, n=name: f"{where}, {n}: {m}")


def ddp(rank: int, folder: str) -> None:
    with workers.group(rank, folder):
        for options in OPTIONS:
            for micro in (1, 3):
                ours, alone = model(**options), model(**options)
                wrapped = DistributedDataParallel(ours)
                reduced: list[int] = []
                wrapped.register_comm_hook(reduced, _counting)
                steppers = workers.optimizers(ours, alone)
                for step in range(3):
                    where = f"ddp {options} micro={micro} step={step}"
                    for stepper in steppers:
                        stepper.zero_grad()
                    step_of(wrapped, alone, rank, step, micro, where)
                    same_gradients(ours, alone, where)
                    for stepper in steppers:
                        stepper.step()
                trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
                assert reduced == [trained] * 3, f"{reduced} numbers were reduced, not {trained} a step"


def _counting(reduced: list[int], bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    reduced.append(bucket.buffer().numel())
    work = torch.distributed.all_reduce(bucket.buffer().div_(workers.WORLD), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


if torch.distributed.is_available():  # DDP wants the types themselves, and not their names
    _counting.__annotations__ |= {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[Tensor]}


def fsdp(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with workers.group(rank, folder):
        mesh = init_device_mesh("cpu", (workers.WORLD,))
        for options in OPTIONS[:2]:
            for units in ("layers", "root"):
                for reshard in (True, False):
                    where = f"fsdp {options} units={units} reshard={reshard}"
                    ours, alone = model(**options), model(**options)
                    if units == "layers":
                        for i in workers.LAYERS:
                            fully_shard(ours.model[i], mesh=mesh, reshard_after_forward=reshard)
                    fully_shard(ours, mesh=mesh, reshard_after_forward=reshard)
                    steppers = workers.optimizers(ours, alone)
                    for step in range(3):
                        for stepper in steppers:
                            stepper.zero_grad()
                        x, g = workers.batch(step)
                        y, e = ours(workers.part(x, rank)), alone(x)
                        torch.testing.assert_close(y, workers.part(e, rank), msg=lambda m, w=where: f"{w}: {m}")
                        y.backward(workers.part(g, rank))
                        e.backward(g)
                        same_gradients(ours, alone, f"{where} step={step}")
                        for stepper in steppers:
                            stepper.step()
                    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
                        torch.testing.assert_close(workers.full(p), q, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    workers.spawn(worker, str(tmp_path))
