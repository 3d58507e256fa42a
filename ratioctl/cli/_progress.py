"""The progress reporter of the command line, and how rates are written."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ratioctl.utils.durations import duration

if TYPE_CHECKING:
    from ratioctl.cli._common import Context


def rate(per_second: float) -> str:
    """Two significant digits below ten, whole numbers above: "0.12", "2.9", "1,234"."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


class Progress:
    """A bar on a terminal's stderr; elsewhere one line for every tenth of the work. A context manager.

    Args:
        total: amount of work in the unit of `update`; None where it is not known, which shows no tenths.
        hidden: show no bar, because stdout is a terminal that rows are printed on.
        tenths: print the lines for tenths where there is no bar.
    """

    def __init__(
        self, context: Context, total: float | None = None, *, hidden: bool = False, tenths: bool = True
    ) -> None:
        self.context, self.total, self.hidden, self.tenths = context, total, hidden, tenths
        self.began = time.monotonic()
        self.tenth = 0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        # A disabled bar of rich's would still end its line. rich is imported only where a bar is possible.
        possible = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
        if possible and not self.context.quiet and not self.hidden and self.context.console.is_terminal:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.context.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(
        self, done: float, text: str, *, total: float | None = None, left: float | None = None
    ) -> None:
        """Show that `done` of the work is finished.

        Args:
            text: what the numbers are about.
            total: replaces the total given at the start.
            left: seconds until the end; None estimates them from the time spent so far.
        """
        self.total = self.total if total is None else total
        if left is None and self.total and done > 0:
            left = (time.monotonic() - self.began) * max(self.total - done, 0) / done
        ends = "" if left is None else f", {duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, description=text + ends)
        elif self.tenths and not self.hidden and self.total and self.tenth < int(10 * done / self.total) < 10:
            self.tenth = int(10 * done / self.total)
            self.context.note(f"{done / self.total:.0%} ({text}){ends}")

    def note(self, text: str) -> None:
        """A note on a line of its own, above the bar."""
        self._clear_line()
        self.context.note(text)

    def warn(self, text: str) -> None:
        """A warning on a line of its own, above the bar."""
        self._clear_line()
        self.context.warn(text)

    def _clear_line(self) -> None:
        if self.bar is not None:
            self.context.console.file.write("\r\x1b[2K")
            self.context.console.file.flush()
