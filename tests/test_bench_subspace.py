"""The benchmark's room of subspaces on tiny cases: what its judge finds, its baselines, its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightxform.__main__ import main
from weightxform.bench import case as cases
from weightxform.bench import footprint, machine, models, suite
from weightxform.bench.rooms import subspace
from weightxform.bench.rooms.subspace import plain, targets, truth
from weightxform.bench.rooms.subspace.problem import PROJECTIONS, STORED, Projecting, SubspaceCase, SubspaceProblem
from weightxform.registry import OPS

CPU = torch.device("cpu")
OF_KIND = {
    "one_hot": ("idx",), "block_hadamard": ("idx", "fastfood"), "sparse": ("idx",), "rademacher": ("stored",),
    "gaussian": ("stored", "stored bfloat16"), "fastfood_global_binomial": ("fastfood",),
    "fastfood_stacked_sign": ("fastfood",), "kronecker": ("kronecker",), "dense": ("stored", "mv"),
    "dense_bfloat16": ("stored",),
}  # fmt: skip


def tiny(kind: str, *names: str, total: int = 999, dim: int = 30) -> SubspaceCase:
    model = partial(models.widths, total, 3)
    tile = 64 if kind == "block_hadamard" else None
    return SubspaceCase(
        f"tiny-{kind}", "subspace", model, None, True, kind=kind, total=total, dim=dim, tile=tile, plain=names
    )


def problem_of(kind: str, **options: Any) -> SubspaceProblem:
    return SubspaceProblem(tiny(kind, *OF_KIND[kind], **options), CPU)


def judged(problem: SubspaceProblem, variant: Projecting) -> cases.Answer:
    variant.start()
    return truth.Windowed(problem).check(variant, problem.douts)


# the gate


@pytest.mark.parametrize("kind", list(OF_KIND))
def test_every_variant_is_right(kind: str) -> None:
    problem = problem_of(kind)
    variants = list(subspace.variants(problem))
    assert len(variants) == 3 + len(OF_KIND[kind])
    for variant in variants:
        answer = judged(problem, variant)
        assert answer.passed, (variant.name, answer)
        assert torch.equal(variant.raws[0], problem.z)
        assert variant.raws[0].grad is None


def test_all_projections_are_benchmarked() -> None:
    assert {c.kind for c in subspace.CASES} == set(PROJECTIONS) | set(STORED) == set(OF_KIND)
    for case in subspace.CASES:
        with torch.device("meta"):
            weights = [layer.weight for layer in cases.layers(case.model())]
        assert len(weights) == 16
        assert sum(w.numel() for w in weights) == case.total


def _broken(problem: SubspaceProblem, change: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> Projecting:
    """Ours in one call, whose weights ``change(thetas, [z])`` makes wrong."""

    def build() -> tuple[Any, list[Tensor]]:
        forward, raws = subspace.one_call(problem)
        return lambda: change(list(forward()), raws), raws

    return Projecting("wrong", "ours", build, "reference", map=problem.map)


def _one_weight(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
    mask = torch.zeros_like(outs[1])
    mask.view(-1)[-1] = 1
    return [outs[0], outs[1] * (1 - 2 * mask), *outs[2:]]


def _scaled(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
    return [out + 1e-4 * raws[0][0] for out in outs]


def _gradient_only(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
    """As the published codes do: the right weights, the gradient times a constant."""
    return [out.detach() + 0.5 * (out - out.detach()) for out in outs]


def _no_gradient(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
    return [out.detach() + torch.zeros((), requires_grad=True) for out in outs]


def _nan(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
    return [out * float("nan") for out in outs]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_one_weight, "wrong values and gradients"), (_scaled, "wrong values and gradients"),
        (_gradient_only, "wrong gradients"), (_no_gradient, "wrong gradients"),
        (_nan, "wrong values and gradients"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard", "dense"])
def test_judge_finds(change: Callable, reason: str, kind: str) -> None:
    problem = problem_of(kind)
    answer = judged(problem, _broken(problem, change))
    assert answer.reason == reason


def test_judge_finds_another_projection() -> None:
    """Of another seed: right in itself, with the right norms, but another P."""
    problem = problem_of("one_hot")
    other = problem.projection.map_of(problem.sizes, problem.case.dim, 6, "global", {})
    members = range(len(problem.weights))

    def build() -> tuple[Any, list[Tensor]]:
        z = plain.leaf(problem)
        return lambda: other.project(z, problem.weights, members), [z]

    assert judged(problem, Projecting("wrong", "ours", build, "reference", map=problem.map)).reason == (
        "wrong values and gradients"
    )
    assert judged(problem, Projecting("right", "ours", build, "reference", map=other)).passed


def test_judge_finds_a_kept_weight() -> None:
    problem = problem_of("one_hot")
    kept: list[Tensor] = []

    def stale(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
        kept.extend(out.detach() for out in outs if len(kept) < len(outs))
        return [k + (out - out.detach()) for k, out in zip(kept, outs, strict=True)]

    assert judged(problem, _broken(problem, stale)).reason == "wrong gradients"


def test_judge_finds_what_lies_outside_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sign of theta in a stretch that no window has, with the gradient of the right P."""
    monkeypatch.setattr(truth, "ROWS", 48)
    problem = problem_of("one_hot", total=30000)
    seen = {w.member for w in truth.windows([w.numel() for w in problem.weights], 48)}
    assert seen == {0, 1, 2}

    def wrong(outs: list[Tensor], raws: list[Tensor]) -> list[Tensor]:
        flip = torch.ones_like(outs[1])
        flip.view(-1)[100:200] = -1
        return [outs[0], outs[1] + ((flip - 1) * (outs[1] - problem.weights[1])).detach(), *outs[2:]]

    windows = [w for w in truth.windows([w.numel() for w in problem.weights], 48) if w.member == 1]
    assert all(w.first + w.size <= 100 or w.first >= 200 for w in windows)
    assert judged(problem, _broken(problem, wrong)).reason == "wrong gradients"
    assert judged(problem, _broken(problem, lambda outs, raws: outs)).passed


def test_windows() -> None:
    assert truth.windows([5, 3], 8) == [(0, 0, 5), (1, 0, 3)]
    found = truth.windows([1000, 10, 3], 120)
    assert {w.member for w in found} == {0, 1, 2}
    for member, n in enumerate((1000, 10)):
        own = [w for w in found if w.member == member]
        assert min(w.first for w in own) == 0
        assert max(w.first + w.size for w in own) == n
        places = [i for w in own for i in range(w.first, w.first + w.size)]
        assert len(places) == len(set(places))


def test_a_fastfood_too_large_for_the_reference_is_checked_by_its_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "WHOLE", 100)
    problem = problem_of("fastfood_global_binomial")
    right = next(v for v in plain.variants(problem))
    assert judged(problem, right).passed
    assert judged(problem, _broken(problem, _gradient_only)).reason == "wrong gradients"


# the baselines


def test_idx_form_is_p() -> None:
    """Against P column by column."""
    problem = problem_of("one_hot", total=200, dim=7)
    tables = plain.tables(problem, problem.map)
    call, its = problem.call()
    p = torch.cat(
        [y.flatten(1) for y in call.forward(torch.eye(7), its, [torch.zeros_like(w) for w in problem.weights])], 1
    )
    idx, scale = (torch.cat([row[0][k].flatten() for row in tables]) for k in range(2))
    assert torch.equal(p.T, torch.nn.functional.one_hot(idx, 7) * scale[:, None])
    assert len(set(scale.sign().tolist())) == 2


def test_hadamard_of_the_baseline() -> None:
    h = plain.hadamard(torch.eye(8))
    assert torch.equal(h @ h.T, 8 * torch.eye(8))
    assert torch.equal(h[1], torch.tensor([1.0, -1] * 4))


# the command


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    chosen = tiny("one_hot", "idx"), tiny("dense", "stored", "mv")
    room = replace(subspace.ROOM, cases=chosen)
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    assert main(["bench", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    assert "torch, z[idx]" in printed
    assert "one_hot, D = 2^24, forward, against theta0 + z[idx] * scale: not measured (target >= 3)" in printed
    first, second = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert first["floor_bytes"] == {"fwd": 8 * 999, "fwd_bwd": 12 * 999}
    assert second["floor_bytes"] == {"fwd": 4 * 999 * 32, "fwd_bwd": 4 * 999 * 63}
    assert first["weights"] == 3
    for case in (first, second):
        for row in case["variants"]:
            assert row["status"] == "ok"
            alone = row["name"].endswith("alone") and row["role"] == "eager"
            for phase in ("fwd", "fwd_bwd") if alone else ("fwd", "fwd_bwd", "step"):
                assert row[phase]["min_us"] > 0
                assert row[phase]["vs_eager"] > 0
            assert ("step" in row) is not alone
            assert row["peak_bytes"] >= 0
    assert first["variants"][3]["step"]["vs_eager"] == 1


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Right in the small cases of the ops, wrong in the benchmark's."""
    op, right = OPS["subspace_fwd"], OPS["subspace_fwd"].default

    def wrong(z: Tensor, c: Tensor | None, theta0: list[Tensor], *rest: Any) -> list[Tensor]:
        outs = right(z, c, theta0, *rest)
        if sum(t.numel() for t in theta0) == 999:
            outs[0].view(-1)[3] += 0.01
        return outs

    room = replace(subspace.ROOM, cases=(tiny("block_hadamard", "idx"),), ops=("subspace_fwd",))
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    monkeypatch.setattr(op, "default", wrong)
    assert main(["bench", "--seconds", "0.01", "--threads", "1"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "cases of the ops agree with float64" in printed
    assert "WRONG tiny-block_hadamard, ours (" in printed
    assert " ms" not in printed


def test_only_the_ops_of_the_chosen_projections_are_gated() -> None:
    def concerned(kind: str, op: str) -> set[str]:
        return {name.split("-")[0] for name in OPS[op].cases if subspace.concerns(tiny(kind), name)}

    assert concerned("one_hot", "subspace_fwd") == {"one_hot"}
    assert concerned("fastfood_stacked_sign", "subspace_bwd") == {"fastfood_stacked_sign"}
    assert concerned("dense_bfloat16", "subspace_fwd") == concerned("one_hot", "subspace_dense_fwd") == set()
    assert concerned("dense", "subspace_dense_fwd") == set(OPS["subspace_dense_fwd"].cases)


def test_a_case_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert 0 < machine.free_memory(CPU) < 1 << 50
    room = replace(subspace.ROOM, cases=(tiny("one_hot"), tiny("dense")), ops=())
    monkeypatch.setattr(cases, "find_rooms", lambda: {room.name: room})
    monkeypatch.setattr(machine, "free_memory", lambda device: room.memory(room.cases[0]))
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    monkeypatch.setattr(suite, "footprint", lambda variant, problem: {})
    assert main(["bench", "--seconds", "0.01", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "tiny-dense is left out: it takes up to" in printed
    assert "tiny-one_hot: 3 weights" in printed


# the verdicts


def _row(name: str, role: str, main: bool, fwd: list[float], both: list[float], floor: float = 2) -> dict[str, Any]:
    phases = {"fwd": fwd, "fwd_bwd": both}
    rows = {phase: {"rounds_us": rounds, "x_floor": floor} for phase, rounds in phases.items()}
    return {"name": name, "role": role, "main": main, "status": "ok", **rows}


def test_verdicts() -> None:
    hot = {
        "name": targets.HOT, "copy": {"fwd": {"rounds_us": [10, 20, 10]}},
        "variants": [
            _row("ours", "ours", True, [14, 28, 40], [45, 90, 45]),
            _row(plain.GATHER, "eager", True, [70, 140], [90, 180]),
        ],
    }  # fmt: skip
    found = {v.what: (v.value, v.met) for v in targets.verdicts([hot], "cpu")}
    assert len(found) == 16
    assert found["one_hot, D = 2^24, forward, over a copy of theta0"] == (1.4, True)
    assert found["one_hot, D = 2^24, forward + backward, over a copy of theta0"] == (4.5, False)
    assert found["one_hot, D = 2^24, forward, against theta0 + z[idx] * scale"] == (5, True)
    assert found["one_hot, D = 2^24, forward + backward, against theta0 + z[idx] * scale"] == (2, False)
    assert sum(value is not None for value, _ in found.values()) == 4
    on_gpu = {v.what: (v.value, v.met) for v in targets.verdicts([hot], "cuda") if v.value is not None}
    assert on_gpu == {f"H200: {targets.HOT}, forward, over a copy (75 % of its bandwidth)": (2, False)}


def test_both_tiles_must_be_there() -> None:
    def case(name: str, time: float) -> dict[str, Any]:
        row = _row("ours", "ours", True, [time], [2 * time])
        return {"name": name, "copy": {"fwd": {"rounds_us": [10.0]}}, "variants": [row]}

    one, other = case(targets.TILES[0], 30), case(targets.TILES[1], 40)
    what = "block_hadamard, D = 2^24, forward, over a copy of theta0"
    assert next(v for v in targets.verdicts([one], "cpu") if v.what == what).met is None
    verdict = next(v for v in targets.verdicts([one, other], "cpu") if v.what == what)
    assert (verdict.value, verdict.met, verdict.worst) == (4, False, f"at {targets.TILES[1]}")
