"""``python -m weightxform``: info, verify, and what is said when something is missing or wrong."""

import json
import subprocess
import sys

import pytest
import torch

import weightxform as wx
from weightxform import bench, demo, verify
from weightxform.__main__ import main
from weightxform.registry import OPS


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "weightxform", *arguments], capture_output=True, text=True)


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"weightxform {wx.__version__}" in done.stdout and f"torch {torch.__version__}" in done.stdout
    for op in OPS:
        assert op in done.stdout


def test_info_as_a_function_and_as_json(capsys):
    info = wx.info()
    assert info.serving["spectral_norm_fwd"]["cpu"] == ("cpu", "compiled kernel")
    assert info.kernels["_C"].startswith("loaded, built with")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"] == info.versions and set(found["serving"]) == set(OPS)


def test_info_names_a_forced_backend():
    with wx.backend("reference"):
        info = wx.info()
    assert info.forced == "reference" and "(forced: reference)" in str(info)
    assert {backend for row in info.serving.values() for backend, _ in row.values()} == {"reference"}


def test_verify():
    done = run("verify", "--device", "cpu", "--op", "spectral_norm_bwd", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "spectral_norm_bwd  cpu        float32" in done.stdout
    assert "spectral_norm_bwd  reference  float32" in done.stdout
    assert f"{2 * len(OPS['spectral_norm_bwd'].cases)} cases passed on cpu" in done.stdout


def test_verify_as_json_with_one_backend(capsys):
    arguments = ["--device", "cpu", "--backend", "cpu", "--op", "*_list", "--dtype", "float64", "--dtype", "float16"]
    assert main(["verify", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and len(found["rows"]) == 6  # three ops, two dtypes
    assert {(row["backend"], row["dtype"]) for row in found["rows"]} == {("cpu", "float64"), ("cpu", "float16")}
    for row in found["rows"]:
        assert row["passed"] == row["cases"] and row["error"] <= row["bound"]


@pytest.fixture
def wrong_kernel(monkeypatch):
    """An op whose kernel is 1 % off, leaves a number unwritten, writes an input, or raises: one for each case."""
    op = OPS["spectral_norm_fwd"]

    def kernel(weight, *rest):
        out, state = op.reference(weight, *rest)
        faults = {
            (33, 65): lambda: out.mul_(1.01),
            (1, 37): lambda: out.flatten().__setitem__(0, float("nan")),
            (37, 1): lambda: weight.add_(1),
            (1, 1): lambda: (_ for _ in ()).throw(RuntimeError("no such kernel image\nmore")),
        }
        faults[tuple(weight.shape)]()
        return out, state

    monkeypatch.setattr(op, "default", kernel)
    names = ("linear", "one_row", "one_column", "one_element")
    monkeypatch.setattr(op, "cases", {name: op.cases[name] for name in names})


def test_verify_fails_where_a_kernel_is_wrong(wrong_kernel, capsys):
    assert main(["verify", "--device", "cpu", "--backend", "cpu", "--op", "*norm_fwd", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "0/4" in out
    assert "spectral_norm_fwd-linear, float32 on cpu: output 0: error 1.00e-02 > " in out
    assert "spectral_norm_fwd-one_row, float32 on cpu: output 0: error inf > " in out
    assert "spectral_norm_fwd-one_column, float32 on cpu: an input was written" in out
    assert "spectral_norm_fwd-one_element, float32 on cpu: raised RuntimeError: no such kernel image" in out


def test_unwritten_memory_is_seen(monkeypatch):
    op = OPS["spectral_norm_fwd"]

    def lazy(weight, *rest):
        return torch.empty_like(weight), op.reference(weight, *rest)[1]

    result = verify.check_case(op, "linear", torch.float32, "cpu", lazy)
    assert not result.passed and result.failure.startswith("output 0: error inf")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "weight_nrom"], "no op has such a name; there are filter_mlp_fwd"),
        (["--device", "cpu", "--backend", "cuda"], "not available for these ops on cpu; there is cpu, reference"),
    ],
)
def test_verify_with_nothing_to_check(capsys, arguments, message):
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_verify_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "verify: --device cuda: torch sees no CUDA GPU\n"


@pytest.mark.gpu
def test_verify_on_a_gpu():
    done = run("verify", "--device", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["verify", "--dtype", "int8"], ["info", "--wrong"]])
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: python -m weightxform" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("demo", demo), ("bench", bench)])
def test_a_missing_extra_is_one_line(capsys, monkeypatch, command, module):
    def without(args):
        import a_package_that_is_not_there  # noqa: F401

    monkeypatch.setattr(module, "run", without)
    assert main([command]) == 2
    needs = f"{command} needs a_package_that_is_not_there: pip install 'weightxform[{command}]'\n"
    assert capsys.readouterr().err == needs


def test_a_missing_module_of_our_own_is_no_missing_extra(monkeypatch):
    def broken(args):
        import weightxform.not_there  # noqa: F401

    monkeypatch.setattr(demo, "run", broken)
    with pytest.raises(ModuleNotFoundError, match=r"weightxform\.not_there"):
        main(["demo"])
