"""Ours and plain torch train alike, step by step; what a step holds in memory; and the trap of the question."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightxform as wx

from .filters_rows import ANALYTIC, OURS, PLAIN, ROWS, Literal, Run, pair, train
from .filters_task import BATCH, FLAT, Digits, turn
from .pillar import Check, Table
from .subspace_task import one_thread

STEPS = 10
ROUNDING = 1e-9  # of float64 losses
LOGITS = 1e-4  # of float32 logits of about 10


@one_thread()
def losses_check(model: nn.Module, digits: Digits, seed: int) -> tuple[Check, dict[str, list[list[float]]]]:
    """In float64, from the same start, on the same digits. ``model``: with the flatten head."""
    exact = Digits(digits.images.double(), digits.labels)
    found, worst, moved = {}, {}, 0.0
    for row in ROWS:
        runs = pair(row, copy.deepcopy(model).double(), FLAT, STEPS, seed)
        train(runs, exact, STEPS, seed)
        ours, plain = (runs[who].losses for who in (OURS, PLAIN))
        found[row.name] = [ours, plain]
        worst[row.name] = max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(ours, plain, strict=True))
        moved = max(moved, abs(plain[-1] - plain[0]))
    facts = ", ".join(f"{name} {w:.1e}" for name, w in worst.items())
    fact = f"{STEPS} steps, in which they move by up to {moved:.2f}: {facts} (limit {ROUNDING:.0e})"
    return Check("losses equal those of plain torch, float64", max(worst.values()) <= ROUNDING, fact), found


@one_thread()
def logits_check(model: nn.Module, digits: Digits) -> Check:
    """Nothing is trained: the networks are the same function. ``model``: with the flatten head."""
    ours, plain = (make(copy.deepcopy(model), FLAT).eval() for make in (ANALYTIC.ours, ANALYTIC.plain))
    apart, size = 0.0, 0.0
    with torch.no_grad():
        for angle in (0.3, 2.0, 4.4):
            images = turn(digits.images[:100], angle)
            expected = plain(images, angle)
            apart = max(apart, float((ours(images, angle) - expected).abs().max()))
            size = max(size, float(expected.abs().max()))
    fact = f"logits up to {size:.1f} differ by {apart:.1e} (limit {LOGITS:.0e})"
    return Check("the analytic rotation equals grid_sample on the filters", apart <= LOGITS, fact)


@one_thread()
def trap(digits: Digits, seed: int) -> tuple[Table, Check]:
    """The gradient that the question's network gets where it writes ``.data``, and otherwise."""
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    model = FLAT.make(seed)
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    base = conv.weight.detach().clone()
    torch.manual_seed(seed)
    net = Literal(base)
    angle = torch.tensor(0.5)

    conv.weight.data = net(base, angle)
    loss(model(images)).backward()
    lost, taken = net.linear.weight.grad, conv.weight.grad
    assert taken is not None

    model = FLAT.make(seed)
    loss(torch.func.functional_call(model, {"0.weight": net(base, angle)}, (images,))).backward()
    right = net.linear.weight.grad.clone()  # type: ignore[union-attr]
    net.zero_grad()
    loss(wx.Conditioned(model, net, layers=["0"])(images, angle)).backward()
    ours = net.linear.weight.grad
    assert ours is not None
    rows = [
        ("conv.weight.data = net(w, angle)", "None" if lost is None else f"{lost.norm():.4f}", f"{taken.norm():.4f}"),
        ("torch.func.functional_call", f"{right.norm():.4f}", ""),
        ("wx.Conditioned(cnn, net)(images, angle)", f"{ours.norm():.4f}", "frozen"),
    ]
    apart = float((ours - right).norm() / right.norm())
    passed = lost is None and apart <= 1e-5
    fact = f"it differs from that of functional_call by {apart:.1e} of its norm; through .data it is {rows[0][1]}"
    title = "The gradient of the question's network"
    return Table(title, ("weights by", "norm", "of conv.weight"), rows), Check("the gradient arrives", passed, fact)


def peaks_of_fresh_process() -> dict[str, dict[str, int]]:
    """Row -> {ours, plain: the most bytes that a step holds beside what is there}. Without the pool, whose memory torch
    does not see.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", __name__, str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | {"WEIGHTXFORM_POOL": "0"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of memory failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(peaks: dict[str, dict[str, int]]) -> Table:
    rows = [
        (row.title, *(f"{peaks[row.name][who] / 2**20:.2f}" for who in (OURS, PLAIN)))
        for row in ROWS
    ]  # fmt: skip
    return Table(f"Memory of a step of {BATCH} digits, flatten head: peak MiB", ("filters", OURS, PLAIN), rows)


def main(threads: str) -> None:
    from ..bench.measure import peak_bytes

    torch.set_num_threads(int(threads))
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    peaks: dict[str, dict[str, int]] = {}
    for row in ROWS:
        model = FLAT.make(0).requires_grad_(False)
        for who, run in pair(row, model, FLAT, 4, 0).items():

            def step(run: Run = run) -> None:
                run.step(images, labels, 0.3)

            step()
            peaks.setdefault(row.name, {})[who] = peak_bytes(step, torch.device("cpu"))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
