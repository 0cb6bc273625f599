"""A Subspace on two processes gives the outputs and the d gradients of one: DDP and FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import weightxform as wx
from weightxform.subspace.function import Call

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

SHARED = {"projection": "block_hadamard"}
OPTIONS: tuple[dict, ...] = (SHARED, {"projection": "one_hot", "structure": "said"}, {"redraw": "step"})


def model(**options: object) -> wx.Subspace:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2)).double()
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

    with workers.group(rank, folder):
        mesh = init_device_mesh("cpu", (workers.WORLD,))
        for options in OPTIONS[:2]:
            for units in ("layers", "root"):
                for reshard in (True, False):
                    for rows in (True, False):
                        fsdp_steps(rank, mesh, options, units, reshard, rows)


def fsdp_steps(rank: int, mesh: object, options: dict, units: str, reshard: bool, rows: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    where = f"fsdp {options} units={units} reshard={reshard} rows={rows}"
    ours, alone = model(**options), model(**options)
    if rows:
        ours.shard_rows()
    if units == "layers":
        for i in workers.LAYERS:
            fully_shard(ours.model[i], mesh=mesh, reshard_after_forward=reshard)
    fully_shard(ours, mesh=mesh, reshard_after_forward=reshard)
    steppers = workers.optimizers(ours, alone)
    for step in range(3):
        for stepper in steppers:
            stepper.zero_grad()
        x, g = workers.batch(step)
        with computed() as elements:
            y = ours(workers.part(x, rank))
        total = sum(p.numel() for p in alone.model.parameters())
        share = own_rows(alone, rank) if rows and units == "layers" else total
        assert sum(elements) == share, f"{where}: computed {sum(elements)} of {total} elements, not {share}"
        e = alone(x)
        torch.testing.assert_close(y, workers.part(e, rank), msg=lambda m: f"{where}: {m}")
        y.backward(workers.part(g, rank))
        e.backward(g)
        same_gradients(ours, alone, f"{where} step={step}")
        for stepper in steppers:
            stepper.step()
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(workers.full(p), q, msg=lambda m, n=name: f"{where} {n}: {m}")


def own_rows(alone: wx.Subspace, rank: int) -> int:
    """The elements that a rank owns of tensors cut along their first axis."""
    total = 0
    for p in alone.model.parameters():
        each = -(-len(p) // workers.WORLD)
        total += p[rank * each : (rank + 1) * each].numel()
    return total


@contextmanager
def computed() -> Iterator[list[int]]:
    """The numbers of elements of theta that are computed inside."""
    elements: list[int] = []
    forward = Call.forward

    def counting(call: Call, z: Tensor, tables: object, theta0: list[Tensor]) -> list[Tensor]:
        elements.extend(t.numel() for t in theta0)
        return forward(call, z, tables, theta0)

    Call.forward = counting
    try:
        yield elements
    finally:
        Call.forward = forward


@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    workers.spawn(worker, str(tmp_path))
