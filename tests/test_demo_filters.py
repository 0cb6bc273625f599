"""The demo's pillar of conditioned filters: end to end on few steps, and that its checks fail when they should."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import pytest
import torch
from rich.console import Console
from torch import nn

from weightxform.__main__ import main
from weightxform.demo import filters_angle, filters_rows, filters_steps, filters_table
from weightxform.demo.filters_rows import ANALYTIC, OURS, PLAIN, ROWS, pair, train
from weightxform.demo.filters_task import FLAT, POOLED, Digits, Head, accuracies, oracle, turn
from weightxform.demo.pillars import filters
from weightxform.demo.progress import Progress


def quiet() -> Progress:
    return Progress(Console(quiet=True))


def digits(count: int = 64) -> Digits:
    """Ten kinds of noise: learned in a few steps."""
    labels = torch.arange(count) % 10
    return Digits((torch.rand(10, 1, 28, 28)[labels] + 0.3 * torch.rand(count, 1, 28, 28)) / 1.3, labels)


def frozen(head: Head = FLAT) -> nn.Module:
    return head.make(0).requires_grad_(False).eval()


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("Agg")
    from matplotlib import image

    def few(settings: object) -> dict[str, filters_table.Plan]:
        plan = filters_table.Plan([0], 60, 0.005, 40, filters.ALL, 100.0)
        return {FLAT.name: plan, POOLED.name: filters_table.Plan([0, 1], 4, 0.005, 10, ("residual",))}

    monkeypatch.setattr(filters, "plans", few)
    monkeypatch.setattr(filters_table, "LIMITS", {"turned": -100.0, "alike": 20.0, "head": -100.0})
    monkeypatch.setattr(filters_angle, "GAIN", -100.0)
    monkeypatch.setattr(filters_steps, "STEPS", 2)
    assert main(["demo", "--pillar", "filters", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    for line in ("flatten head: accuracy on 40 digits", "The gradient of the question's network", "Memory of a step"):
        assert line in printed
    assert all(len(line) <= 120 for line in printed.splitlines())

    report = (tmp_path / "report.md").read_text()
    assert "| conv.weight.data = net(w, angle) | None |" in report
    assert "| 97.6 |" in report  # the reference
    for name in ("filters_accuracy.png", "filters_digit.png", "filters_bank.png"):
        assert f"]({name})" in report
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.05

    found = json.loads((tmp_path / "report.json").read_text())["filters"]
    assert len(found["checks"]) == 8
    assert all(found["checks"].values())
    heads = found["figures"]["heads"]
    assert set(heads["flatten"]["accuracy"]) == {"frozen", "oracle", "analytic", "headless", *filters.ALL}
    assert [len(angles) for angles in heads["global pooling"]["accuracy"]["residual"]] == [12, 12]
    assert heads["flatten"]["plain"]["analytic"] == heads["flatten"]["accuracy"]["analytic"]
    peaks = found["figures"]["peak_bytes"]
    assert all(peaks[row][who] > 1 << 20 for row in filters.ALL for who in (OURS, PLAIN))


def test_plans() -> None:
    settings = filters.Settings(Path("."), seed=4)
    full = filters.plans(settings)["flatten"]
    assert full.seeds == [4, 5, 6]
    assert [full.steps(row) for row in ROWS] == [1200, 1200, 1200, 600]
    assert full.test == 1000


# the task


def test_turned_as_rot90() -> None:
    image = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(turn(image, math.pi / 2), image.rot90(1, (2, 3)))
    each = turn(image, torch.tensor([0.0, math.pi / 2, math.pi]))
    torch.testing.assert_close(each[0], image[0])
    torch.testing.assert_close(each[2], image[2].rot90(2, (1, 2)))


def test_accuracies_are_of_the_turned_digits() -> None:
    data = digits()

    def classify(images: torch.Tensor, angle: float) -> torch.Tensor:
        right = torch.isclose(images, turn(data.images, angle), atol=1e-6).flatten(1).all(1)
        return torch.eye(10)[torch.where(right & (angle < 3), data.labels, (data.labels + 1) % 10)]

    assert accuracies(classify, data) == [100] * 6 + [0] * 6
    model = frozen()
    quarter = turn(data.images, math.pi / 2)
    torch.testing.assert_close(oracle(model)(quarter, math.pi / 2), model(data.images), atol=1e-4, rtol=1e-4)


# the rows


@pytest.mark.parametrize("head", [FLAT, POOLED], ids=lambda head: head.name)
def test_a_turned_cnn_says_of_a_turned_digit_what_it_said(head: Head) -> None:
    """At a quarter turn nothing is interpolated."""
    model, images = frozen(head), torch.rand(4, 1, 28, 28)
    net = ANALYTIC.ours(head.make(0), head).eval()
    quarter = math.pi / 2
    torch.testing.assert_close(net(turn(images, quarter), quarter), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ours_and_plain_torch_train_alike(row: filters_rows.Row) -> None:
    runs = pair(row, frozen(POOLED).double(), POOLED, 3, 1)
    data = digits()
    train(runs, Digits(data.images.double(), data.labels), 3, 0)
    ours, plain = runs[OURS], runs[PLAIN]
    assert ours.losses == pytest.approx(plain.losses, rel=1e-11)
    assert ours.losses[0] != ours.losses[2]
    assert len(ours.seconds) == 3
    for a, b in zip(ours.trained, plain.trained, strict=True):
        assert a is not b
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_wrong_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = filters_rows.PlainConditioned.forward
    monkeypatch.setattr(filters_steps, "ROWS", ROWS[-1:])
    monkeypatch.setattr(filters_steps, "STEPS", 3)
    data, model = digits(), frozen()
    assert filters_steps.losses_check(model, data, 0)[0].passed
    assert filters_steps.logits_check(model, data).passed
    monkeypatch.setattr(filters_rows.PlainConditioned, "forward", lambda self, x, angle: right(self, x, angle + 1e-3))
    assert not filters_steps.losses_check(model, data, 0)[0].passed
    assert not filters_steps.logits_check(model, data).passed


def test_the_gradient_is_lost_where_data_is_written() -> None:
    table, check = filters_steps.trap(digits(), 0)
    assert check.passed
    assert [row[1] == "None" for row in table.rows] == [True, False, False]


# checks


def result(head: Head, plain: float = 90.0, **scores: float) -> filters_table.Result:
    plan = filters_table.Plan([0, 1], 1, 1, 1, ("residual",), 6.0)
    found = filters_table.Result(head, plan, {name: [[s, s], [s + 2, s]] for name, s in scores.items()})
    found.plain["residual"] = [[plain, plain], [plain + 2, plain]]
    found.ms["residual"] = [(2.0, 3.0), (2.0, 3.0)]
    return found


def passed(found: filters_table.Result) -> dict[str, bool]:
    return {check.name.split(":")[0]: check.passed for check in filters_table.checks([found])}


def test_checks() -> None:
    good = {"frozen": 35.0, "oracle": 95.0, "analytic": 90.0, "headless": 29.0, "residual": 90.0}
    assert all(passed(result(FLAT, **good)).values())
    assert len(passed(result(FLAT, **good))) == 4
    for change, broken in (
        ({"frozen": 70.0}, "turned filters read turned digits"),
        ({"oracle": 99.9}, "with a learned residual"),
        ({"plain": 80.0}, "accuracies of plain torch"),
        ({"headless": 80.0}, "a Linear that reads a map has to turn as well"),
    ):
        found = passed(result(FLAT, **(good | change)))
        assert [name for name, ok in found.items() if not ok] == [broken]


def test_table() -> None:
    found = result(POOLED, frozen=35.0, residual=90.0)
    rows = {row[0]: row[1:] for row in filters_table.table(found).rows}
    assert rows["frozen, no transform"] == ("35.5 ± 0.7", "", "35.2", "", "")
    assert rows["analytic + learned residual"] == ("90.5 ± 0.7", "90.5 ± 0.7", "94.6", "2.0", "1.50")


# no angle given


def test_angles_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bar of light: none of them knows it before."""
    monkeypatch.setattr(filters_angle, "BATCH", 16)
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 12:16, 14:24] = 1
    data = Digits(bar.expand(32, -1, -1, -1), torch.zeros(32, dtype=torch.long))
    random = torch.Generator().manual_seed(0)
    angles = filters_angle.random_angles(32, random)
    for kind in (filters_angle.ADAPTIVE, filters_angle.PLAIN):
        net = filters_angle.estimator(kind, 0)
        filters_angle.train(net, data, 30, 0)
        with torch.no_grad():
            apart = filters_angle.angle_of(net(turn(data.images, angles))) - angles
        assert float((1 - apart.cos()).mean()) < 0.1, kind


def test_estimators_are_of_one_size() -> None:
    sizes = [
        sum(p.numel() for p in filters_angle.estimator(kind, 0).parameters())
        for kind in (filters_angle.ADAPTIVE, filters_angle.PLAIN)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_estimated_angles() -> None:
    found = filters_angle.measure(frozen(), (digits(), digits(20)), 2, 20, 0, quiet())
    assert set(found.accuracy) == {"none: frozen", "given", filters_angle.ADAPTIVE, filters_angle.PLAIN}
    assert all(len(e) == 20 and e.min() >= 0 and e.max() <= 180 for e in found.errors.values())
    found.accuracy |= {"none: frozen": 30.0, filters_angle.ADAPTIVE: 49.0}
    assert not filters_angle.check(found).passed
    found.accuracy[filters_angle.ADAPTIVE] = 51.0
    assert filters_angle.check(found).passed
