"""The benchmark's room of conditioned filters on tiny cases: what its judge finds, its baselines, its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightxform.__main__ import main
from weightxform.bench import case as cases
from weightxform.bench import footprint
from weightxform.bench.rooms import filters
from weightxform.bench.rooms.filters import model, plain, targets, truth
from weightxform.bench.rooms.filters.problem import KINDS, FilterCase, FilterProblem, case
from weightxform.bench.rooms.filters.variants import ARC, ATTACHED, GRID, NAMED, OURS, build
from weightxform.registry import OPS

CPU = torch.device("cpu")
OF_KIND = {
    "filter_mlp": ("mlp",), "modulate": ("stylegan2",), "demodulate": ("stylegan2",), "experts": ("mix",),
    "learned": ("matmul",), "rotate_border": ("arc", "grid_sample", "matmul"), **dict.fromkeys(ATTACHED, ("formula",)),
}  # fmt: skip
WARP = "grid_sample", "matmul"


def problem_of(kind: str, frozen: bool = False, k: int = 3) -> FilterProblem:
    return FilterProblem(case(kind, 7, 5, k, 3, *OF_KIND.get(kind, WARP), frozen=frozen), CPU)


def judged(problem: truth.Answering, variant: cases.Variant) -> cases.Answer:
    variant.start()
    return truth.Twice(problem).check(variant, problem.douts)


# the gate


TRAINED = [(kind, frozen) for kind in KINDS for frozen in (False, True) if not (frozen and KINDS[kind].fixed)]


@pytest.mark.parametrize(("kind", "frozen"), TRAINED)
def test_every_variant_is_right(kind: str, frozen: bool) -> None:
    problem = problem_of(kind, frozen)
    variants = list(filters.variants(problem))
    assert len(variants) == 1 + len(OF_KIND.get(kind, WARP))
    for variant in variants:
        answer = judged(problem, variant)
        assert answer.passed, (variant.name, answer)
        still = ["weight"] * frozen + ["params"] * KINDS[kind].fixed
        trained = [t for n, t in problem.tensors.items() if n not in still]
        assert len(variant.raws) == len(trained) == len(problem.tensors) - len(still)
        assert all(map(torch.equal, variant.raws, trained))
        assert all(raw.grad is None for raw in variant.raws)


@pytest.mark.parametrize("count", [1, 3])
def test_every_variant_of_a_model_is_right(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "BATCH", 7)
    monkeypatch.setattr(model, "SIDE", 8)
    problem = filters.problem_of(model.case(count), CPU)
    variants = [v for v in filters.variants(problem) if v.role != "compiled"]
    assert len(variants) == (2 if count == 1 else 5)
    for variant in variants:
        answer = judged(problem, variant)
        assert answer.passed, (variant.name, answer)
        assert [raw.shape for raw in variant.raws] == [(3, 81)] * 7
    banks = 4 * 9 * (3 * 32 + 2 * 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    assert filters.floor(problem) == ((1 + count) * banks, (1 + count) * banks)


def test_every_kind_is_benchmarked() -> None:
    of_weights = [c for c in filters.CASES if isinstance(c, FilterCase)]
    assert {c.kind for c in of_weights} == set(KINDS) == {*OURS, *ATTACHED}
    assert any(c.quick for c in filters.CASES)
    assert {targets.ROTATE, targets.BORDER, targets.DEMODULATE, targets.FILTER_MLP} <= {c.name for c in filters.CASES}
    for chosen in of_weights:
        for name in chosen.plain:
            assert chosen.kind in NAMED[name.removesuffix(" compiled")][1]


Change = Callable[[Tensor, list[Tensor]], Tensor]


def _one_weight(out: Tensor, raws: list[Tensor]) -> Tensor:
    mask = torch.ones_like(out)
    mask.view(-1)[-1] = -1
    return out * mask


def _no_gradient_of_the_condition(out: Tensor, raws: list[Tensor]) -> Tensor:
    (of_weight,) = torch.autograd.grad(out.sum(), [raws[0]], retain_graph=True)
    return out.detach() + (raws[0] - raws[0].detach()) * of_weight


def _half_a_gradient(out: Tensor, raws: list[Tensor]) -> Tensor:
    return out.detach() + 0.5 * (out - out.detach())


def _nan(out: Tensor, raws: list[Tensor]) -> Tensor:
    return out * float("nan")


class _Kept:
    """The first result, with the gradient of the right one."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def __call__(self, out: Tensor, raws: list[Tensor]) -> Tensor:
        self.first = out.detach() if self.first is None else self.first
        return self.first + (out - out.detach())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_one_weight, "wrong values and gradients"), (_no_gradient_of_the_condition, "wrong gradients"),
        (_half_a_gradient, "wrong gradients"), (_nan, "wrong values and gradients"), (_Kept(), "wrong values"),
    ],
)  # fmt: skip
def test_judge_finds(change: Change, reason: str) -> None:
    problem = problem_of("rotate")

    def wrong() -> tuple[Any, list[Tensor]]:
        forward, raws = build(problem, OURS["rotate"])
        return lambda: [change(out, raws) for out in forward()], raws

    assert judged(problem, cases.Variant("wrong", "ours", wrong, "reference")).reason == reason


def test_judge_finds_another_direction() -> None:
    problem = problem_of("rotate")

    def wrong() -> tuple[Any, list[Tensor]]:
        return build(problem, lambda weight, params: OURS["rotate"](weight, -params))

    assert judged(problem, cases.Variant("wrong", "ours", wrong, "reference")).reason == "wrong values and gradients"


# the baselines


def test_closed_form_is_a_bilinear_warp_to_45_degrees_and_no_further() -> None:
    angle = torch.linspace(-1, 1, 41, dtype=torch.float64)
    apart = (plain.arc_matrix(angle) - plain.warp_matrix(plain.rotation(angle), 3, "border")).abs().amax((1, 2))
    within = angle.abs() <= torch.pi / 4
    assert apart[within].max() < 1e-15
    assert apart[~within].min() > 1e-3


def test_demodulated_filters_have_norm_one() -> None:
    out = plain.demodulated(torch.randn(4, 3, 3, 3).double(), torch.randn(2, 3).double())
    assert out.flatten(2).norm(dim=2) == pytest.approx(1)


# the command


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    chosen = case("rotate", 6, 5, 3, 4, "grid_sample"), case("filter_mlp", 6, 5, 3, 4, "mlp", frozen=True)
    room = replace(filters.ROOM, cases=chosen, ops=("warp_matrix_fwd",))
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    arguments = ["filters", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "out.json")]
    assert main(["bench", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    assert "torch, cat + MLP" in printed
    assert "rotation against grid_sample, B = 32, 256x256x3x3: not measured (target >= 3)" in printed
    rotate, mlp = json.loads((tmp_path / "out.json").read_text())["cases"]
    weight, angle, out = 4 * 270, 4 * 4, 4 * 4 * 270
    assert rotate["floor_bytes"] == {"fwd": weight + angle + out, "fwd_bwd": 3 * (weight + angle) + 2 * out}
    layers = 4 * (64 * 11 + 64 + 9 * 64 + 9) + 4 * 4 * 2
    assert mlp["floor_bytes"] == {"fwd": weight + layers + out, "fwd_bwd": 2 * weight + 3 * layers + 2 * out}
    for found in (rotate, mlp):
        for row in found["variants"]:
            assert row["status"] == "ok"
            assert row["fwd"]["min_us"] > 0
            assert row["fwd_bwd"]["vs_eager"] > 0
            assert row["ops"] > 0
            assert row["peak_bytes"] > 0


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Right in the small cases of the op, wrong in the benchmark's."""
    op, right = OPS["filter_warp_bwd"], OPS["filter_warp_bwd"].default

    def wrong(grad: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dweight, da = right(grad, weight, *rest)
        return dweight, da * (1.01 if weight.shape[1] == 54 else 1)

    room = replace(filters.ROOM, cases=(case("rotate", 9, 6, 3, 3, "matmul"),), ops=("filter_warp_bwd",))
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    monkeypatch.setattr(op, "default", wrong)
    assert main(["bench", "--seconds", "0.01", "--threads", "1"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "cases of the ops agree with float64" in printed
    assert "WRONG rotate-9x6x3x3-C3, ours (" in printed
    assert " ms" not in printed


# the verdicts


def _row(name: str, role: str, rounds: list[float], peak: int) -> dict[str, Any]:
    phase = {"rounds_us": rounds, "x_floor": 1.5}
    return {
        "name": name,
        "role": role,
        "main": True,
        "status": "ok",
        "fwd": phase,
        "fwd_bwd": phase,
        "peak_bytes": peak,
    }


def test_verdicts() -> None:
    rotate = {"name": targets.ROTATE, "variants": [_row("ours", "ours", [10, 30], 4), _row(GRID, "eager", [20, 60], 9)]}
    border = {"name": targets.BORDER, "variants": [_row("ours", "ours", [10], 4), _row(ARC, "eager", [50], 9)]}
    border["variants"][1]["status"] = "rejected"
    mlp = {
        "name": targets.FILTER_MLP,
        "variants": [_row("ours", "ours", [10], 4), _row("torch, cat + MLP", "eager", [60], 48)],
    }
    found = {v.what: (v.value, v.met) for v in targets.verdicts([rotate, border, mlp], "cpu")}
    assert len(found) == 10
    where = ", B = 32, 256x256x3x3"
    assert found["rotation against grid_sample" + where] == (2, False)
    assert found["rotation over the traffic floor" + where] == (1.5, True)
    assert found["rotation against ARC's form" + where] == (None, None)
    assert found["per-filter MLP against the plain form, time" + where] == (6, True)
    assert found["per-filter MLP against the plain form, memory" + where] == (12, True)
    assert sum(value is not None for value, _ in found.values()) == 4
    on_gpu = {v.what: (v.value, v.met) for v in targets.verdicts([rotate], "cuda") if v.value is not None}
    assert on_gpu == {
        f"H200: {targets.ROTATE}, forward, over the floor": (1.5, False),
        f"H200: {targets.ROTATE}, forward + backward, over the floor": (1.5, False),
    }
