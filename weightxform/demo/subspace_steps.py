"""A training step in a subspace beside the plain torch wrapper: the same gradient and losses, its time and its memory.

All of them have the same P, a block_hadamard matrix: once implicit, once stored in a ``wx.subspace.Dense``, once stored
in the wrapper.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightxform as wx

from .pillar import Check, Table
from .progress import Progress
from .subspace_plain import PlainSubspace, explicit, gradient_as_asked
from .subspace_task import BATCH, LENET, MLP, RATE, Digits

OURS, STORED, PLAIN, FULL = "block_hadamard", "dense, same P", "plain torch, same P", "full model"
EXACT_DIM, EXACT_STEPS = 290, 10
EXACT_RATE = 0.03  # the losses move
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-5}  # relative; ten times the most that six seeds showed
ISOMETRIC = ("block_hadamard", "one_hot")


@dataclass
class Contender:
    """``trained``: what the optimizer gets, at ``rate``. ``seconds``: of each step."""

    model: nn.Module
    trained: list[nn.Parameter]
    rate: float = RATE
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.trained, self.rate)

    def step(self, images: Tensor, labels: Tensor) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)

    def state_numbers(self) -> int:
        """How many numbers the optimizer keeps for each of Adam's two moments."""
        return sum(state["exp_avg"].numel() for state in self.optimizer.state.values())


def contenders(make: Callable[[], nn.Module], basis: Tensor, seed: int, rate: float = RATE) -> dict[str, Contender]:
    dim = basis.shape[1]
    ours = wx.Subspace(make(), dim, OURS, seed)
    stored = wx.Subspace(make(), dim, wx.subspace.Dense(basis))
    plain, full = PlainSubspace(make(), basis), make()
    return {
        OURS: Contender(ours, [*ours.parameters()], rate),
        STORED: Contender(stored, [*stored.parameters()], rate),
        PLAIN: Contender(plain, [plain.z], rate),
        FULL: Contender(full, [*full.parameters()]),
    }


def coordinates(model: nn.Module) -> Tensor:
    """[d]."""
    return model.coordinates if isinstance(model, wx.Subspace) else model.z  # type: ignore[return-value]


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# the same answer


def gradient_check(kinds: Sequence[str], digits: Digits, seed: int) -> tuple[Check, dict[str, dict[str, float]]]:
    """The first gradient of z equals the wrapper's with the explicit P, for every projection."""
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]
    found: dict[str, dict[str, float]] = {}
    passed = True
    for dtype, limit in ROUNDING.items():
        name = str(dtype).removeprefix("torch.")
        for kind in kinds:
            plain = PlainSubspace(
                LENET.make(seed).to(dtype), explicit(LENET.make(seed).to(dtype), EXACT_DIM, kind, seed)
            )
            ours = wx.Subspace(LENET.make(seed).to(dtype), EXACT_DIM, kind, seed)
            for model in (plain, ours):
                F.cross_entropy(model(images.to(dtype)), labels).backward()
            found.setdefault(name, {})[kind] = apart(coordinates(ours).grad, coordinates(plain).grad)  # type: ignore[arg-type]
        passed = passed and max(found[name].values()) <= limit
    facts = [
        f"{name} within {max(f.values()):.1e} (limit {limit:.0e})"
        for (name, f), limit in zip(found.items(), ROUNDING.values(), strict=True)
    ]
    fact = f"LeNet, d={EXACT_DIM}, {', '.join(kinds)}: {', '.join(facts)}"
    return Check("gradient of z equals that of the plain torch wrapper with P stored", passed, fact), found


def losses_check(digits: Digits, seed: int, steps: int) -> tuple[list[Check], dict[str, list[float]]]:
    """In float64 all three train alike; and the optimizer has state for z only."""

    def make() -> nn.Module:
        return LENET.make(seed).double()

    runs = contenders(make, explicit(make(), EXACT_DIM, OURS, seed), seed, EXACT_RATE)
    train_alike(runs, Digits(digits.images.double(), digits.labels), steps)
    reference = runs[PLAIN].losses
    worst = {
        name: max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(runs[name].losses, reference, strict=True))
        for name in (OURS, STORED)
    }
    limit = ROUNDING[torch.float64]
    facts = ", ".join(f"{name} within {w:.1e}" for name, w in worst.items())
    states = {name: run.state_numbers() for name, run in runs.items()}
    kept = states[OURS] == states[STORED] == EXACT_DIM
    alike = Check(
        "losses equal the plain torch wrapper's, float64",
        max(worst.values()) <= limit,
        f"LeNet, d={EXACT_DIM}, {steps} steps, {reference[0]:.2f} to {reference[-1]:.2f}: {facts} (limit {limit:.0e})",
    )
    only = Check(
        "the optimizer has state for the coordinates only",
        kept,
        f"{states[OURS]:,} numbers in each of Adam's moments; of the full model {states[FULL]:,}",
    )
    return [alike, only], {name: run.losses for name, run in runs.items()}


def isometry_check(kinds: Sequence[str], seed: int) -> tuple[Check, dict[str, float]]:
    """|P z| / |z| by projection, in float64."""
    ratios = {}
    for kind in kinds:
        model = LENET.make(seed).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        sub = wx.Subspace(model, EXACT_DIM, kind, seed)
        with torch.no_grad():
            sub.coordinates.copy_(torch.randn(EXACT_DIM, generator=torch.Generator().manual_seed(seed)))
            size = float(sub.coordinates.norm())
        moved = dict(sub.bake().named_parameters())
        change = torch.cat([(moved[name].detach() - before[name]).flatten() for name in before])
        ratios[kind] = float(change.norm()) / size
    isometric = [kind for kind in kinds if kind in ISOMETRIC]
    off = max(abs(ratios[kind] - 1) for kind in isometric)
    others = ", ".join(f"{k} {r:.4f}" for k, r in ratios.items() if k not in isometric)
    limit = ROUNDING[torch.float64]
    fact = f"|P z| / |z| of {', '.join(isometric)} within {off:.1e} of 1 (limit {limit:.0e}); of {others}"
    return Check("the isometric projections keep lengths", off <= limit, fact), ratios


def trap(seed: int, digits: Digits) -> Table:
    """What becomes of the question's version, beside ours."""
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]
    basis = explicit(LENET.make(seed), EXACT_DIM, OURS, seed)
    lost = gradient_as_asked(LENET.make(seed), basis, lambda out: F.cross_entropy(out, labels), images)
    rows = [("vector_to_parameters(E @ z + theta0, ...)", "None" if lost is None else f"{lost.norm():.4f}")]
    for name, run in contenders(lambda: LENET.make(seed), basis, seed).items():
        if name != FULL:
            F.cross_entropy(run.model(images), labels).backward()
            rows.append((name, f"{coordinates(run.model).grad.norm():.4f}"))  # type: ignore[union-attr]
    return Table("The gradient that z gets", ("model(x) with", "norm of z.grad"), rows)


# time and memory


def train_alike(
    runs: Mapping[str, Contender], digits: Digits, steps: int, progress: Progress | None = None, seed: int = 0
) -> None:
    """The same batches for all; the order rotates: times are fair."""
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        index = torch.randint(len(digits), (BATCH,), generator=random)
        names = [*runs]
        for name in (*names[step % len(names) :], *names[: step % len(names)]):
            runs[name].step(digits.images[index], digits.labels[index])
        if progress is not None:
            progress.advance()


def timing(
    digits: Digits, dim: int, steps: int, seed: int, progress: Progress
) -> tuple[Table, dict[str, dict[str, float]]]:
    """Medians of interleaved steps; peaks of a fresh process."""
    basis = explicit(MLP.make(seed), dim, OURS, seed)
    runs = contenders(lambda: MLP.make(seed), basis, seed)
    progress.start("steps, interleaved", steps)
    train_alike(runs, digits, steps, progress)
    peaks = peaks_of_fresh_process(dim)
    stored = {OURS: 0, STORED: basis.nbytes, PLAIN: basis.nbytes, FULL: 0}
    found = {
        name: {
            # The first steps pay for what is set up once.
            "seconds": statistics.median(run.seconds[len(run.seconds) // 5 :]),
            "bytes_of_P": stored[name],
            "peak_bytes": peaks[name],
            "state_numbers": run.state_numbers(),
        }
        for name, run in runs.items()
    }
    rows = [
        (name, f"{f['seconds'] * 1e3:.2f}", f"{found[PLAIN]['seconds'] / f['seconds']:.1f}", mib(f["bytes_of_P"]),
         mib(f["peak_bytes"]), f"{f['state_numbers']:,}")
        for name, f in found.items()
    ]  # fmt: skip
    header = "weights by", "median ms", "speed, plain = 1", "P, MiB", "peak beside P, MiB", "Adam's moments"
    title = f"MLP, d={dim}: {steps} interleaved steps of {BATCH} digits"
    return Table(title, header, rows), found


def mib(count: float) -> str:
    return "0" if not count else f"{count / 2**20:.2f}"


def peaks_of_fresh_process(dim: int) -> dict[str, int]:
    """What two steps hold at most beside the model and P. Without the pool, whose memory torch does not see.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", __name__, str(dim), str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | {"WEIGHTXFORM_POOL": "0"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of memory failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(dim: str, threads: str) -> None:
    from ..bench.measure import peak_bytes

    torch.set_num_threads(int(threads))
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    total = sum(p.numel() for p in MLP.make(0).parameters())
    peaks = {}
    for name, run in contenders(lambda: MLP.make(0), torch.zeros(total, int(dim)), 0).items():

        def steps(run: Contender = run) -> None:
            run.step(images, labels)
            run.step(images, labels)

        peaks[name] = peak_bytes(steps, torch.device("cpu"))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
