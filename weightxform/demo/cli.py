"""The command: run the pillars, print their tables, write the report, and fail if a check fails."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer steps: two or three minutes on two cores")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the report and its pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps, instead of the pillar's own number")
    parser.add_argument("--pillar", action="append", metavar="NAME", help="run this one only (may be repeated)")


def run(args: argparse.Namespace) -> int:
    """0 if every check of every pillar held, 1 if one failed, 2 for arguments that cannot be served."""
    from rich.console import Console

    from .pillar import Settings, find_pillars
    from .progress import Progress
    from .report import show, write

    pillars = find_pillars()
    unknown = [name for name in args.pillar or () if name not in pillars]
    if unknown:
        print(f"demo: --pillar must be one of {', '.join(pillars)}, got {', '.join(unknown)}")
        return 2
    if args.steps is not None and args.steps < 2:
        print(f"demo: --steps must be at least 2, got {args.steps}")
        return 2

    console = Console(width=None if sys.stdout.isatty() else 120)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.output, args.seed, args.quick, args.steps)
    outcomes = []
    for name in args.pillar or pillars:
        console.rule(pillars[name].title)
        with Progress(console) as progress:
            outcome = pillars[name].run(settings, progress)
        show(console, outcome)
        outcomes.append((pillars[name], outcome))

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, seed {args.seed}"
    report = write(settings.output, outcomes, machine)
    figures = {p.name: {"figures": o.figures, "checks": {c.name: c.passed for c in o.checks}} for p, o in outcomes}
    (settings.output / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    failed = [c for _, o in outcomes for c in o.checks if not c.passed]
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    for check in failed:
        console.print(f"[bold red]FAILED[/] {check.name}: {check.fact}", highlight=False)
    return 1 if failed else 0
