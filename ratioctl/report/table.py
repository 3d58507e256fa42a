"""The table that every report format renders, and how measurements are written in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ratioctl.types import Measurement

ROLES = {"inside": "ID", "outside": "OOD"}  # of a set in `Evaluation.data`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; the first column names the row.

    Attributes:
        intervals: 95 % intervals of cells by (row, column); a terminal shows them for at most two columns.
        marked: (row, column) of the cells that are significantly worse than the best of their row.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    intervals: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    marked: frozenset[tuple[int, int]] = frozenset()


def measurement_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Measurement | None]],
    note: str = "",
    marked: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    """A table of texts and of measurements in percent."""
    return Table(
        title=title,
        header=tuple(header),
        rows=tuple(tuple(cell if isinstance(cell, str) else percent(cell) for cell in row) for row in rows),
        note=note,
        intervals={
            (r, c): interval_text(cell)
            for r, row in enumerate(rows)
            for c, cell in enumerate(row)
            if isinstance(cell, Measurement) and cell.interval is not None
        },
        marked=marked,
    )


def percent(m: Measurement | None) -> str:
    return "-" if m is None else f"{100 * m.value:.1f}"


def interval_text(m: Measurement) -> str:
    return "-" if m.interval is None else f"{100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f}"


def count_text(found: Sequence[Measurement | None]) -> str:
    """Number of examples: "10,000", or "355 to 10,000"."""
    counts = sorted({m.n for m in found if m is not None})
    return " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))) if counts else "-"


def ball_text(ball: Any) -> str:
    """ "l2 0.5"; linf radii as multiples of 1/255 where they are whole."""
    if ball is None:
        return "-"
    if math.isinf(ball.p) and abs(ball.eps * 255 - round(ball.eps * 255)) < 1e-6:
        return f"linf {round(ball.eps * 255)}/255"
    return str(ball)
