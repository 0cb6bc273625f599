"""Fine-tuning in a subspace: the adapter is a few kilobytes, and a fresh process computes the same bits with it."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import weightxform as wx

from .pillar import Check, Table
from .progress import Progress
from .subspace_task import LENET, RATE, Digits, accuracy, lenet, rate_for, train

DIM = 750
LARGEST = 8192  # bytes of the adapter
GAIN = 0.75  # of what full fine-tuning gains; four seeds: 0.91 to 0.97


def sha256(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


@dataclass
class Result:
    """Accuracies by model: on digits 0-4, on 5-9, on all."""

    accuracy: dict[str, tuple[float, float, float]]
    sizes: dict[str, int]
    ours: str
    fresh: str


def fine_tune(data: tuple[Digits, Digits], steps: int, seed: int, adapter: Path, progress: Progress) -> Result:
    """LeNet learns digits 0-4, then all ten: in a subspace, and in full."""
    learned, test = data
    progress.start("fine-tuning", 3)
    base = LENET.make(seed)
    train(base, learned.where(learned.labels < 5), steps, RATE, seed)
    progress.advance("pre-trained on 0-4")
    full = train(copy.deepcopy(base), learned, steps, RATE, seed + 1)
    progress.advance("all ten, in full")
    sub = wx.Subspace(copy.deepcopy(base), DIM, seed=seed)
    train(sub, learned, steps, rate_for(steps), seed + 1)
    progress.advance(f"all ten, d={DIM}")

    models: dict[str, nn.Module] = {"pre-trained on 0-4": base, f"adapted, d={DIM}": sub, "fine-tuned in full": full}
    parts: list[Callable[[Tensor], Tensor]] = [lambda y: y < 5, lambda y: y >= 5, lambda y: y >= 0]
    found = {name: _accuracies(model, test, parts) for name, model in models.items()}
    sub.save(adapter)
    with torch.no_grad():
        here = sub(test.images)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        torch.save(base.state_dict(), checkpoint)
        size = checkpoint.stat().st_size
        torch.save(test.images, Path(folder) / "images.pt")
        there = logits_of_fresh_process(folder, adapter)
    sizes = {f"adapted, d={DIM}": adapter.stat().st_size, "fine-tuned in full": size}
    return Result(found, sizes, sha256(here), there)


def _accuracies(model: nn.Module, test: Digits, parts: list[Callable[[Tensor], Tensor]]) -> tuple[float, float, float]:
    first, last, every = (accuracy(model, test.where(part(test.labels))) for part in parts)
    return first, last, every


def logits_of_fresh_process(folder: str, adapter: Path) -> str:
    """The hash of the logits of another process, with the checkpoint and the images in ``folder``.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", __name__, folder, str(adapter), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the process that loads the adapter failed:\n{done.stdout}{done.stderr}")
    return done.stdout.split()[-1]


@torch.no_grad()
def main(folder: str, adapter: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = lenet()
    model.load_state_dict(torch.load(Path(folder) / "checkpoint.pt", weights_only=True))
    sub = wx.Subspace.load(adapter, model)
    print(sha256(sub(torch.load(Path(folder) / "images.pt", weights_only=True))))


def table(result: Result) -> Table:
    rows = [
        (name, *(f"{a:.3f}" for a in accuracies), f"{result.sizes[name]:,}" if name in result.sizes else "")
        for name, accuracies in result.accuracy.items()
    ]
    return Table("LeNet taught five more digits", ("model", "0-4", "5-9", "all", "file, bytes"), rows)


def checks(result: Result) -> list[Check]:
    before, adapted, full = (a[2] for a in result.accuracy.values())
    small, large = result.sizes.values()
    gain = (adapted - before) / (full - before) if full > before else 0.0
    return [
        Check(
            "a fresh process computes the same logits from the adapter, bit for bit",
            result.ours == result.fresh,
            f"sha256 {result.ours[:16]} here, {result.fresh[:16]} there, of 1,000 x 10 logits",
        ),
        Check(
            "the adapter is a few kilobytes",
            small <= LARGEST,
            f"{small:,} bytes (limit {LARGEST:,}); a checkpoint {large:,}",
        ),
        Check(
            "the adapter has learned",
            gain >= GAIN,
            f"accuracy {before:.3f} before, {adapted:.3f} with the adapter, {full:.3f} after full fine-tuning: "
            f"{gain:.0%} of its gain (limit {GAIN:.0%})",
        ),
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
