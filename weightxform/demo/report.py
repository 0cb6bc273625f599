"""The outcome of a pillar as tables on the terminal and as a Markdown report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .pillar import Outcome, Pillar


def show(console: Console, outcome: Outcome) -> None:
    for table in outcome.tables:
        rich = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
        for i, name in enumerate(table.header):
            rich.add_column(name, justify="right" if i else "left")
        for row in table.rows:
            rich.add_row(*row)
        console.print(rich)
    for check in outcome.checks:
        mark = "[green]holds[/]" if check.passed else "[bold red]FAILS[/]"
        console.print(f"{mark}  {check.name}: {check.fact}", highlight=False)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def write(output: Path, outcomes: Sequence[tuple[Pillar, Outcome]], machine: str) -> Path:
    parts = ["# weightxform demo", machine]
    for pillar, outcome in outcomes:
        parts.append(f"## {pillar.title}")
        parts += outcome.text
        for table in outcome.tables:
            parts += [f"### {table.title}", _markdown_table(table.header, table.rows)]
        checks = [(c.name, "holds" if c.passed else "**fails**", c.fact) for c in outcome.checks]
        parts += ["### Checks", _markdown_table(("check", "result", "figures"), checks)]
        for path, caption in outcome.pictures:
            parts.append(f"![{caption}]({path.relative_to(output).as_posix()})\n\n*{caption}*")
    report = output / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report
