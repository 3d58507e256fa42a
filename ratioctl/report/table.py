"""The table that every report format renders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; the first column names the row.

    Attributes:
        intervals: 95 % intervals of cells by (row, column); shown where there is room, on a terminal for two
            columns.
        marked: (row, column) of the cells that are significantly worse than the best of their row.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    intervals: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    marked: frozenset[tuple[int, int]] = frozenset()


def ball_text(ball: Any) -> str:
    """ "l2 0.5"; linf in 255ths where it is a whole number of them."""
    if ball is None:
        return "-"
    if math.isinf(ball.p) and abs(ball.eps * 255 - round(ball.eps * 255)) < 1e-6:
        return f"linf {round(ball.eps * 255)}/255"
    return str(ball)
