"""The command: choose cases, pass the gate, time, report."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="transforms, or patterns of case names (resnet*); all by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--quick", action="store_true", help="four cases of each, short runs: a minute or two")
    parser.add_argument("--seconds", type=float, help="timing of one case; 3 to 6, or 1 to 2 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write ratio.png and roofline.png there")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--no-tuned", action="store_true", help="leave out the second run with a tuned allocator")
    parser.add_argument("--main-only", action="store_true", help="time only the variants that the summary speaks of")
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)


def _select(rooms: dict, names: list[str], quick: bool, exact: bool) -> list[tuple[Any, Any]]:
    chosen = []
    for room in rooms.values():
        for case in room.cases:
            wanted = not names or (not exact and room.name in names)
            if (wanted and (case.quick or not quick)) or (
                not wanted and any(case.name == n if exact else fnmatch.fnmatch(case.name, n) for n in names)
            ):
                chosen.append((room, case))
    return chosen


def run(args: argparse.Namespace) -> int:
    """0 if every gate held, 1 if one of ours was wrong, 2 for arguments that cannot be served."""
    from rich.console import Console

    from . import report, summary
    from .case import Room, find_rooms
    from .footprint import ours_without_pool
    from .gate import check_ops
    from .machine import describe, free_memory
    from .suite import GateError, Options, measure

    rooms = find_rooms()
    chosen = _select(rooms, args.names, args.quick, args.exact)
    if not chosen:
        return _refuse(f"no case matches {' '.join(args.names)}; --list prints them")
    if args.list:
        for room, case in chosen:
            print(f"{room.name:16} {case.name:35} {case.group:8} {'quick' if case.quick else ''}".rstrip())
        return 0
    device = torch.device(args.device)
    if device.type not in ("cpu", "cuda"):
        return _refuse(f"--device must be cpu or cuda, got {args.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: torch sees no CUDA device here")
    if args.threads is not None:
        if args.threads < 1:
            return _refuse(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.seconds is not None and not args.seconds > 0:
        return _refuse(f"--seconds must be positive, got {args.seconds}")

    def seconds_of(room: Room) -> float:
        return room.seconds[args.quick] if args.seconds is None else args.seconds

    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = describe(device)
    report.header(console, machine)
    free = free_memory(device)
    for room, case in chosen:
        if room.memory(case) > free:
            console.print(
                f"{case.name} is left out: it takes up to {room.memory(case) / 2**30:.0f} GiB", style="yellow"
            )
    chosen = [(room, case) for room, case in chosen if room.memory(case) <= free]
    of_room = {room.name: (room, [c for r, c in chosen if r is room]) for room, _ in chosen}
    gate = []
    for room, own in of_room.values():
        gate += check_ops(room, device, own)
    wrong = [(backend, r) for backend, r in gate if not r.passed]
    for backend, r in wrong:
        console.print(f"WRONG {backend}: {r}", style="bold red", highlight=False)
    if wrong:
        console.print(f"{len(wrong)} of {len(gate)} cases of the ops are wrong: nothing is timed", style="bold red")
        return 1
    console.print(f"gate: {len(gate)} cases of the ops agree with float64", highlight=False)

    memory = not args.main_only
    peaks = ours_without_pool(chosen, torch.get_num_threads()) if memory and device.type == "cpu" else {}
    cases = []
    for room, case in chosen:
        try:
            options = Options(device, seconds_of(room), args.main_only, steps=not args.main_only, memory=memory)
            cases.append(measure(room, case, options))
        except GateError as e:
            console.print(f"WRONG {e}: stopped, no result", style="bold red", highlight=False)
            return 1
        for row in cases[-1]["variants"]:
            if row["name"] in peaks.get(case.name, {}):
                row["peak_bytes"] = peaks[case.name][row["name"]]
        report.show_case(console, cases[-1])
    if device.type == "cpu" and not (args.no_tuned or args.main_only):
        for room, _ in of_room.values():
            _tune([c for c in cases if room.tuned and c["transform"] == room.name], seconds_of(room))

    found = []
    for room, _ in of_room.values():
        found += room.verdicts([c for c in cases if c["transform"] == room.name], device.type)
    report.show_overview(console, cases)
    noisy = summary.noisy(cases)
    report.show_verdicts(console, found, noisy)
    result = {
        "schema": SCHEMA, "machine": machine, "gate": {"cases": len(gate), "passed": True},
        "cases": cases, "summary": summary.as_json(found), "noisy": noisy,
    }  # fmt: skip
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot is not None:
        from .plots import plot

        for path in plot(result, args.plot):
            console.print(str(path), highlight=False)
    return 0


def _tune(cases: list[dict[str, Any]], seconds: float) -> None:
    """Add to each case of a middling size what it gives where memory is kept: ``case["tuned"]``."""
    from . import tuned

    names = [c["name"] for c in cases if tuned.FROM <= c["bytes"] <= tuned.TO]
    if names:
        again = tuned.rerun(names, torch.get_num_threads(), seconds / 3)
        for case in cases:
            if case["name"] in again:
                case["tuned"] = again[case["name"]] | {"environment": tuned.ENVIRONMENT}


def _refuse(message: str) -> int:
    print(f"bench: {message}")
    return 2
