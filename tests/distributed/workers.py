"""What each of two gloo processes runs. Results are compared with one process that sees both halves of the batch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a spawned process has no conftest

from computed_oracle import iterations, linear, randn, set_raw, state_of, unsettle

import weightxform as wx
from weightxform.spectral_norm.repeated import Prepared

WORLD = 2
ROWS = 3  # of the batch, on each rank
LAYERS = (0, 2, 4)


@contextmanager
def group(rank: int, folder: str) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        yield
        gc.collect()  # sharded modules hold work and streams of the group
        dist.barrier()  # a rank that leaves early takes its threads from under the other's last collective
    finally:
        dist.destroy_process_group()


def spawn(worker: Callable, folder: str) -> None:
    mp.spawn(worker, (folder,), nprocs=WORLD)


def model(constrain: bool, cache: bool = True, accumulate_grad: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    if constrain:
        wx.constrain(net, wx.SpectralNorm, accumulate_grad=accumulate_grad)
    else:
        for i in LAYERS:
            net[i].weight = wx.ComputedParameter(net[i].weight, wx.SpectralNorm(cache=cache))
    return unsettle(net)  # type: ignore[return-value]


def batch(step: int, inputs: int = 6, outputs: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs and upstream gradients of both ranks."""
    return randn(WORLD * ROWS, inputs, seed=step), randn(WORLD * ROWS, outputs, seed=100 + step)


def part(x: Tensor, rank: int) -> Tensor:
    return x[rank * ROWS : (rank + 1) * ROWS]


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def same(actual: nn.Module, expected: nn.Module, where: str) -> None:
    """Gradients of the raw tensors, and the states."""
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, f"{where}, {name}"
            continue
        # DDP and FSDP average over the ranks
        torch.testing.assert_close(full(p.grad), q.grad / WORLD, msg=lambda m, n=name: f"{where}, {n}: {m}")
    for (name, a), b in zip(actual.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(full(a), b, msg=lambda m, n=name: f"{where}, {n}: {m}")


def optimizers(*nets: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, (0.2, 0.2 / WORLD), strict=True)]


# DistributedDataParallel


def ddp_steps(rank: int, constrain: bool, options: dict, micro: int = 1, two_forwards: bool = False) -> None:
    ours, alone = model(constrain), model(constrain)
    wrapped = DistributedDataParallel(ours, **options)
    steppers = optimizers(ours, alone)
    where = f"ddp constrain={constrain} {options} micro={micro} two_forwards={two_forwards}"
    for step in range(3):
        for stepper in steppers:
            stepper.zero_grad()
        before = [state_of(ours[i]) for i in LAYERS]
        for m in range(micro):
            x, g = batch(10 * step + m)
            with wrapped.no_sync() if m < micro - 1 else nullcontext():
                y = wrapped(part(x, rank))
                e = alone(x)
                if two_forwards:
                    y, e = y * wrapped(2 * part(x, rank)), e * alone(2 * x)
                torch.testing.assert_close(y, part(e, rank), msg=lambda m: f"{where}: {m}")
                y.backward(part(g, rank))
                e.backward(g)
        same(ours, alone, f"{where} step {step}")
        for i, state in zip(LAYERS, before, strict=True):
            assert iterations(state, state_of(ours[i]), wx.raw(ours[i])) == 1, where
        for stepper in steppers:
            stepper.step()


def ddp_accumulating(rank: int, options: dict) -> None:
    """Micro-batches with gradients that the kernel adds to, against the plain weights of one process."""
    ours, alone = model(True, accumulate_grad=True), model(False)
    wrapped = DistributedDataParallel(ours, **options)
    steppers = optimizers(ours, alone)
    added: list[int] = []
    backward = Prepared.backward

    def watched(self: Prepared, douts: list, which: list, state: Tensor, into: list) -> tuple:
        added.append(len(into))
        return backward(self, douts, which, state, into)

    Prepared.backward = watched  # type: ignore[method-assign]
    try:
        for step in range(4):
            for stepper in steppers:
                stepper.zero_grad(set_to_none=step % 2 == 0)
            for m in range(3):
                x, g = batch(10 * step + m)
                with wrapped.no_sync() if m < 2 else nullcontext():
                    wrapped(part(x, rank)).backward(part(g, rank))
                alone(x).backward(g)
            same(ours, alone, f"accumulating {options} step {step}")
            for stepper in steppers:
                stepper.step()
    finally:
        Prepared.backward = backward  # type: ignore[method-assign]
    assert added.count(len(LAYERS)) >= 6, added


class WithUnused(nn.Module):
    """A layer that the forward does not read; constrained together with those that it does."""

    def __init__(self, constrain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.last = (nn.Linear(6, 6).double() for _ in range(3))
        if constrain:
            wx.constrain(self, wx.SpectralNorm)
        else:
            for layer in (self.used, self.unused, self.last):
                layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
        unsettle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(x).tanh())


def ddp_unused(rank: int, constrain: bool) -> None:
    ours, alone = WithUnused(constrain), WithUnused(constrain)
    wrapped = DistributedDataParallel(ours, find_unused_parameters=True)
    steppers = optimizers(ours, alone)
    for step in range(2):
        for stepper in steppers:
            stepper.zero_grad()
        x, g = batch(step, 6, 6)
        wrapped(part(x, rank)).backward(part(g, rank))
        alone(x).backward(g)
        assert wx.raw(ours.unused).grad is None
        same(ours, alone, f"unused constrain={constrain} step {step}")
        for stepper in steppers:
            stepper.step()
    ours = WithUnused(constrain)
    wrapped = DistributedDataParallel(ours)
    x, g = batch(0, 6, 6)
    wrapped(part(x, rank)).backward(part(g, rank))
    try:
        wrapped(part(x, rank))
    except RuntimeError as e:
        assert "find_unused_parameters" in str(e)
    else:
        raise AssertionError("DDP must complain of an unused weight, as it does for a plain one")


def ddp(rank: int, folder: str) -> None:
    with group(rank, folder):
        for constrain in (False, True):
            ddp_steps(rank, constrain, {})
            ddp_steps(rank, constrain, {}, micro=3)
            ddp_steps(rank, constrain, {}, two_forwards=True)
            ddp_steps(rank, constrain, {"static_graph": True})
            ddp_steps(rank, constrain, {"find_unused_parameters": True, "broadcast_buffers": False})
            ddp_steps(rank, constrain, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4})
            ddp_unused(rank, constrain)
        for options in ({}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}, {"find_unused_parameters": True}):
            ddp_accumulating(rank, options)


# FSDP2


def fsdp_steps(rank: int, units: str, reshard: bool, constrain: bool, cache: bool, micro: int = 1) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    where = f"fsdp units={units} reshard={reshard} constrain={constrain} cache={cache} micro={micro}"
    mesh = init_device_mesh("cpu", (WORLD,))
    ours, alone = model(constrain, cache), model(constrain, cache)
    untouched = [state_of(ours[i]) for i in LAYERS]
    if units == "layers":
        for i in LAYERS:
            fully_shard(ours[i], mesh=mesh, reshard_after_forward=reshard)
    elif units == "some":
        fully_shard(ours[2], mesh=mesh, reshard_after_forward=reshard)
    fully_shard(ours, mesh=mesh, reshard_after_forward=reshard)
    for i, state in zip(LAYERS, untouched, strict=True):
        assert iterations(state, state_of(ours[i]), wx.raw(alone[i])) == 0, f"{where}: wrapping iterates"
        assert isinstance(wx.raw(ours[i]), DTensor)
    steppers = optimizers(ours, alone)
    for step in range(5):
        for stepper in steppers:
            stepper.zero_grad()
        before = [state_of(ours[i]) for i in LAYERS]
        values = [wx.raw(alone[i]).detach().clone() for i in LAYERS]
        for m in range(micro):
            x, g = batch(10 * step + m)
            y, e = ours(part(x, rank)), alone(x)
            torch.testing.assert_close(y, part(e, rank), msg=lambda m, s=step: f"{where} step {s}: {m}")
            y.backward(part(g, rank))
            e.backward(g)
        for (name, p), q in zip(ours.named_parameters(), alone.named_parameters(), strict=True):
            expected = q[1].grad / WORLD
            torch.testing.assert_close(
                full(p.grad), expected, msg=lambda m, n=name, s=step: f"{where} step {s}, {n}: {m}"
            )
        for i, state, value in zip(LAYERS, before, values, strict=True):
            assert iterations(state, state_of(ours[i]), value) == iterations(state, state_of(alone[i]), value), (
                f"{where} step {step}: number of iterations"
            )
            torch.testing.assert_close(state_of(ours[i]), state_of(alone[i]))
        for stepper in steppers:
            stepper.step()
    for (name, p), q in zip(ours.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(full(p), q, msg=lambda m, n=name: f"{where}, {n} at the end: {m}")
    # eval iterates in neither
    before = [state_of(ours[i]) for i in LAYERS]
    x, _ = batch(99)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours.eval()(part(x, rank)), part(alone.eval()(x), rank))
    for i, state in zip(LAYERS, before, strict=True):
        torch.testing.assert_close(state_of(ours[i]), state)


def fsdp_single_units(rank: int, folder: str) -> None:
    with group(rank, folder):
        for units in ("root", "layers", "some"):
            for reshard in (True, False):
                for cache in (True, False):
                    fsdp_steps(rank, units, reshard, constrain=False, cache=cache)


def fsdp_groups(rank: int, folder: str) -> None:
    with group(rank, folder):
        for units in ("root", "layers", "some"):
            for reshard in (True, False):
                fsdp_steps(rank, units, reshard, constrain=True, cache=True)


# Hogwild


def _train(layer: nn.Module, barrier: object, seed: int) -> None:
    torch.set_num_threads(1)
    _ = layer.weight
    barrier.wait()  # type: ignore[attr-defined]
    for step in range(5):
        layer(randn(3, 6, seed=seed + step)).backward(randn(3, 4, seed=seed + 50 + step))
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.1 * p.grad
                p.grad = None


def hogwild(rank: int, folder: str) -> None:
    """Forked children write the shared raw tensor; the parent, whose version counter stands still, must see it."""
    if rank:
        return
    torch.set_num_threads(1)
    layer = linear().eval()
    layer.share_memory()
    with torch.no_grad():
        start = layer.weight.clone()
    raw = wx.raw(layer).detach().clone()
    version = wx.raw(layer)._version
    context = mp.get_context("fork")
    barrier = context.Barrier(3)
    children = [context.Process(target=_train, args=(layer, barrier, 1000 * n)) for n in range(2)]
    for child in children:
        child.start()
    barrier.wait()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert wx.raw(layer)._version == version and not torch.allclose(wx.raw(layer), raw)
    with torch.no_grad():
        now = layer.weight
        u, v = state_of(layer)
        torch.testing.assert_close(now, wx.raw(layer) / (u @ wx.raw(layer) @ v))
    assert not torch.allclose(now, start)
    set_raw(layer, raw)
    with torch.no_grad():
        torch.testing.assert_close(layer.weight, start)
