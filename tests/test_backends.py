"""Which kernel serves a call: forcing, the environment variable, names that are not there, the loading of libraries."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import weightxform as wx
from weightxform import _load, backends
from weightxform.registry import OPS
from weightxform.verify import flatten, make_args

OP = OPS["spectral_norm_fwd"]
ARGS = make_args(OP, "linear", torch.float32, "cpu")


class Called(TorchDispatchMode):
    """Collects the overloads of our ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "weightxform":
            self.names.append(func._overloadname)
        return func(*args, **(kwargs or {}))


def overload_called() -> str:
    with Called() as called:
        OP(*ARGS)
    (name,) = called.names
    return name


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_compiled_kernels_are_there():
    assert _load.status["_C"].startswith("loaded")
    for name in OPS:
        assert backends.available(name)[-1] == "reference"
    assert "cpu" in backends.available()
    assert backends.serving("spectral_norm_fwd", "cpu") == ("cpu", "compiled kernel")
    assert backends.serving("spectral_norm_fwd", "mps") == ("reference", "no kernel for mps")


def test_forcing_nests_and_ends_with_its_block():
    assert overload_called() == "default"
    with wx.backend("reference"):
        assert overload_called() == "reference"
        with wx.backend("cpu"):
            assert overload_called() == "default"
        assert overload_called() == "reference"
        assert backends.serving(OP.name, "cpu")[0] == "reference"
    with pytest.raises(KeyError), wx.backend("reference"):
        raise KeyError
    assert overload_called() == "default"


def test_one_object_may_be_entered_twice():
    reference = wx.backend("reference")
    with reference, reference:
        assert overload_called() == "reference"
    assert overload_called() == "default"


@pytest.mark.parametrize("name", OPS)
def test_forced_reference_gives_the_reference(name):
    op = OPS[name]
    case = next(iter(op.cases))
    args = make_args(op, case, torch.float32, "cpu")
    with wx.backend("reference"):
        forced = op(*args)
    assert all(map(torch.equal, flatten(forced), flatten(op.reference(*args))))


def test_public_functions_obey():
    weight, u, v = ARGS[:3]
    with wx.backend("reference"), Called() as called:
        wx.functional.spectral_norm(weight.requires_grad_(), u, v)[0].backward(torch.randn(33, 65))
    weight.requires_grad_(False)
    assert called.names == ["reference", "reference"]


def test_unknown_and_unavailable_names():
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference, got 'gpu'"):
        wx.backend("gpu")
    missing = next(name for name in backends.NAMES if name not in backends.available())
    with pytest.raises(RuntimeError, match=rf"backend '{missing}' is not available here; available: .*reference"):
        wx.backend(missing)
    assert backends.forced is None


def test_a_forced_backend_without_a_kernel_of_the_op(monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda op, backend: backend == "cpu" and op != OP.name)
    with wx.backend("cpu"), pytest.raises(RuntimeError, match="spectral_norm_fwd: backend 'cpu' has no kernel for it"):
        OP(*ARGS)


def test_tensors_of_another_device(monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda op, backend: True)
    with wx.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced, but the tensors are on 'cpu'"):
        OP(*ARGS)


def test_environment_variable():
    show = "import weightxform.backends as b; print(b.forced)"
    assert python(show, WEIGHTXFORM_BACKEND="reference").stdout == "reference\n"
    assert python(show, WEIGHTXFORM_BACKEND="").stdout == "None\n"
    wrong = python(show, WEIGHTXFORM_BACKEND="fast")
    assert wrong.returncode == 1
    assert "WEIGHTXFORM_BACKEND='fast': backend must be one of cuda, triton, cpu, reference, got 'fast'" in wrong.stderr
