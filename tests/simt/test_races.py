"""The race check: what it finds in planted faults, and that it finds nothing in the kernels as they are.

``make sanitize`` leaves out each of their barriers, and finds that.
"""

import subprocess
from pathlib import Path

import pytest
from host_build import FIXED_ADDRESSES, RACES, SMALL, build_program, sanitized


@pytest.fixture(scope="session")
def faults() -> Path:
    return build_program("faults", RACES)


def run(faults: Path, fault: str) -> subprocess.CompletedProcess[str]:
    command = [*FIXED_ADDRESSES, str(faults), fault]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_grid_sync", "shuffle_is_no_barrier", "all_write_one"])
def test_planted_races_are_reported(faults, fault):
    done = run(faults, fault)
    assert "SUMMARY: ThreadSanitizer: data race" in done.stderr


def test_correct_kernels_are_not_reported(faults):
    done = run(faults, "correct")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_kernels_have_no_races():
    done = sanitized(SMALL, "cases", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases ran" in done.stdout and "ThreadSanitizer" not in done.stderr
