"""The benchmark's command on tiny cases: its rows, files and arguments, and the verdicts over all cases."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import CPU, LIST, TINY, bench, room_with, without_compile
from rich.console import Console

from weightxform.__main__ import main
from weightxform.bench import case as cases
from weightxform.bench import footprint, report, rooms, suite, summary, tuned
from weightxform.bench.rooms import filters, spectral_norm, subspace

# the command


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With torch.compile, whose form of torch's modules has wrong gradients for a matrix this small."""
    room_with(monkeypatch, TINY)
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {"tiny-4x3": {"ours": 12345}})
    assert bench("--json", tmp_path / "a" / "out.json", "--plot", tmp_path / "plots") == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    for text in ("agree with float64", "A/A", "torch.compile, by hand", "single weights against torch", "not measured"):
        assert text in printed

    result = json.loads((tmp_path / "a" / "out.json").read_text())
    assert set(result) == {"schema", "machine", "gate", "cases", "summary", "noisy"}
    assert result["schema"] == 1
    assert result["machine"]["threads"] == 1
    assert result["gate"]["passed"]
    (case,) = result["cases"]
    keys = {
        "transform",
        "name",
        "group",
        "bytes",
        "weights",
        "rounds",
        "copy_gb_s",
        "floor_bytes",
        "copy",
        "aa",
        "variants",
    }
    assert set(case) == keys
    assert case["floor_bytes"] == {"fwd": 2 * 48, "fwd_bwd": 5 * 48}
    rows = {row["name"]: row for row in case["variants"]}
    for row in rows.values():
        if row["status"] != "ok":
            continue
        for phase in ("fwd", "fwd_bwd"):
            assert set(row[phase]) == {"median_us", "min_us", "rounds_us", "x_floor", "vs_eager", "vs_compiled"}
            assert 0 < row[phase]["min_us"] <= row[phase]["median_us"]
            assert len(row[phase]["rounds_us"]) == case["rounds"]
    assert rows["torch, eager"]["fwd_bwd"]["vs_eager"] == 1
    assert rows["torch.compile, by hand"]["status"] == "ok"
    assert rows["torch.compile, by hand"]["fwd_bwd"]["vs_compiled"] == 1
    assert rows["ours"]["peak_bytes"] == 12345
    assert rows["ours"]["ops"] < rows["torch, eager"]["ops"]

    rejected = rows["torch.compile, modules"]
    assert (rejected["status"], rejected["reason"]) == ("rejected", "wrong gradients")
    assert rejected["value_error"] <= 1 < rejected["gradient_error"]
    assert "fwd" not in rejected
    assert "torch.compile, modules rejected: wrong gradients" in printed

    from matplotlib import image

    for name in ("ratio.png", "roofline.png"):
        assert image.imread(tmp_path / "plots" / name)[..., :3].std() > 0.01


def test_a_list_with_its_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_with(monkeypatch, LIST, variants=without_compile)
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    assert bench("tiny*", "--json", tmp_path / "out.json") == 0
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [row["name"] for row in case["variants"]][:4] == [
        "ours", "ours, ops alone", "ours, ungrouped", "ours, functional",
    ]  # fmt: skip
    assert case["weights"] == 3
    step = case["step"]
    assert set(step["times"]) == {"plain", "ours", "folded", "eager"}
    assert set(step["cost"]) == {"ours", "folded", "eager"}
    assert case["variants"][0]["fwd"]["vs_compiled"] is None


def test_a_training_step_with_compiled_weights_trains_the_same_model() -> None:
    """The step of the compiled baseline updates its own leaves: after it they differ from where they began."""
    problem = cases.Problem(LIST, CPU)
    variant = next(v for v in spectral_norm.variants(problem) if v.name == "ours, functional")
    variant.start()
    before = [raw.detach().clone() for raw in variant.raws]
    from weightxform.bench.step import step_costs

    found = step_costs(spectral_norm.ROOM, problem, variant, 1e-3)
    assert set(found["cost"]) == {"ours", "folded", "eager", "compiled"}
    assert all(raw.grad is not None and raw.grad.abs().sum() > 0 for raw in variant.raws)
    assert all(torch.isfinite(raw).all() for raw in variant.raws)
    assert len(before) == 3


def test_a_baseline_that_cannot_be_built_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: cases.Problem) -> list[cases.Variant]:
        def build() -> Any:
            raise RuntimeError("no compiler here")

        return [*without_compile(problem), cases.Variant("torch.compile, by hand", "compiled", build, "inductor")]

    room = room_with(monkeypatch, TINY, variants=broken)
    found = suite.measure(room, TINY, suite.Options(CPU, 0.01, memory=False))
    row = found["variants"][-1]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no compiler here")
    assert found["variants"][0]["fwd_bwd"]["vs_compiled"] is None


def test_ours_must_not_fail_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: cases.Problem) -> list[cases.Variant]:
        def build() -> Any:
            raise RuntimeError("no kernel")

        return [cases.Variant("ours", "ours", build, "cpu")]

    room = room_with(monkeypatch, TINY, variants=broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        suite.measure(room, TINY, suite.Options(CPU, 0.01))


def test_tuned_allocator_reaches_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line and the environment, without the minutes of the run itself."""
    seen = {}

    def run(command: list[str], env: dict[str, str], **_: Any) -> argparse.Namespace:
        seen["command"], seen["env"] = command, env
        Path(command[command.index("--json") + 1]).write_text('{"cases": [{"name": "resnet-18", "bytes": 3}]}')
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(tuned.subprocess, "run", run)
    assert tuned.rerun(["resnet-18"], 2, 0.5) == {"resnet-18": {"name": "resnet-18", "bytes": 3}}
    assert seen["env"]["MALLOC_TRIM_THRESHOLD_"] == seen["env"]["MALLOC_MMAP_THRESHOLD_"] == str(1 << 32)
    assert seen["env"]["THP_MEM_ALLOC_ENABLE"] == "1"
    arguments = seen["command"][seen["command"].index("bench") :]
    parser = argparse.ArgumentParser()
    from weightxform.bench import add_arguments

    add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    assert (args.names, args.exact, args.main_only, args.threads) == (["resnet-18"], True, True, 2)

    monkeypatch.setattr(
        tuned.subprocess, "run", lambda *a, **k: argparse.Namespace(returncode=1, stdout="", stderr="killed")
    )
    with pytest.raises(RuntimeError, match="killed"):
        tuned.rerun(["resnet-18"], 2, 0.5)


def test_list_and_names(capsys: pytest.CaptureFixture) -> None:
    def listed(*arguments: str) -> list[str]:
        assert main(["bench", "--list", *arguments]) == 0
        return [line.split()[1] for line in capsys.readouterr().out.splitlines()]

    everything = listed()
    by_room = [[c.name for c in room.CASES] for room in (filters, spectral_norm, subspace)]
    assert everything == [name for names in by_room for name in names]
    assert [listed(name) for name in ("filters", "spectral_norm", "subspace")] == by_room
    assert listed("resnet*") == ["resnet-18", "resnet-50"]
    assert listed("--quick", "spectral_norm") == [c.name for c in spectral_norm.CASES if c.quick]
    assert listed("--quick", "resnet-50") == ["resnet-50"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing*"], "no case matches nothing*"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().out


def test_a_room_is_found_because_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from dataclasses import replace\n"
        "from weightxform.bench.rooms.spectral_norm import ROOM\n"
        "ROOM = replace(ROOM, name='toy', cases=())\n"
    )
    monkeypatch.setattr(rooms, "__path__", [*rooms.__path__, str(tmp_path)])
    assert list(cases.find_rooms()) == ["filters", "spectral_norm", "subspace", "toy"]


# the verdicts


def _case(name: str, group: str, mib: float, eager: float, compiled: float | None, floor: float) -> dict[str, Any]:
    row = {"role": "ours", "main": True, "fwd_bwd": {"vs_eager": eager, "vs_compiled": compiled, "x_floor": floor}}
    return {"name": name, "group": group, "bytes": int(mib * (1 << 20)), "variants": [row]}


def test_verdicts() -> None:
    found = spectral_norm.verdicts(
        [
            _case("small", "single", 1, 8, 3, 9.0),
            _case("large", "single", 64, 2, 0.9, 1.5),
            _case("resnet-18", "list", 42, 6, 2, 1.3),
            _case("resnet-50", "list", 89, 4.5, None, 1.3),
        ],
        "cpu",
    )
    by_name = {v.what: (v.value, v.met) for v in found}
    assert by_name["single weights against torch, geometric mean"] == (pytest.approx(4), True)
    assert by_name["single weights against the best torch.compile, geometric mean"] == (pytest.approx(2.7**0.5), True)
    assert by_name["slowest case against torch"] == (2, True)
    assert by_name["slowest case against the best torch.compile"] == (0.9, False)
    assert by_name["over a copy's floor, single weights from 4 MiB, worst"] == (1.5, False)
    assert by_name["ResNet lists, grouped, against torch, worst"] == (4.5, False)
    text = "\n".join(map(str, found))
    assert "slowest case against the best torch.compile: 0.90x (target >= 1, at large) MISSED" in text
    assert "slowest case against torch: 2.00x (target >= 1, at large) met" in text


def test_a_busy_machine_is_named(capsys: pytest.CaptureFixture) -> None:
    found = summary.noisy([{"name": n, "aa": aa} for n, aa in (("a", 1.1), ("b", 0.5), ("c", 1.3), ("d", None))])
    assert found == ["b", "c"]
    report.show_verdicts(Console(width=120), [], found)
    assert "too busy for b, c" in capsys.readouterr().out


def test_verdicts_of_nothing_are_not_met() -> None:
    for verdict in spectral_norm.verdicts([_case("small", "single", 1, 8, None, 2.0)], "cpu"):
        if verdict.value is None:
            assert verdict.met is None
            assert "not measured" in str(verdict)
    assert sum(v.value is None for v in spectral_norm.verdicts([], "cpu")) == 13
