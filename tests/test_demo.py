"""The demo end to end on few steps, and that it fails when an answer is wrong."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import matplotlib
import pytest
import torch
from rich.console import Console
from torch import nn

from weightxform.__main__ import main
from weightxform.demo import gan, pillar, pillars
from weightxform.demo.pillars import spectral_norm
from weightxform.demo.progress import Progress


def run(folder: Path, *arguments: str) -> int:
    return main(["demo", "--quick", "--output", str(folder), *arguments])


def noise_for_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images, where the pictures do not matter: reading the digits takes longer than the test."""
    monkeypatch.setattr(spectral_norm, "digits", lambda: torch.rand(200, 1, 28, 28) * 2 - 1)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("Agg")
    from matplotlib import image

    assert run(tmp_path, "--pillar", "spectral_norm", "--steps", "40") == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    for line in ("training: 40/40", "Time of a training step", "Largest singular value", "report.md"):
        assert line in printed
    assert all(len(line) <= 120 for line in printed.splitlines())

    report = (tmp_path / "report.md").read_text()
    assert "| unconstrained |" in report
    for name in ("spectral_norm.png", "spectral_norm_drift.png"):
        assert f"]({name})" in report
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[0] > 300
        assert pixels[..., :3].std() > 0.05

    found = json.loads((tmp_path / "report.json").read_text())["spectral_norm"]
    assert len(found["checks"]) == 4
    assert all(found["checks"].values())
    figures = found["figures"]
    assert len(figures["losses"]["weightxform"]) == 40
    assert max(figures["drift"]["float64"]["ours"]) < 1e-11
    assert max(abs(s - 1) for s in figures["sigma"]["weightxform, settled"]) < 1e-3
    assert max(figures["sigma"]["unconstrained"]) > 1.1


def test_seed_decides_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(seed: str) -> list:
        torch.manual_seed(0)
        run(tmp_path, "--pillar", "spectral_norm", "--steps", "2", "--seed", seed)
        return json.loads((tmp_path / "report.json").read_text())["spectral_norm"]["figures"]["losses"]["weightxform"]

    noise_for_digits(monkeypatch)
    first, again, other = losses("3"), losses("3"), losses("4")
    assert first == again
    assert first != other


def test_a_wrong_loss_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Our discriminator's last layer off by one part in a million."""
    right = spectral_norm.contenders

    def wrong(seed: int, dtype: torch.dtype) -> dict[str, gan.Contender]:
        runs = right(seed, dtype)
        with torch.no_grad():
            runs["weightxform"].discriminator[-1].bias.add_(1e-6)
        return runs

    noise_for_digits(monkeypatch)
    monkeypatch.setattr(spectral_norm, "contenders", wrong)
    assert run(tmp_path, "--pillar", "spectral_norm", "--steps", "2") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED losses equal torch's, float64" in printed
    assert "| losses equal torch's, float64 | **fails** |" in (tmp_path / "report.md").read_text()


def test_sigma_checks_fail_without_a_constraint() -> None:
    runs = spectral_norm.contenders(0, torch.float32)
    right, _ = spectral_norm.sigma_checks(runs)
    assert right[1].passed
    runs["weightxform"] = runs["unconstrained"]
    with torch.no_grad():
        gan.weight_layers(runs["unconstrained"].discriminator)[0].weight.mul_(3)
    wrong, found = spectral_norm.sigma_checks(runs)
    assert not any(check.passed for check in wrong)
    assert found["weightxform"] == found["unconstrained"]


def test_sigmas_are_those_of_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Linear(7, 4))
    expected = [float(torch.linalg.svdvals(m.weight.detach().flatten(1))[0]) for m in model]
    assert gan.sigmas(model) == pytest.approx(expected, rel=1e-5)


def test_drift_is_relative_to_the_larger_of_the_losses_and_one() -> None:
    found = spectral_norm.drift([(1.0, 0.0), (4.0, 0.0)], [(1.0, 1e-3), (2.0, 0.0)])
    assert found == pytest.approx([1e-3, 0.5])


def test_a_loss_that_is_not_a_number_fails() -> None:
    runs = spectral_norm.contenders(0, torch.float32)
    for run_ in runs.values():
        run_.losses[:] = [(1.0, 1.0)]
    passed, _ = spectral_norm.same_losses(runs, 1, torch.float32)
    assert passed.passed
    for pair in ((math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)):
        runs["weightxform"].losses[:] = [pair]
        failed, _ = spectral_norm.same_losses(runs, 1, torch.float32)
        assert not failed.passed


def test_an_unknown_pillar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "out", "--pillar", "spectral") == 2
    assert "--pillar must be one of filters, spectral_norm, subspace, got spectral" in capsys.readouterr().out
    assert run(tmp_path / "out", "--steps", "1") == 2
    assert not (tmp_path / "out").exists()


def test_a_pillar_is_found_because_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "toy.py").write_text(
        "from weightxform.demo.pillar import Check, Outcome, Pillar\n"
        "def run(settings, progress):\n"
        "    progress.start('toy', 1)\n"
        "    progress.advance()\n"
        "    return Outcome(checks=[Check('one is one', settings.seed == 7, 'it is')])\n"
        "PILLAR = Pillar('toy', 'A toy', run)\n"
    )
    monkeypatch.setattr(pillars, "__path__", [*pillars.__path__, str(tmp_path)])
    assert list(pillar.find_pillars()) == ["filters", "spectral_norm", "subspace", "toy"]
    assert run(tmp_path / "out", "--pillar", "toy", "--seed", "7") == 0
    assert run(tmp_path / "out", "--pillar", "toy", "--seed", "8") == 1
    assert "one is one" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=terminal, width=100), lines=4) as progress:
        progress.start("training", 8)
        for step in range(8):
            progress.advance(f"loss {step}")
    lines = out.getvalue().splitlines()
    if terminal:
        assert "8/8" in out.getvalue()
        assert "loss 7" in out.getvalue()
    else:
        assert [line.split("  ")[0] for line in lines] == [f"training: {n}/8" for n in (2, 4, 6, 8)]
