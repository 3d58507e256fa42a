"""Terminal output: tables of evaluations and counterfactuals, and picture previews."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ratioctl.report.evaluation_tables import tables
from ratioctl.report.pictures import norm_symbol, picture, short, shown, two_digits
from ratioctl.report.table import Table
from ratioctl.types import Evaluation, Explanation, Target
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table as RichTable

_LEAST_COLUMNS, _MOST_COLUMNS = 18, 32  # width of a preview picture


# --- evaluations -------------------------------------------------------------------------------------------


def evaluation_tables(evaluation: Evaluation) -> list[RenderableType]:
    """Tables and their notes for a rich console."""
    from rich.text import Text

    drawn: list[RenderableType] = [
        Text(safe_text(f"Suite {evaluation.suite}: {evaluation.protocol}."), style="dim")
    ]
    for table in tables(evaluation):
        drawn.append(rich_table(table))
        if table.note:
            drawn.append(Text(safe_text(table.note), style="dim"))
    return drawn


def rich_table(table: Table) -> RichTable:
    """A table for a rich console."""
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(safe_text(table.title), style="bold"), title_justify="left")
    for k, title in enumerate(table.header):
        # Folding keeps names complete on a narrow terminal.
        grid.add_column(
            Text(safe_text(title)), justify="left" if k == 0 else "right", min_width=5, overflow="fold"
        )
    room = len({c for _, c in table.intervals}) <= 2
    for r, row in enumerate(table.rows):
        cells = []
        for c, text in enumerate(row):
            worse = (r, c) in table.marked
            cell = text + (f" ({table.intervals[r, c]})" if room and (r, c) in table.intervals else "")
            cells.append(Text(safe_text(cell) + (" *" if worse else ""), style="red" if worse else ""))
        grid.add_row(*cells)
    return grid


# --- counterfactuals ---------------------------------------------------------------------------------------


def counterfactual_tables(
    header: Mapping[str, Any], explanations: Sequence[Explanation], width: int = 120
) -> Iterator[RichTable]:
    """One table per model and norm: a row per image and target, confidences by budget, flip radius.

    `*` (and color) marks pictures that are predicted as the target, `?` those that are out of distribution
    as well. "ID radius" is the smallest radius found at which the confidence also reaches the threshold. A
    table wider than `width` columns puts image, label
    and target into one column.
    """
    for number, norm_name in dict.fromkeys((e.model, e.norm or header["norm"]) for e in explanations):
        mine = [e for e in explanations if (e.model, e.norm or header["norm"]) == (number, norm_name)]
        table = _counterfactual_table(header, mine, number, norm_name, compact=False)
        if _least_width(table) > width:
            table = _counterfactual_table(header, mine, number, norm_name, compact=True)
        yield table


def _least_width(table: RichTable) -> int:
    """Terminal columns below which rich truncates cells."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).minimum


def _counterfactual_table(
    header: Mapping[str, Any], mine: Sequence[Explanation], number: int, norm_name: str, compact: bool
) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    model, norm = header["models"][number], norm_symbol(norm_name)
    name = safe_text(model["name"])
    doubtful = ""
    if any(_mark(b.predicted, t.target, b.is_ood) == "?" for e in mine for t in e.targets for b in t.budgets):
        doubtful = ", ? but out of distribution"
    table = RichTable(
        title=f"{name}: confidence in the target by budget ({norm}; * predicted as the target{doubtful})",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD if compact else box.HEAVY_HEAD,
        padding=(0, 1, 0, 0) if compact else (0, 1),
        show_edge=not compact,
    )
    for column in ("image",) if compact else ("image", "predicted", "target"):
        table.add_column(column, overflow="fold", min_width=16)
    for column in ("0", *(f"{budget.eps:.4g}" for budget in mine[0].targets[0].budgets)):
        table.add_column(column, justify="right", no_wrap=True)
    until = header.get("until")
    flips = ("flip" if compact else "flip radius") if until is None else f"reaches {until:g} at"
    table.add_column(flips, justify="right", no_wrap=not compact)
    threshold = model.get("threshold")
    if threshold is not None:
        table.add_column("ID radius", justify="right", no_wrap=not compact)
        least = f"confidence at least {threshold:.3g}"
        table.caption = f"Radii are the smallest found; ID radius: in distribution as well ({least})"
    for explanation in mine:
        original = explanation.original
        predicted = f"{safe_text(original.label)} {two_digits(original.confidence)}"
        if original.is_ood:
            predicted += " (out of distribution)"
        for target in explanation.targets:
            before = original.probabilities[model["labels"].index(target.target)]
            cells = [(before, _mark(original.label, target.target, original.is_ood))]
            cells += [(b.confidence, _mark(b.predicted, target.target, b.is_ood)) for b in target.budgets]
            about = [safe_text(explanation.path), predicted, safe_text(target.target)]
            if compact:
                about = [f"{Path(about[0]).name}\n{predicted}\nto {about[2]}"]
            table.add_row(
                *about,
                *(
                    Text(two_digits(value) + mark, style={"*": "bold green", "?": "green"}.get(mark, ""))
                    for value, mark in cells
                ),
                _radius(target.flip_eps),
                *(() if threshold is None else (_radius(target.in_distribution_eps),)),
            )
    return table


def _mark(predicted: str, target: str, is_ood: bool | None) -> str:
    """`*` if predicted as the target, `?` if it is out of distribution as well, else a space."""
    if predicted != target:
        return " "
    return "?" if is_ood else "*"


def _radius(eps: float | None) -> str:
    return "-" if eps is None else f"{eps:.3g}"


# --- previews ----------------------------------------------------------------------------------------------


def preview(
    console: Console, explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str
) -> None:
    """Print the original and counterfactuals in a row, as many as fit, with budgets and confidences.

    Uses textual-image: the sixel or Kitty protocol where the terminal reports support, else half blocks.
    Prints nothing on a terminal without colors.
    """
    if console.color_system in (None, "windows") or not console.is_terminal:
        return
    from rich.text import Text

    cells = shown(explanation, target, labels, norm)
    gap, room = 2, console.width - 1
    fit = max(1, (room + gap) // (_LEAST_COLUMNS + gap))
    if fit < len(cells):  # the original, and evenly spaced budgets including the last
        rest = [1 + round(k * (len(cells) - 2) / max(fit - 2, 1)) for k in range(fit - 1)]
        cells = (cells[0], *(cells[n] for n in dict.fromkeys(rest)))
    columns = min(_MOST_COLUMNS, (room + gap) // len(cells) - gap, room) // 2 * 2

    def line(words: Sequence[tuple[str, str]]) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        for word, style in words:
            text.append(f"{word[:columns]:<{columns + gap}}", style=style)
        return text

    title = f"{safe_text(explanation.path)}, predicted {short(explanation.original.label)}"
    outside = " (out of distribution)" if explanation.original.is_ood else ""
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it logs terminals that do not answer
    with _without_stdin() as answers:
        try:
            from textual_image.renderable import HalfcellImage
            from textual_image.renderable import Image as BestImage
        except (ImportError, OSError, ValueError):  # the terminal's answers cannot be read
            return
        if answers:  # some terminals print an unknown query
            console.file.write("\r\x1b[2K")
        kind: Any = BestImage if answers else HalfcellImage
        pixels = columns if kind is HalfcellImage else 8 * columns
        strip = _strip([cell.image for cell in cells], pixels, gap * pixels // columns)
        console.print(Text(f"{title}{outside}; towards {short(target.target)}:", style="bold"))
        console.print(kind(strip, width=len(cells) * (columns + gap) - gap, height=columns // 2))
    console.print(line([(cell.caption, "") for cell in cells]))
    marks = [f"{two_digits(cell.confidence)}{' *' if cell.hit else ''}" for cell in cells]
    styles = ["bold green" if cell.hit else "" for cell in cells]
    console.print(line(list(zip(marks, styles, strict=True))))


def _strip(images: Sequence[np.ndarray], side: int, gap: int) -> Image.Image:
    """Pictures in a row, each `side` by `side` pixels."""
    strip = Image.new("RGB", (len(images) * (side + gap) - gap, side), (0, 0, 0))
    for n, image in enumerate(images):
        tile = picture(image).convert("RGB")
        how = Image.Resampling.NEAREST if side % tile.width == 0 else Image.Resampling.LANCZOS
        strip.paste(tile.resize((side, side), how), (n * (side + gap), 0))
    return strip


@contextlib.contextmanager
def _without_stdin() -> Iterator[bool]:
    """Hide stdin from textual-image where it is not a terminal in the foreground; yields whether it is.

    The library queries the terminal and reads the answer from stdin, on import and when it draws.
    """
    stdin = sys.__stdin__
    answers = False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        answers = bool(stdin and stdin.isatty() and os.tcgetpgrp(stdin.fileno()) == os.getpgrp())
    if not answers:
        sys.__stdin__ = None  # type: ignore[misc]
    try:
        yield answers
    finally:
        sys.__stdin__ = stdin  # type: ignore[misc]
