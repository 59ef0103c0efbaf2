"""Progress of long work: stage n of m, rows or steps done, rate, time left. Bars on a terminal, a line now and then in
a file, and only stage lines under CI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_LINE_EVERY_S = 10.0


class Task:
    """One countable piece of work inside a stage."""

    def __init__(self, report: Progress, description: str, total: int | None, unit: str, may_stop_early: bool) -> None:
        self._report, self._description, self._total, self._unit = report, description, total, unit
        self._bound = "at most " if may_stop_early else ""
        self._done, self._started, self._shown = 0, time.monotonic(), time.monotonic()
        self._first: int | None = None
        self._bar = None
        if report.bars:
            self._bar = report.bars.add_task(description, total=total, rate="", bound=self._bound, detail="")

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """``done`` so far, and ``total`` if it changed; ``detail`` is shown next to it (a loss, a count)."""
        now = time.monotonic()
        # Start-up and the work of earlier attempts have no rate; a restart resets the rate.
        if self._first is None or done < self._done:
            self._first, self._started = done, now
        self._done, self._total = done, total if total is not None else self._total
        rate = (done - self._first) / max(now - self._started, 1e-9)
        text = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        if self._report.bars and self._bar is not None:
            self._report.bars.update(self._bar, completed=done, total=self._total, rate=text, detail=detail)
        elif not self._report.quiet and now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            left = f", {self._bound}{(self._total - done) / rate:,.0f} s left" if self._total and rate > 0 else ""
            of = f" of {self._total:,}" if self._total else ""
            self._report.say(f"    {self._description}: {done:,}{of} {self._unit}, {text}{left}  {detail}".rstrip())

    def advance(self, count: int = 1, detail: str = "") -> None:
        self.update(self._done + count, detail=detail)


class Progress:
    """What a stage reports to. ``say`` prints a line in any mode."""

    def __init__(self, quiet: bool | None = None) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.quiet = bool(os.environ.get("CI")) if quiet is None else quiet
        self.bars: Bars | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "rows", may_stop_early: bool = False
    ) -> Iterator[Task]:
        """Show a piece of work while the block runs. If it ``may_stop_early``, the remaining time is an upper bound."""
        outermost = self.bars is None and self.console.is_terminal and not self.quiet
        if outermost:
            columns = ("    {task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}")
            self.bars = Bars(
                *(TextColumn(c) if isinstance(c, str) else c for c in columns),
                TextColumn("{task.fields[bound]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self.console,
                transient=True,
            )
            self.bars.start()
        try:
            yield Task(self, description, total, unit, may_stop_early)
        finally:
            if outermost and self.bars is not None:
                self.bars.stop()
                self.bars = None
