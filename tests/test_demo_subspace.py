"""The demo's pillar of training in a subspace: end to end on few steps, and that its checks fail when they should."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import weightxform as wx
from weightxform.__main__ import main
from weightxform.demo import subspace_adapter, subspace_curve, subspace_steps
from weightxform.demo.pillars import subspace
from weightxform.demo.progress import Progress
from weightxform.demo.subspace_plain import PlainSubspace, explicit, gradient_as_asked
from weightxform.demo.subspace_task import LENET, MLP, Digits, accuracy, layers_of, rate_for, split, train


def digits(count: int = 256) -> Digits:
    """Ten kinds of noise: learned in a few steps."""
    labels = torch.arange(count) % 10
    return Digits((torch.rand(10, 1, 28, 28)[labels] + 0.3 * torch.rand(count, 1, 28, 28)) / 1.3, labels)


def quiet() -> Progress:
    return Progress(Console(quiet=True))


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("Agg")
    from matplotlib import image

    monkeypatch.setattr(subspace, "DIM", 40)
    monkeypatch.setattr(subspace, "KINDS", ("block_hadamard", "one_hot"))
    monkeypatch.setattr(subspace_steps, "EXACT_DIM", 32)
    arguments = ["--quick", "--pillar", "subspace", "--steps", "60", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    for line in ("MLP: accuracy on 1,000 digits", "d_int90", "The gradient that z gets", "LeNet taught five more"):
        assert line in printed
    assert all(len(line) <= 120 for line in printed.splitlines())

    report = (tmp_path / "report.md").read_text()
    assert "| vector_to_parameters(E @ z + theta0, ...) | None |" in report
    assert "](subspace.png)" in report
    assert "Li et al." in report
    pixels = image.imread(tmp_path / "subspace.png")
    assert pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.05

    found = json.loads((tmp_path / "report.json").read_text())["subspace"]
    assert len(found["checks"]) == 9
    assert all(found["checks"].values())
    figures = found["figures"]
    assert figures["curves"]["MLP"]["total"] == 199_210
    assert figures["curves"]["LeNet"]["total"] == 44_426
    assert max(figures["gradient"]["float64"].values()) < 1e-13
    assert figures["timing"]["block_hadamard"]["bytes_of_P"] == 0
    assert figures["timing"]["plain torch, same P"]["bytes_of_P"] == 199_210 * 40 * 4
    assert all(f["peak_bytes"] > 199_210 * 4 for f in figures["timing"].values())
    assert figures["timing"]["block_hadamard"]["state_numbers"] == 40
    assert figures["timing"]["full model"]["state_numbers"] == 199_210
    here, there = figures["adapter"]["sha256"]
    assert here == there
    assert len(here) == 64
    size = figures["adapter"]["bytes"]["adapted, d=750"]
    assert 750 * 4 < size == (tmp_path / "subspace_adapter.safetensors").stat().st_size


def test_curve_is_decided_by_the_seed() -> None:
    def measured(seed: int) -> subspace_curve.Curve:
        plan = subspace_curve.Plan(6, [seed], (20, 300), (300,), ("block_hadamard", "one_hot"), 0.5)
        return subspace_curve.measure(LENET, plan, data, quiet())

    data = digits(), digits()
    first, again, other = measured(1), measured(1), measured(2)
    assert first == again
    assert first.scores != other.scores
    assert set(first.scores["block_hadamard"]) == {20, 300}
    assert set(first.scores["one_hot"]) == {300}


def curve(**scores: dict[int, list[float]]) -> subspace_curve.Curve:
    return subspace_curve.Curve(MLP, 199_210, [0.9, 1.0], scores, [100, 200])


def test_curve_check() -> None:
    assert subspace_curve.check(curve(a={1: [0.5], 2: [0.84], 3: [0.83], 4: [0.86]})).passed
    assert not subspace_curve.check(curve(a={1: [0.5], 2: [0.85]})).passed  # 0.855 is the threshold
    assert not subspace_curve.check(curve(a={1: [0.5], 2: [0.95], 3: [0.9]})).passed
    assert not subspace_curve.check(curve(a={1: [0.95], 2: [0.94]})).passed
    assert not subspace_curve.check(curve(a={1: [0.5], 2: [0.9]}, b={1: [0.5], 2: [0.7]})).passed


def test_curve_tables() -> None:
    found = curve(block_hadamard={100: [0.5, 0.6], 750: [0.9, 0.9]}, sparse={750: [0.8, 0.9]})
    rows = {row[0]: row[1:] for row in subspace_curve.accuracy_table(found).rows}
    assert rows["100"] == ("0.550 ± 0.050", "", "0.590")
    assert rows["750"] == ("0.900 ± 0.000", "0.850 ± 0.050", "0.894")
    assert rows["1500"] == ("", "", "0.925")
    assert rows["full, 199,210"] == ("0.950 ± 0.050", "", "0.981")
    (row,) = subspace_curve.dimension_table([found]).rows
    assert row == ("MLP", "199,210", "0.950 ± 0.050", "0.855", "150 (100-200)", "0.08%", "0.981", "750")
    found.d90[0] = None
    assert subspace_curve.dimension_table([found]).rows[0][4] == "not reached"


def test_search_goes_on_from_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy d/1000: 90 % of 0.8 is at 720, and no d is trained twice."""
    tried = []
    monkeypatch.setattr(subspace_curve, "train", lambda model, *_: model)
    monkeypatch.setattr(subspace_curve, "accuracy", lambda model, _: tried.append(model.dim) or model.dim / 1000)
    plan = subspace_curve.Plan(6, [0], (), (), (), 0.01)
    data = digits(), digits()
    known = {200: 0.2, 500: 0.5, 1000: 1.0}
    found = subspace_curve._search(MLP, plan, data, 0, 0.8, known)
    assert found is not None
    assert 720 <= found <= 728
    assert len(tried) == len(set(tried) - set(known)) > 3
    assert subspace_curve._search(MLP, plan, data, 0, 0.8, {200: 0.2}) is None


def test_explicit_is_the_projection() -> None:
    basis = explicit(small().double(), 7, "block_hadamard", 4, block=3)
    assert basis.shape == (59, 7)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7).double())
    model = small().double()
    sub = wx.Subspace(model, 7, "block_hadamard", 4)
    z = torch.randn(7).double()
    with torch.no_grad():
        sub.coordinates.copy_(z)
    start = nn.utils.parameters_to_vector(small().double().parameters())
    moved = nn.utils.parameters_to_vector(sub.bake().parameters())
    torch.testing.assert_close(moved, start + basis @ z)


def test_the_plain_wrapper_works_and_the_question_does_not() -> None:
    basis, x, y = torch.randn(59, 7), torch.randn(8, 6), torch.randn(8, 4)
    plain, ours = PlainSubspace(small(), basis), wx.Subspace(small(), 7, wx.subspace.Dense(basis))
    z = torch.randn(7)
    with torch.no_grad():
        plain.z.copy_(z)
        ours.coordinates.copy_(z)
    torch.testing.assert_close(ours(x), plain(x))
    for model in (plain, ours):
        F.mse_loss(model(x), y).backward()
    torch.testing.assert_close(ours.coordinates.grad, plain.z.grad)
    assert gradient_as_asked(small(), basis, lambda out: F.mse_loss(out, y), x) is None


def test_a_wrong_projection_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = explicit
    monkeypatch.setattr(subspace_steps, "EXACT_DIM", 8)
    check, found = subspace_steps.gradient_check(("block_hadamard", "sparse"), digits(), 0)
    assert check.passed
    assert set(found["float32"]) == {"block_hadamard", "sparse"}
    monkeypatch.setattr(subspace_steps, "explicit", lambda *a: right(*a) * (1 + 1e-3))
    check, _ = subspace_steps.gradient_check(("block_hadamard",), digits(), 0)
    assert not check.passed
    (alike, only), _ = subspace_steps.losses_check(digits(), 0, 3)
    assert not alike.passed
    assert only.passed


def test_a_projection_that_stretches_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace_steps, "ISOMETRIC", ("block_hadamard", "rademacher"))
    check, ratios = subspace_steps.isometry_check(("block_hadamard", "rademacher"), 0)
    assert not check.passed
    assert ratios["rademacher"] == pytest.approx(1, abs=0.05)


def test_adapter_in_a_fresh_process(tmp_path: Path) -> None:
    data = digits(512), digits(100)
    found = subspace_adapter.fine_tune(data, 5, 0, tmp_path / "a.safetensors", quiet())
    assert found.ours == found.fresh
    assert found.sizes["adapted, d=750"] == (tmp_path / "a.safetensors").stat().st_size
    torch.save(LENET.make(9).state_dict(), tmp_path / "checkpoint.pt")
    torch.save(data[1].images, tmp_path / "images.pt")
    with pytest.raises(RuntimeError, match="is for other weights"):
        subspace_adapter.logits_of_fresh_process(str(tmp_path), tmp_path / "a.safetensors")


def test_adapter_checks() -> None:
    def passed(after: float = 0.9, size: int = 4000, fresh: str = "ab") -> list[bool]:
        accuracy = {"before": (1.0, 0.0, 0.5), "adapted": (1.0, 0.8, after), "full": (1.0, 1.0, 1.0)}
        sizes = {"adapted": size, "full": 180_000}
        return [c.passed for c in subspace_adapter.checks(subspace_adapter.Result(accuracy, sizes, "ab", fresh))]

    assert passed() == [True, True, True]
    assert passed(fresh="ac") == [False, True, True]
    assert passed(size=9000) == [True, False, True]
    assert passed(after=0.7) == [True, True, False]


def test_task() -> None:
    for network, total in ((MLP, 199_210), (LENET, 44_426)):
        model = network.make(5)
        assert sum(p.numel() for p in model.parameters()) == total
        for layer in layers_of(model):
            fan_in = layer.weight[0].numel()
            assert float(layer.weight.detach().var()) == pytest.approx(2 / fan_in, rel=0.3)
            assert not layer.bias.any()
        assert all(map(torch.equal, model.parameters(), network.make(5).parameters()))
    assert rate_for(47_000) == pytest.approx(1e-3)
    assert rate_for(20) == 0.1


def test_training_moves_only_the_coordinates_and_learns() -> None:
    data = digits()
    model = LENET.make(0)
    before = [p.detach().clone() for p in model.parameters()]
    sub = wx.Subspace(model, 200, seed=0)
    threads = torch.get_num_threads()
    first = accuracy(sub, data)
    train(sub, data, 40, 0.1, 0)
    assert accuracy(sub, data) > max(0.6, first + 0.3)
    assert all(map(torch.equal, before, sub.unwrap().parameters()))
    assert torch.get_num_threads() == threads


def test_split_has_every_digit_once() -> None:
    first, last = split(0)
    assert (len(first), len(last)) == (4000, 1000)
    labels = torch.cat([first.labels, last.labels])
    assert labels.bincount().tolist() == [500] * 10
    assert not torch.equal(last.labels, split(1)[1].labels)
    assert torch.equal(last.images, split(0)[1].images)
    assert float(first.images.max()) == 1
