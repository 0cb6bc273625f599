"""All that sanitizers can say about the CUDA kernels, with g++ and with clang if it is there: ``make sanitize``."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

from host_build import HERE, MEMORY, ROOT, SMALL, compile_for_host, compiler, missing_barriers, sanitized

DTYPES = ("float32", "bfloat16", "float16", "float64")


def compilers() -> list[str]:
    """The C++ compiler, and the newest clang."""
    clangs = [path.name for folder in os.get_exec_path() for path in Path(folder).glob("clang++*")]
    clangs = [name for name in clangs if re.fullmatch(r"clang\+\+(-\d+)?", name) and shutil.which(name)]
    newest = sorted(clangs, key=lambda name: int((name + "-0").split("-")[1]))[-1:]
    return list(dict.fromkeys([" ".join(compiler()), *newest]))


def cases(*flags: str) -> str:
    done = sanitized(flags, "cases", *DTYPES)
    return "" if done.returncode == 0 and "Sanitizer" not in done.stderr else done.stdout + done.stderr


def barriers() -> str:
    """Every barrier is missed when it is not there, or its line says ``// spare: `` and why it stays."""
    with ThreadPool(2) as pool:
        halves = pool.map(lambda part: missing_barriers(*SMALL, part=part, parts=2), range(2))
    found = halves[0] | halves[1]
    silent = {place: kind for place, (kind, reported) in found.items() if not reported}
    spare = {f"{path.name}:{i}" for path in ROOT.glob("csrc/*/*.cuh") for i in lines_with(path, "// spare: ")}
    print(f"  {len(found)} barriers, {len(found) - len(silent)} reported when they are missing", flush=True)
    wrong = [f"{place}: no race without this {kind}" for place, kind in silent.items() if place not in spare]
    return "\n".join(wrong) if found else "no kernel reached a barrier"


def lines_with(path: Path, text: str) -> list[int]:
    return [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]


def planted() -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        str(HERE),
        "-k",
        "planted or correct",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


CHECKS: dict[str, Callable[[], str]] = {
    "out of bounds and undefined behaviour: every case": lambda: cases(*MEMORY),
    "races: every case": lambda: cases(*SMALL),
    "races: every barrier left out, one at a time": barriers,
    "planted faults": planted,
}


def main() -> int:
    failures = 0

    def run(title: str) -> tuple[str, str, float]:
        started = time.monotonic()
        return title, CHECKS[title](), time.monotonic() - started

    for cxx in compilers():
        os.environ["CXX"] = cxx
        print(f"{cxx}:", flush=True)
        for flags in (MEMORY, SMALL):
            compile_for_host(*flags)
        with ThreadPool(2) as pool:
            for title, failure, seconds in pool.imap(run, CHECKS):
                print(f"  {title}: {'FAILED' if failure else 'ok'} ({seconds:.0f} s)", flush=True)
                failures += bool(failure)
                if failure:
                    print(failure)
    return failures


if __name__ == "__main__":
    sys.exit(main() != 0)
