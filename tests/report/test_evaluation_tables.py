"""Tables and pages of an evaluation."""

from __future__ import annotations

import io
import math

from rich.console import Console

from ratioctl.recipe import Ball
from ratioctl.report import markdown, table, terminal
from ratioctl.types import Evaluated, Evaluation, Measurement, Report
from tests.evaluation.helpers import BALL


def test_a_narrow_terminal_cuts_no_name_off() -> None:
    name = "a-very-long-name-of-a-set.tar.xz:test"
    rows = [
        Measurement(name=f"kept_at_{at}", value=0.5, n=9, interval=(0.2, 0.8), dataset=name, ball=ball,
                    details={"threshold": 0.5, "attack": "it"})
        for at in ("tpr95", "tpr99") for ball in (None, BALL)
    ]  # fmt: skip
    model = Evaluated(
        name="m",
        report=Report(package_digest="d", seed=0, measurements=tuple(rows)),
        figures={},
        gallery=(),
        examples={},
    )
    console = Console(width=60, file=io.StringIO(), color_system=None)
    table = next(
        drawn
        for drawn in terminal.evaluation_tables(
            Evaluation(suite="s", protocol="p", data=(), environment={}, models=(model,))
        )
        if "Operating" in str(getattr(drawn, "title", ""))
    )
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cells = "".join(line.split("│")[1] for line in lines if "│" in line)
    assert cells.replace(" ", "") == f"{name}: ID acceptance rate".replace(" ", "")


def test_linf_radii_are_read_in_255ths() -> None:
    assert table.ball_text(Ball(p=math.inf, eps=8 / 255)) == "linf 8/255"
    assert table.ball_text(Ball(p=math.inf, eps=0.1)) == "linf 0.1"
    assert table.ball_text(Ball(p=2, eps=0.5)) == "l2 0.5"


def test_names_cannot_break_out_of_markdown_and_html() -> None:
    assert markdown.escaped("a|b<i>\x1b[2J") == r"a\|b\<i\>\\x1b\[2J"
