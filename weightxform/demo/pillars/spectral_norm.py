"""Pillar 1, constrained weights: a GAN on real digits whose discriminator is spectrally normalised.

The same GAN is trained three times in lockstep: with weightxform, with torch's parametrizations, and with no
constraint; same initial weights, same u and v, same data, same noise. Torch's weights are cached for a step
(``parametrize.cached``), as ours always are, so that both iterate once a step. What can be checked:

- ours and torch compute the same thing. In float64, where rounding is far below anything else, their losses agree step
  by step. A GAN under Adam amplifies differences, so the yardstick is torch against itself with the last bit of the
  initial weights changed, both in float64 and in float32.
- sigma of every constrained layer is 1, by SVD and not by the power iteration that made it so.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import weightxform as wx

from .. import gan
from ..digits import mnist
from ..pillar import Check, Outcome, Pillar, Settings, Table
from ..progress import Progress

BATCH = 64
ITERATIONS = 3  # a step: the weights move fast
EXACT_STEPS, EXACT_BATCH = 10, 16  # in float64
NEAR_STEPS = 3  # of the float32 training that are compared
DRIFT = 10.0  # times the drift of torch from itself, or
ROUNDING = 100.0  # eps, where that is more; and never more than
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-2}  # relative, of the losses
TRAINED = 0.2  # of 1, for sigma: the iteration runs after a weight that moves
SETTLE, SETTLED = 500, 0.01

Losses = list[tuple[float, float]]


def digits() -> Tensor:
    """[5000, 1, 28, 28] in [-1, 1]."""
    return mnist()[0] / 127.5 - 1


def contenders(seed: int, dtype: torch.dtype) -> dict[str, gan.Contender]:
    generator, plain = (model.to(dtype) for model in gan.initial(seed))
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    wx.constrain(ours, wx.SpectralNorm, n_power_iterations=ITERATIONS)
    for layer in gan.weight_layers(theirs):
        parametrizations.spectral_norm(layer, n_power_iterations=ITERATIONS)
    for mine, yours in zip(gan.weight_layers(ours), gan.weight_layers(theirs), strict=True):
        transform = next(m for m in mine.modules() if isinstance(m, wx.SpectralNorm))
        with torch.no_grad():
            yours.parametrizations.weight[0]._u.copy_(transform.u)
            yours.parametrizations.weight[0]._v.copy_(transform.v)
    nudged = gan.nudged(generator), gan.nudged(theirs)
    models: dict[str, Any] = {
        "weightxform": (copy.deepcopy(generator), ours),
        "torch": (copy.deepcopy(generator), theirs),
    }
    models |= {"torch, last bit": nudged, "unconstrained": (generator, plain)}
    once = {name: parametrize.cached if name.startswith("torch") else nullcontext for name in models}
    return {name: gan.Contender(name, g, d, once[name]) for name, (g, d) in models.items()}


class Batches:
    """Real images and two draws of noise for each step, the same for every contender."""

    def __init__(self, images: Tensor, seed: int, size: int) -> None:
        self.images = images
        self.size = size
        self.random = torch.Generator().manual_seed(seed + 1)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(self.images), (self.size,), generator=self.random)
        return self.images[index], self.noise(self.size), self.noise(self.size)

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, gan.LATENT, generator=self.random, dtype=torch.float64).to(self.images.dtype)


def lockstep(
    runs: Sequence[gan.Contender], batches: Batches, steps: int, progress: Progress, only: dict[str, int]
) -> None:
    """Train ``runs`` on the same batches; ``only``: contenders that stop early. The order rotates: times are fair."""
    for step in range(steps):
        batch = batches.next()
        for run in (*runs[step % len(runs) :], *runs[: step % len(runs)]):
            if step < only.get(run.name, steps):
                run.step(*batch)
        d, g = runs[0].losses[-1]
        progress.advance(f"loss D {d:.3f}, G {g:.3f}")


def drift(a: Losses, b: Losses) -> list[float]:
    """For each step the largest difference of the two losses, relative to the larger of the pair and 1.

    Infinite where a loss is not finite.
    """

    def apart(x: float, y: float) -> float:
        return abs(x - y) / max(abs(x), abs(y), 1.0) if math.isfinite(x) and math.isfinite(y) else math.inf

    return [max(apart(x, y) for x, y in zip(pa, pb, strict=True)) for pa, pb in zip(a, b, strict=False)]


def same_losses(runs: dict[str, gan.Contender], steps: int, dtype: torch.dtype) -> tuple[Check, dict[str, list[float]]]:
    """Ours is as near to torch as torch is to itself."""
    ours = drift(runs["weightxform"].losses[:steps], runs["torch"].losses)
    itself = drift(runs["torch, last bit"].losses[:steps], runs["torch"].losses)
    most = max(ours)
    allowed = min(LIMIT[dtype], max(DRIFT * max(itself), ROUNDING * torch.finfo(dtype).eps))
    fact = (
        f"largest relative difference in {steps} steps {most:.1e} (first step {ours[0]:.1e}, limit {allowed:.1e}); "
        f"torch from itself, with the last bit of the weights changed: {max(itself):.1e}"
    )
    name = f"losses equal torch's, {str(dtype).removeprefix('torch.')}"
    return Check(name, most <= allowed, fact), {"ours": ours, "torch": itself}


def sigma_checks(runs: dict[str, gan.Contender]) -> tuple[list[Check], dict[str, list[float]]]:
    """By SVD: as the training left it, and once the power iteration has caught up with a weight that stands still."""
    shown = [name for name in runs if name != "torch, last bit"]
    found = {name: gan.sigmas(runs[name].discriminator) for name in shown}
    checks = [_near_one("as trained", found, TRAINED)]
    for name in ("weightxform", "torch"):
        gan.settle(runs[name].discriminator, SETTLE)
        found[f"{name}, settled"] = gan.sigmas(runs[name].discriminator)
    checks.append(_near_one(f"after {SETTLE} more iterations", found, SETTLED, ", settled"))
    return checks, found


def _near_one(when: str, found: dict[str, list[float]], limit: float, suffix: str = "") -> Check:
    off = {name: max(abs(s - 1) for s in found[name + suffix]) for name in ("weightxform", "torch")}
    fact = ", ".join(f"{name} within {worst:.1e} of 1" for name, worst in off.items())
    fact += f" (limit {limit}); unconstrained up to {max(found['unconstrained']):.2f}"
    return Check(f"sigma of every layer is 1, {when}", max(off.values()) <= limit, fact)


def timing(runs: dict[str, gan.Contender]) -> tuple[Table, dict[str, float]]:
    # The first steps pay for what is set up once.
    median = {
        n: statistics.median(r.seconds[len(r.seconds) // 10 :]) for n, r in runs.items() if n != "torch, last bit"
    }
    plain = median["unconstrained"]
    rows = [
        (name, f"{t * 1e3:.2f}", f"{(t - plain) * 1e3:+.2f}", f"{t / plain - 1:+.1%}", f"{t / median['torch']:.2f}")
        for name, t in median.items()
    ]
    header = "step time", "median ms", "the constraint, ms", "of a step", "over torch"
    return Table("Time of a training step, interleaved", header, rows), median


def picture(path: Path, runs: dict[str, gan.Contender], batches: Batches, steps: int) -> None:
    """Real digits and samples of each generator from the same noise; loss curves below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    noise = batches.noise(48)
    shown = {"real": (batches.images[torch.randint(len(batches.images), (48,), generator=batches.random), 0] + 1) / 2}
    shown |= {name: run.sample(noise) for name, run in runs.items() if len(run.losses) == steps}
    figure, axes = plt.subplot_mosaic(
        [[*shown], ["d"] * len(shown), ["g"] * len(shown)], figsize=(11, 9), layout="constrained"
    )
    for name, images in shown.items():
        sheet = torch.cat([torch.cat(list(row), 1) for row in images.split(6)], 0).numpy()
        axes[name].imshow(sheet, cmap="gray", vmin=0, vmax=1)
        axes[name].set_title(name)
        axes[name].set_axis_off()
    for which, label in enumerate(("discriminator", "generator")):
        ax = axes["dg"[which]]
        for name, run in runs.items():
            if len(run.losses) == steps:
                style = "--" if name == "torch" else "-"
                ax.plot([pair[which] for pair in run.losses], style, label=name, linewidth=1)
        ax.set(xlabel="step", ylabel=f"{label} loss")
        ax.spines[["top", "right"]].set_visible(False)
    axes["d"].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def drift_picture(path: Path, curves: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for (kind, pair), colour in zip(curves.items(), ("#0b6e4f", "#c44536"), strict=True):
        for who, style in (("ours", "-"), ("torch", ":")):
            label = f"{kind}, {'weightxform and torch' if who == 'ours' else 'torch and torch, last bit changed'}"
            ax.plot(range(1, len(pair[who]) + 1), [max(x, 1e-17) for x in pair[who]], style, color=colour, label=label)
    ax.set(yscale="log", xlabel="step", ylabel="relative difference of the losses")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(settings: Settings, progress: Progress) -> Outcome:
    images = digits()
    steps = settings.steps or (300 if settings.quick else 3000)
    near = min(NEAR_STEPS, steps)

    exact_steps = min(EXACT_STEPS, steps)
    progress.start("float64, losses compared", exact_steps)
    exact = contenders(settings.seed, torch.float64)
    del exact["unconstrained"]
    lockstep([*exact.values()], Batches(images.double(), settings.seed, EXACT_BATCH), exact_steps, progress, {})

    progress.start("training", steps)
    runs = contenders(settings.seed, torch.float32)
    batches = Batches(images, settings.seed, BATCH)
    lockstep([*runs.values()], batches, steps, progress, {"torch, last bit": near})

    exact_check, exact_drift = same_losses(exact, exact_steps, torch.float64)
    near_check, near_drift = same_losses(runs, near, torch.float32)
    sigma, sigmas = sigma_checks(runs)
    times, medians = timing(runs)
    layers = gan.weight_layers(runs["unconstrained"].discriminator)
    rows = [(_describe(layer), *(f"{s[i]:.4f}" for s in sigmas.values())) for i, layer in enumerate(layers)]

    samples, curve = settings.output / "spectral_norm.png", settings.output / "spectral_norm_drift.png"
    picture(samples, runs, batches, steps)
    drift_picture(curve, {"float64": exact_drift, "float32": near_drift})
    return Outcome(
        text=[
            f"A GAN on 5,000 MNIST digits, {steps} steps of {BATCH} images. Every weight of the discriminator is "
            "divided by its spectral norm; with weightxform all of them are computed together, in one call.",
        ],
        tables=[times, Table("Largest singular value of each layer's weight, by SVD", ("layer", *sigmas), rows)],
        checks=[exact_check, near_check, *sigma],
        pictures=[
            (samples, "Real digits, samples of the three generators from the same noise, and their losses"),
            (curve, "How far the losses of two runs drift apart: a GAN amplifies any difference in the last bit"),
        ],
        figures={
            "steps": steps, "median_seconds": medians, "sigma": sigmas,
            "losses": {name: r.losses for name, r in runs.items()},
            "drift": {"float64": exact_drift, "float32": near_drift},
        },
    )  # fmt: skip


def _describe(layer: Any) -> str:
    return f"{layer._get_name()} {list(layer.weight.shape)}"


PILLAR = Pillar("spectral_norm", "Constrained weights: a spectrally normalised GAN", run)
