"""The result on a terminal: a block for each case as it is done, then one line a case, then the verdicts."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .summary import MIB, Verdict, main_row

MS = 1e-3  # from the microseconds of the result


def _table(title: str, columns: list[str], left: int = 1, wrap: bool = True) -> Table:
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1) if wrap else (0, 1, 0, 0)
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i > 0 or not wrap)
    return table


def _ms(timing: dict[str, Any] | None, key: str = "median_us") -> str:
    return "" if timing is None else f"{timing[key] * MS:.3f}" if timing[key] < 1e4 else f"{timing[key] * MS:.1f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / MIB:.2f}" if nbytes < 100 * MIB else f"{nbytes / MIB:.0f}"


def header(console: Console, machine: dict[str, Any]) -> None:
    m = machine
    console.print(
        f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, device {m['device']}, load {m['load']:.1f}\n"
        f"weightxform {m['weightxform']} ({m['commit'] or 'no commit'}), torch {m['torch']}, Python {m['python']}, "
        f"{m['date']}",
        highlight=False,
    )
    if m["environment"]:
        console.print(" ".join(f"{k}={v}" for k, v in m["environment"].items()), highlight=False)


def show_case(console: Console, case: dict[str, Any]) -> None:
    aa = "" if case["aa"] is None else f", A/A {case['aa']:.2f}"
    title = (
        f"{case['name']}: {case['weights']} weight{'s' * (case['weights'] > 1)}, {_mib(case['bytes'])} MiB, "
        f"copy {case['copy_gb_s']:.1f} GB/s{aa}, {case['rounds']} rounds"
    )
    steps = any("step" in row for row in case["variants"])
    columns = ["", "kernel", "fwd ms", "fwd+bwd ms", "least", "vs torch", "vs compile", "x floor"]
    table = _table(title, [*columns, *["step ms"] * steps, "peak MiB", "ops"], left=2)
    for row in case["variants"]:
        name = escape(row["name"])
        if row["status"] != "ok":
            table.add_row(name, row["backend"], "", f"[yellow]{row['status']}[/]", *[""] * (6 + steps))
            continue
        both, ops = row["fwd_bwd"], row.get("ops")
        ratios = (_times(both[k]) for k in ("vs_eager", "vs_compiled", "x_floor"))
        last = [_ms(row.get("step"))] * steps + [_mib(row.get("peak_bytes")), "" if ops is None else str(ops)]
        table.add_row(name, row["backend"], _ms(row["fwd"]), _ms(both), _ms(both, "min_us"), *ratios, *last)
        if "graph" in row and isinstance(row["graph"], dict):
            table.add_row(
                f"  {name}, CUDA graph",
                "",
                "",
                _ms(row["graph"]),
                _ms(row["graph"], "min_us"),
                *[""] * (5 + steps),
            )
    console.print(table)
    for row in case["variants"]:
        if row["status"] != "ok":
            console.print(
                f"  {row['name']} {row['status']}: {row['reason']}", highlight=False, style="yellow", markup=False
            )
    if "step" in case:
        costs = ", ".join(f"{name} {cost:+.1%}" for name, cost in case["step"]["cost"].items())
        plain = _ms(case["step"]["times"]["plain"])
        console.print(f"  the constraint adds to a training step of {plain} ms: {costs}", highlight=False)


def show_overview(console: Console, cases: list[dict[str, Any]]) -> None:
    """A table for each transform."""
    for transform in dict.fromkeys(c["transform"] for c in cases):
        _show_overview(console, [c for c in cases if c["transform"] == transform])


def _show_overview(console: Console, cases: list[dict[str, Any]]) -> None:
    tuned = any("tuned" in c for c in cases)
    columns = ["case", "MiB", "ms", "torch", "compile", "floor"]
    columns += ["torch*", "compile*"] * tuned
    costs = any("step" in c for c in cases)
    columns += ["cost", "of torch", "of compile"] * costs
    steps = any("step" in main_row(c) for c in cases)
    columns += ["forward", "floor", "step", "torch", "peak MiB"] * steps
    title = "Forward and backward of ours: ms, how many times faster than torch and torch.compile, over the floor"
    table = _table(title, [*columns, "A/A"], wrap=False)
    for case in cases:
        mine = main_row(case)
        both = mine["fwd_bwd"]
        cells = [
            case["name"],
            _mib(case["bytes"]),
            _ms(both),
            *(_times(both[k]) for k in ("vs_eager", "vs_compiled", "x_floor")),
        ]
        if tuned:
            again = main_row(case["tuned"])["fwd_bwd"] if "tuned" in case else {}
            cells += [_times(again.get(k)) for k in ("vs_eager", "vs_compiled")]
        if costs:
            cost = case.get("step", {}).get("cost", {})
            cells += [f"{cost[k]:+.0%}" if k in cost else "" for k in ("ours", "eager", "compiled")]
        if steps:
            cells += [_ms(mine["fwd"]), _times(mine["fwd"]["x_floor"])]
            cells += [_ms(mine["step"]), _times(mine["step"]["vs_eager"]), _mib(mine.get("peak_bytes"))]
        table.add_row(*cells, "" if case["aa"] is None else f"{case['aa']:.2f}")
    console.print(table)
    notes = ["A/A: the same code timed against itself; ratios nearer to 1 than that mean nothing."]
    notes += ["*: every contender in a process whose allocator keeps freed memory."] * tuned
    notes += ["cost: what the constraint adds to a training step, ours, torch and compile."] * costs
    notes += ["forward, its floor; step: forward, backward and Adam on the raw tensors; all of ours."] * steps
    console.print("\n".join(notes), highlight=False)


def show_verdicts(console: Console, found: list[Verdict], noisy: list[str]) -> None:
    console.print()
    if noisy:
        text = f"the machine was too busy for {', '.join(noisy)} (A/A): nothing below that rests on them can be trusted"
        console.print(text, style="bold yellow", highlight=False)
    for verdict in found:
        style = "dim" if verdict.met is None else "green" if verdict.met else "bold red"
        console.print(str(verdict), style=style, highlight=False, markup=False)
