"""Under torch.compile on the GPU: inductor, and with CUDA graphs; the numbers are those of eager over steps."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, KINDS, anywhere, assert_near, batch, build, needs_gpu, write_raws
from torch import nn


def train_beside_eager(model: nn.Module, twin: nn.Module, compiled: nn.Module, steps: int = 5) -> None:
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, twin)]
    for step in range(steps):
        x, g = batch(step)
        outs = []
        for call, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            y = call(x)
            y.backward(g)
            outs.append(y.detach().clone())
            optimizer.step()
        assert_near(outs[0], outs[1])
        for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            assert_near(mine, theirs, torch.float32)
    model.eval(), twin.eval()
    with torch.no_grad():
        assert_near(compiled(x), twin(x))


@anywhere
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_in_one_graph(kind):
    model, twin = build(kind), build(kind)
    train_beside_eager(model, twin, torch.compile(model, fullgraph=True))


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_with_cuda_graphs(kind):
    model, twin = build(kind), build(kind)
    train_beside_eager(model, twin, torch.compile(model, fullgraph=True, mode="reduce-overhead"), steps=8)


@anywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inductor_under_autocast(dtype):
    model, twin = build("group"), build("group")
    compiled = torch.compile(model, fullgraph=True)
    for step in range(3):
        x, g = batch(step)
        outs = []
        for m, call in ((model, compiled), (twin, twin)):
            m.zero_grad()
            write_raws(m, step)  # eager iterates once a value, compiled code at every call
            with torch.autocast(DEVICE.type, dtype):
                y = call(x)
            y.backward(g.to(y.dtype))
            outs.append(y)
        assert_near(outs[0], outs[1].double(), torch.bfloat16)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            assert_near(a, b)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert_near(a.grad, b.grad, torch.bfloat16)
