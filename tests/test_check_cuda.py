"""tools/check_cuda.py: what cuobjdump says is read right, and a kernel over its budget is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parent.parent / "tools" / "check_cuda.py"
INNER, NOTHING = "_ZN2wx3gpu2sn5innerIfEEvPKT_S5_lPd", "_ZN46_GLOBAL__N__114c2080_13_cuda_build_cu_ed904abb7nothingEv"
USAGE = """
Fatbin elf code:
================
arch = {arch}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {function}:
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:{local} CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_cuda", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module
    spec.loader.exec_module(module)
    return module


def usage(function: str = INNER, arch: str = "sm_90", **numbers: int) -> str:
    return USAGE.format(
        function=function, arch=arch, **{"registers": 32, "stack": 0, "shared": 0, "local": 0} | numbers
    )


def test_kernels_are_read_with_their_architecture(tool):
    found = list(tool.parse_usage(usage(arch="sm_80", shared=256) + usage(NOTHING, registers=4)))
    assert found == [tool.Kernel("inner", "sm_80", 32, 0, 256, 0), tool.Kernel("nothing", "sm_90", 4, 0, 0, 0)]


def test_names_without_namespaces(tool):
    assert tool.kernel_name("_Z6kernelPf") == "kernel"
    assert tool.kernel_name("_ZN2wx3gpu2sn13times_columnsI13__nv_bfloat16EEvPKT_") == "times_columns"
    assert tool.kernel_name("_ZN2wx3gpu2sn13forward_phaseIdLi12EEEvi") == "forward_phase<double>"


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ({"registers": 129}, "inner on sm_90: 129 registers, budget 128"),
        ({"stack": 16}, "inner on sm_90: spills or has an array that is indexed at run time: 16 \\+ 0 bytes"),
        ({"local": 8}, "inner on sm_90: spills or has an array that is indexed at run time: 0 \\+ 8 bytes"),
        ({"shared": 50177}, "inner on sm_90: 50177 bytes of shared memory, budget 50176"),
    ],
    ids=str,
)
def test_a_kernel_over_its_budget_is_named(tool, capsys, numbers, fault):
    with pytest.raises(SystemExit, match=fault):
        tool.check_budgets(usage() + usage(**numbers))
    assert "inner   sm_90  2" in capsys.readouterr().out
    tool.check_budgets(usage())


def test_every_budget_can_be_kept(tool):
    for budget in tool.BUDGETS:
        assert 16 <= budget.registers <= 255 and budget.threads * budget.blocks <= 2048 and budget.why
