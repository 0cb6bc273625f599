"""Projections: the promised bits of theta, gradients that repeat, graphs, sizes of more than 32 bits, whole models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from on_gpu import DEVICE, anywhere, assert_near, needs_gpu, same_bits
from test_gpu_graphs import capture
from torch import Tensor, nn

import weightxform as wx
from weightxform.numerics import FLOAT_DTYPES, opmath
from weightxform.registry import OPS
from weightxform.subspace import reference
from weightxform.subspace.plan import Plan, make_plan

ON_GPU = DEVICE.type == "cuda"
SIZES = (70_001, 4096, 30_000, 1, 45) if ON_GPU else (7001, 300, 1, 45)
ELEMENTWISE = "one_hot", "one_hot_unsigned", "sparse", "block_hadamard", "rademacher", "gaussian"


class Call:
    """A plan, and the arguments of its ops."""

    def __init__(
        self, kind: str, sizes: Sequence[int], dim: int, dtype: torch.dtype = torch.float32, **options
    ) -> None:
        if kind == "sparse":
            options["nonzeros"] = 3
        self.plan: Plan = make_plan(kind, {f"t{i:05}": n for i, n in enumerate(sizes)}, dim, 5, **options)
        self.dtype, self.compute, self.sizes = dtype, opmath(dtype), list(sizes)
        self.step: Tensor | None = None

    def draw(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype or self.dtype).to(DEVICE)

    def z(self, seed: int = 0) -> Tensor:
        return self.draw(self.plan.dim, dtype=self.compute, seed=seed)

    def tensors(self, seed: int = 1) -> list[Tensor]:
        return [self.draw(n, seed=seed + i) for i, n in enumerate(self.sizes)]

    def tables(self, device: torch.device, firsts: Sequence[int] | None = None) -> tuple:
        members = list(range(len(self.sizes)))
        step = None if self.step is None else self.step.to(device)
        return members, list(firsts or [0] * len(members)), self.plan.layout, self.plan.factors, step, self.plan.kind

    def forward(self, z: Tensor, theta0: list[Tensor], on: object = OPS["subspace_fwd"]) -> list[Tensor]:
        p, c = self.plan, self.plan.columns_in(self.compute, z.device)
        return on(z, c, theta0, *self.tables(z.device), p.tile, p.strata, p.packed)  # type: ignore[operator]

    def backward(self, grads: list[Tensor], on: object = OPS["subspace_bwd"]) -> Tensor:
        p, device = self.plan, grads[0].device
        c = p.columns_in(opmath(grads[0].dtype), device)
        last = p.dim, 0, p.tile, p.strata, p.packed
        return on(grads, c, *self.tables(device), *last)  # type: ignore[operator]

    def expected(self, z: Tensor, theta0: list[Tensor]) -> list[Tensor]:
        return [t.to(DEVICE) for t in self.forward(z.cpu(), [t.cpu() for t in theta0], reference.forward)]

    def check_backward(self, z_bar: Tensor, grads: list[Tensor]) -> None:
        exact = self.backward([g.cpu().double() for g in grads], reference.backward)
        norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        assert float((z_bar.cpu().double() - exact).norm()) <= 2.0**-20 * norm


@anywhere
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_theta_has_the_bits_of_the_reference_and_gradients_repeat(kind, dtype):
    for dim, tile in ((29, 4096), (3001, 1024)) if kind in reference.TILED else ((60, 4096),):
        call = Call(kind, SIZES, dim, dtype, tile=tile)
        z, theta0, grads = call.z(), call.tensors(), call.tensors(50)
        assert same_bits(call.forward(z, theta0), call.expected(z, theta0))
        z_bar = call.backward(grads)
        call.check_backward(z_bar, grads)
        assert torch.equal(z_bar, call.backward(grads))


@anywhere
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
@pytest.mark.parametrize("tile", [64, 512, 8192, 16384])
def test_tiles_of_every_size(kind, tile):
    call = Call(kind, SIZES, 500, tile=tile)
    z, theta0, grads = call.z(), call.tensors(), call.tensors(50)
    assert same_bits(call.forward(z, theta0), call.expected(z, theta0))
    call.check_backward(call.backward(grads), grads)


@anywhere
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
def test_more_columns_than_one_block_can_sum(kind):
    sizes = (3_000_000, 500_000) if ON_GPU else (60_000, 30_000)
    call = Call(kind, sizes, sizes[0] // 3)
    z, theta0, grads = call.z(), call.tensors(), call.tensors(50)
    assert same_bits(call.forward(z, theta0), call.expected(z, theta0))
    z_bar = call.backward(grads)
    call.check_backward(z_bar, grads)
    assert torch.equal(z_bar, call.backward(grads))


@anywhere
@pytest.mark.parametrize("kind", ["block_hadamard", "rademacher", "fastfood_global_sign"])
def test_very_many_tensors(kind):
    sizes = [1 + (7 * i) % 90 for i in range(3000 if ON_GPU else 200)]
    call = Call(kind, sizes, 40)
    z, theta0, grads = call.z(), call.tensors(), call.tensors(5000)
    assert same_bits(call.forward(z, theta0), call.expected(z, theta0))
    call.check_backward(call.backward(grads), grads)


@anywhere
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
def test_more_elements_than_32_bits_count(kind):
    total = 2**31 + 5000 if ON_GPU else 2**16 + 5000
    call = Call(kind, [total], 1000, torch.bfloat16)
    z = call.z()
    theta0 = torch.zeros((), dtype=torch.bfloat16, device=DEVICE).expand(total)
    (theta,) = call.forward(z, [theta0])
    for first in (0, 2**31 - 6000 if ON_GPU else 2**15, total - 5000):
        plan, part = call.plan, torch.zeros(5000, dtype=torch.bfloat16)
        c = plan.columns_in(torch.float32, "cpu")
        tables = *call.tables(torch.device("cpu"), [first]), plan.tile, plan.strata, plan.packed
        (expected,) = reference.forward(z.cpu(), c, [part], *tables)
        assert torch.equal(theta[first : first + 5000].cpu(), expected)
    # The columns are orthonormal: P' of what P made of z is z, but for the rounding to bfloat16.
    z_bar = call.backward([theta])
    assert_near(z_bar, z.double(), torch.bfloat16)


@needs_gpu
def test_a_number_that_is_expanded_is_not_written_out():
    call = Call("block_hadamard", [1 << 24], 700)
    z, one = call.z(), torch.ones((), device=DEVICE).expand(1 << 24)
    call.forward(z, [one])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.backward([one])
    assert torch.cuda.max_memory_allocated() - before < one.numel() * 4 // 2


@needs_gpu
@pytest.mark.parametrize("kind", [k for k in reference.KINDS if "binomial" not in k])
def test_replays_read_z_theta0_and_the_step_as_they_are_then(kind):
    call = Call(kind, SIZES, 57, tile=1024)
    call.step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    z, theta0, grads = call.z(), call.tensors(), call.tensors(50)
    c = call.plan.columns_in(torch.float32, DEVICE)
    p, tables = call.plan, call.tables(DEVICE)
    last = p.tile, p.strata, p.packed

    def run() -> tuple[list[Tensor], Tensor]:
        thetas = OPS["subspace_fwd"](z, c, theta0, *tables, *last)
        return thetas, OPS["subspace_bwd"](grads, c, *tables, p.dim, 0, *last)

    graph, (thetas, z_bar) = capture(run)
    for seed in range(1, 4):
        call.step.fill_(seed)
        z.copy_(call.z(seed))
        for target, source in zip([*theta0, *grads], [*call.tensors(seed), *call.tensors(60 + seed)], strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(thetas, call.expected(z, theta0))
        call.check_backward(z_bar, grads)


@needs_gpu
@pytest.mark.parametrize("kind", ["one_hot", "sparse", "block_hadamard", "rademacher", "fastfood_stacked_sign"])
def test_nothing_waits_for_the_gpu(kind):
    call = Call(kind, SIZES, 57)
    call.step = torch.ones((), dtype=torch.int64, device=DEVICE)
    z, theta0, grads = call.z(), call.tensors(), call.tensors(50)
    c = call.plan.columns_in(torch.float32, DEVICE)
    p, tables = call.plan, call.tables(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS["subspace_fwd"](z, c, theta0, *tables, p.tile, p.strata, p.packed)
        OPS["subspace_bwd"](grads, c, *tables, p.dim, 0, p.tile, p.strata, p.packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@anywhere
@pytest.mark.parametrize("basis", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [7, 256, 2001])
def test_a_stored_basis_is_its_product(basis, dim):
    generator = torch.Generator().manual_seed(0)
    sizes = (5000, 1, 300)
    e = (torch.randn(sum(sizes), dim, generator=generator) / dim**0.5).to(basis).to(DEVICE)
    z = torch.randn(dim, generator=generator).to(DEVICE)
    theta0 = [torch.randn(n, generator=generator).to(DEVICE) for n in sizes]
    rows = [0, 5000, 5001]
    exact = torch.cat(theta0).double() + e.double() @ z.double()
    found = OPS["subspace_dense_fwd"](z, e, theta0, rows)
    assert_near(torch.cat(found), exact)
    z_bar = OPS["subspace_dense_bwd"](theta0, e, rows, 0)
    assert_near(z_bar, e.double().T @ torch.cat(theta0).double())
    assert torch.equal(z_bar, OPS["subspace_dense_bwd"](theta0, e, rows, 0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 7))


@anywhere
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard", "rademacher", "fastfood"])
def test_a_model_is_trained_as_on_the_cpu(kind):
    here, there = (wx.Subspace(model().to(device), 40, kind) for device in (DEVICE, torch.device("cpu")))
    optimizers = [torch.optim.SGD(sub.parameters(), lr=0.5) for sub in (here, there)]
    for seed in range(4):
        x = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
        for sub, optimizer in zip((here, there), optimizers, strict=True):
            optimizer.zero_grad()
            sub(x.to(sub.coordinates.device)).square().sum().backward()
            optimizer.step()
        assert_near(here.coordinates.detach().cpu(), there.coordinates.detach().double())
    with torch.no_grad():  # from the same coordinates, the same weights bit for bit
        here.coordinates.copy_(there.coordinates)
        assert torch.equal(here.model[0].weight.cpu(), there.model[0].weight)


@needs_gpu
def test_a_training_step_of_a_model_as_a_graph_is_the_eager_one():
    subs = [wx.Subspace(model().to(DEVICE), 40) for _ in range(2)]
    optimizers = [torch.optim.SGD(sub.parameters(), lr=0.1, momentum=0.9) for sub in subs]
    x = torch.randn(6, 30, device=DEVICE)

    def step(i: int) -> None:
        optimizers[i].zero_grad(set_to_none=True)
        subs[i](x).square().sum().backward()
        optimizers[i].step()

    graph, _ = capture(lambda: step(0))
    for _ in range(3):
        step(1)
    for seed in range(4):
        x.copy_(torch.randn(6, 30, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        step(1)
        torch.cuda.synchronize()
        assert_near(subs[0].coordinates.detach(), subs[1].coordinates.detach().double())
