"""The benchmark on tiny cases: its gate, and what it times and counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import CPU, LIST, TINY, bench, room_with, without_compile

import weightxform as wx
from weightxform.bench import case as cases
from weightxform.bench import footprint, gate, measure, timing
from weightxform.bench.rooms import spectral_norm
from weightxform.registry import OPS

# the gate


def test_every_variant_is_right_at_the_second_step() -> None:
    for case in (TINY, LIST):
        problem = cases.Problem(case, CPU)
        oracle = gate.Oracle(spectral_norm.oracle, problem)
        for variant in without_compile(problem):
            variant.start()
            answer = oracle.check(variant, problem.douts)
            assert answer.passed, (variant.name, answer)


def test_oracle_against_torch_in_float64() -> None:
    problem = cases.Problem(LIST, CPU)
    weights, grads = spectral_norm.oracle(problem, 2, torch.float64)
    state = spectral_norm.initial_state(problem)
    for i, layer in enumerate(problem.copy_layers().double()):
        torch.nn.utils.parametrizations.spectral_norm(layer)
        layer.parametrizations.weight[0]._u.copy_(state[i][0])
        layer.parametrizations.weight[0]._v.copy_(state[i][1])
        _ = layer.weight
        out = layer.weight
        out.backward(problem.douts[i].double())
        torch.testing.assert_close(out, weights[i])
        torch.testing.assert_close(layer.parametrizations.weight.original.grad, grads[i])


@pytest.mark.parametrize("fault", ["cached", "values", "gradients", "nan", "no gradient"])
def test_gate_finds(fault: str) -> None:
    problem = cases.Problem(TINY, CPU)
    oracle = gate.Oracle(spectral_norm.oracle, problem)

    def build() -> tuple[Any, list]:
        forward, raws = spectral_norm.functional(problem)
        kept: list = []

        def wrong() -> list[torch.Tensor]:
            if fault == "cached" and kept:
                return [raws[0] * (kept[0] / raws[0].detach())]
            (out,) = forward()
            kept.append(out.detach())
            if fault == "values":
                return [out + 1e-4]
            if fault == "gradients":
                return [out.detach() + (raws[0] - raws[0].detach())]
            if fault == "nan":
                return [out * float("nan")]
            if fault == "no gradient":
                return [out.detach() + (torch.zeros((), requires_grad=True))]
            return [out]

        return wrong, raws

    variant = cases.Variant("wrong", "ours", build, "reference")
    variant.start()
    answer = oracle.check(variant, problem.douts)
    assert not answer.passed
    if fault == "values":
        assert answer.reason == "wrong values"
    if fault in ("gradients", "no gradient"):
        assert answer.reason == "wrong gradients"


def test_a_wrong_op_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    op, right = OPS["spectral_norm_bwd"], OPS["spectral_norm_bwd"].default

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        dweight, dgain = right(*args)
        return dweight * 1.0001, dgain

    room_with(monkeypatch, TINY)
    monkeypatch.setattr(op, "default", wrong)
    monkeypatch.setattr(op, "reference_overload", wrong)
    assert bench("--json", tmp_path / "out.json") == 1
    printed = capsys.readouterr().out
    assert "nothing is timed" in printed
    assert "spectral_norm_bwd-linear" in printed
    assert " ms" not in printed
    assert not (tmp_path / "out.json").exists()


def test_a_wrong_variant_of_ours_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = wx.functional.spectral_norm

    def wrong(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple:
        out, *state = right(weight, u, v)
        return out * 1.001, *state

    room_with(monkeypatch, TINY, variants=without_compile)
    monkeypatch.setattr(wx.functional, "spectral_norm", wrong)
    monkeypatch.setattr(footprint, "ours_without_pool", lambda chosen, threads: {})
    assert bench("--json", tmp_path / "out.json") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "WRONG tiny-4x3, ours, functional" in printed
    assert "wrong values and gradients" in printed
    assert " ms" not in printed
    assert not (tmp_path / "out.json").exists()


# what is timed


def test_each_timed_call_computes_the_weight_again() -> None:
    for case in (TINY, LIST):
        problem = cases.Problem(case, CPU)
        for variant in without_compile(problem):
            variant.start()
            before = [raw.detach().clone() for raw in variant.raws]
            seen = []
            for _ in range(3):
                variant.fresh()
                assert all(raw.grad is None for raw in variant.raws)
                seen.append(variant.forward()[0].detach().clone())
            assert not torch.equal(seen[0], seen[1]), variant.name
            assert not torch.equal(seen[1], seen[2]), variant.name
            assert all(map(torch.equal, before, variant.raws))
            variant.forward_backward(problem.douts)
            assert all(raw.grad is not None for raw in variant.raws)


def test_forced_backends_are_forced() -> None:
    problem = cases.Problem(TINY, CPU)
    served = wx.backends.serving("spectral_norm_fwd", "cpu")[0]
    names = {v.name: v for v in without_compile(problem)}
    if served == "reference":
        assert "ours, reference" not in names
        return
    assert names["ours"].backend == served
    variant = names["ours, reference"]
    variant.start()
    seen = []
    op = OPS["spectral_norm_bwd"]
    variant.fresh()
    out = variant.forward()
    assert wx.backends.forced is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "reference_overload", lambda *args: seen.append(args) or op.default(*args))
        variant.forward_backward(problem.douts)
    assert len(seen) == 1
    assert len(out) == 1


def test_interleaving() -> None:
    """Each call once a round at least, prepared each time, in an order that rotates."""
    log: list[str] = []
    calls = [timing.Call(name, partial(log.append, name), partial(log.append, f"prepare {name}")) for name in "abc"]
    times = timing.interleave(calls, CPU, seconds=1e-9, least=6, most=6)
    assert set(times) == set("abc")
    assert all(len(t.rounds) == 6 and 0 < t.fastest <= t.median for t in times.values())
    assert all(log[i] == f"prepare {log[i + 1]}" for i in range(0, len(log), 2))
    firsts = [name for i, name in enumerate(log[1::2]) if i == 0 or log[1::2][i - 1] != name]
    assert [x for x in "".join(firsts).split("abc") if x]  # some round does not begin with a


def test_ratio_is_taken_within_a_round() -> None:
    ours, theirs = timing.Times([1.0, 10.0, 1.0], 1.0), timing.Times([2.0, 20.0, 2.0], 2.0)
    assert theirs.ratio(ours) == 2
    assert timing.Times([3.0, 4.0, 5.0], 3.0).median == 4


def test_a_slow_call_is_in_the_first_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    calls = [timing.Call(name, partial(log.append, name)) for name in ("slow", "quick")]
    monkeypatch.setattr(timing, "clock", lambda call, device: (call.body(), 2.0 if call.name == "slow" else 0.1)[1])
    times = timing.interleave(calls, CPU, seconds=1, least=5, most=5)
    assert (len(times["slow"].rounds), len(times["quick"].rounds)) == (timing.FEW, 5)
    assert log.count("slow") == 1 + timing.FEW
    assert times["slow"].ratio(times["quick"]) == pytest.approx(20)
    assert len(timing.interleave(calls[:1], CPU, seconds=1)["slow"].rounds) == timing.FEW


def test_counts_and_memory() -> None:
    x = torch.randn(512, 512)
    assert measure.count_ops(lambda: (x + 1).t().mul_(2)) == 2
    assert 0 <= measure.peak_bytes(lambda: (x + 1, x + 2), CPU) - 2 * x.nbytes < 256
    assert measure.peak_bytes(lambda: (x + 1).sum(), CPU) < 2 * x.nbytes


def test_floor_is_the_registry_s() -> None:
    problem = cases.Problem(LIST, CPU)
    assert spectral_norm.floor(problem) == (2 * problem.nbytes, 3 * problem.nbytes)


def test_memory_of_the_kernels_with_a_pool() -> None:
    """In another process: outputs and gradients of 1 MiB, which torch's profiler does not see where they are pooled."""
    room = spectral_norm.ROOM
    case = next(c for c in room.cases if c.name == "linear-512x512")
    found = footprint.ours_without_pool([(room, case)], 1)["linear-512x512"]
    assert set(found) >= {"ours", "ours, functional"}
    assert 2 << 20 <= found["ours"] < 2.5 * (1 << 20)


def test_the_models_have_the_weights_of_their_names() -> None:
    expected = {
        "resnet-18": (20, 11.16), "resnet-50": (53, 23.45), "transformer-12": (48, 84.93), "mlp-64x64x64": (64, 0.26),
        "sngan-discriminator": (8, 2.91), "biggan-discriminator": (19, 39.46),
    }  # fmt: skip
    found = {}
    for case in spectral_norm.CASES:
        if case.group == "list":
            with torch.device("meta"):
                model = case.model()
            assert model(torch.empty(case.inputs, device="meta")).shape[0] == case.inputs[0]
            weights = [layer.weight for layer in cases.layers(model)]
            found[case.name] = len(weights), round(sum(w.numel() for w in weights) / 1e6, 2)
    assert {n: c for n, (c, _) in found.items()} == {n: c for n, (c, _) in expected.items()}
    for name, (_, millions) in expected.items():
        assert found[name][1] == pytest.approx(millions, rel=0.01), name
