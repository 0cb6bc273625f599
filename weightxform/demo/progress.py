"""A progress bar on a terminal; a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """``with Progress(console) as p: p.start("training", 100); p.advance("loss 0.3")``."""

    def __init__(self, console: Console, lines: int = 10) -> None:
        self.console = console
        self.lines = lines
        self.bar: RichProgress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=console)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.began = what, total, 0, time.perf_counter()
        if self.bar is not None:
            self.task = self.bar.add_task(what, total=total, note="")

    def advance(self, note: str = "") -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, note=note)
        elif self.done * self.lines // self.total != (self.done - 1) * self.lines // self.total:
            took = time.perf_counter() - self.began
            self.console.print(f"{self.what}: {self.done}/{self.total}  {took:.0f} s  {note}".rstrip(), highlight=False)
