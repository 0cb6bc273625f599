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


@pytest.mark.parametrize(
    ("fault", "kernel"),
    [
        ("missing_barrier", "turn_around"),
        ("missing_grid_sync", "next_blocks"),
        ("shuffle_is_no_barrier", "shuffle_is_no_barrier"),
        ("all_write_one", "all_write_one"),
    ],
)
def test_planted_races_are_reported(faults, fault, kernel):
    done = subprocess.run([*FIXED_ADDRESSES, faults, fault], capture_output=True, text=True, timeout=60)
    summaries = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY: ThreadSanitizer: data race")]
    assert summaries and kernel in done.stderr, done.stderr


def test_correct_kernels_are_not_reported(faults):
    done = subprocess.run([*FIXED_ADDRESSES, faults, "correct"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_kernels_have_no_races():
    done = sanitized(SMALL, "cases", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases passed" in done.stdout and "ThreadSanitizer" not in done.stderr
