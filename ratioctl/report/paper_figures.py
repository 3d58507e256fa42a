"""The figures of the RATIO paper as SVG and PNG files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ratioctl.errors import OutputError
from ratioctl.report.drawing import Color, Drawing
from ratioctl.report.pictures import norm_symbol, short, two_digits
from ratioctl.utils.atomic_files import make_folder, write_files

if TYPE_CHECKING:  # its module imports torch
    from ratioctl.evaluation.paper_figures import Panel, PaperFigures, Row

DOCUMENT = "figures.json"
SCHEMA = "ratioctl/figures/1"
_SIDE, _GAP, _LEFT, _HEAD, _FOOT = 96, 10, 180, 34, 20
_HIT, _INK, _QUIET = (10, 110, 80), (20, 24, 31), (92, 101, 115)
_COLORS: tuple[Color, ...] = (
    (0, 90, 181),
    (190, 80, 0),
    (10, 120, 80),
    (140, 60, 150),
    (110, 110, 0),
    (90, 90, 90),
)


def refuse_foreign(out: Path) -> None:
    """Raise OutputError where figures in `out` would replace files that this command did not write."""
    existing = [path for path in sorted(out.glob("figure-*.*")) if path.suffix in (".png", ".svg")]
    if not existing:
        return
    try:
        ours = json.loads((out / DOCUMENT).read_bytes())["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        step = "Choose another --out."
        raise OutputError(existing[0], "exists and was not written by ratioctl figures", step)


def write(found: PaperFigures, out: Path) -> list[Path]:
    """Write all figures and `figures.json` into the folder `out`. Raises OutputError, DiskError."""
    refuse_foreign(out)
    make_folder(out)
    contents: dict[str, bytes] = {}
    for name, drawing in drawings(found):
        contents[f"{name}.svg"], contents[f"{name}.png"] = drawing.to_svg(), drawing.to_png()
    about = {"schema": SCHEMA, **found.about, "files": sorted(contents)}
    contents[DOCUMENT] = (json.dumps(about, indent=1) + "\n").encode()
    write_files({out / name: data for name, data in contents.items()})
    return [out / name for name in contents]


def drawings(found: PaperFigures) -> Iterator[tuple[str, Drawing]]:
    """(name, drawing) of every figure."""
    if found.failure is not None:
        yield "figure-1-plain-model", _panels([found.failure])
    yield "figure-2-counterfactuals", _panels(found.counterfactuals)
    yield "figure-5-confidence-over-radius", _curves(found)
    yield "figure-6-features-on-ood-images", _panels(found.features)


def _panels(panels: Sequence[Panel]) -> Drawing:
    """The image on the left; to the right a row per model and class, a column per budget."""
    columns = max(len(row.target.budgets) for panel in panels for row in panel.rows)
    tall = _SIDE + _HEAD + _FOOT
    rows = sum(len(panel.rows) for panel in panels)
    drawing = Drawing(
        width=_LEFT + (columns + 1) * (_SIDE + _GAP) + 2 * _GAP,
        height=rows * tall + 2 * _GAP * len(panels),
    )
    y = 0
    for panel in panels:
        for number, row in enumerate(panel.rows):
            _row(drawing, y, row, panel, first=number == 0)
            y += tall
        y += 2 * _GAP
    return drawing


def _row(drawing: Drawing, y: int, row: Row, panel: Panel, *, first: bool) -> None:
    original, name = row.explanation.original, row.target.target
    drawing.text(_GAP, y + _HEAD + 18, short(row.model, 21), size=12, bold=True)
    drawing.text(_GAP, y + _HEAD + 38, f"to {short(name)}", size=12, color=_QUIET)
    x = _LEFT
    if first:
        drawing.text(x + _SIDE / 2, y + 14, short(panel.label or "OOD image", 14), size=12, anchor="middle")
    drawing.text(
        *(x + _SIDE / 2, y + 28, f"{short(original.label, 10)} {two_digits(original.confidence)}"),
        size=11,
        anchor="middle",
        color=_QUIET,
    )
    drawing.picture(x, y + _HEAD, _SIDE, panel.image)
    for budget in row.target.budgets:
        x += _SIDE + _GAP
        color = _HIT if budget.predicted == name else _INK
        title = f"{short(name, 10)} {two_digits(budget.confidence)}"
        drawing.text(x + _SIDE / 2, y + 28, title, size=10, anchor="middle", color=color)
        drawing.picture(x, y + _HEAD, _SIDE, budget.image)
        below = y + _HEAD + _SIDE + 14
        caption = f"{norm_symbol('2')} ≤ {budget.eps:g}"
        drawing.text(x + _SIDE / 2, below, caption, size=11, anchor="middle", color=_QUIET)


def _curves(found: PaperFigures) -> Drawing:
    """Figure 5: mean confidence, of ID images the lowest in the true class, of OOD images the highest."""
    width, height, left, top = 360, 250, 48, 34
    drawing = Drawing(width=2 * (left + width + 16), height=top + height + 48 + 18 * len(found.curves))
    for side, (key, title) in enumerate(
        (("inside", "ID images: true class, lowest"), ("outside", "OOD images: highest"))
    ):
        x0 = left + side * (left + width + 16)
        last = max(curves[key]["radii"][-1] for curves in found.curves.values())
        drawing.text(x0 + width / 2, 20, title, size=13, anchor="middle", bold=True)
        for tick in range(6):
            y = top + height * (1 - tick / 5)
            drawing.line([(x0, y), (x0 + width, y)], (225, 228, 232), width=1)
            drawing.text(x0 - 6, y + 4, f"{tick / 5:.1f}", size=11, anchor="end", color=_QUIET)
        for tick in range(7):
            x = x0 + width * tick / 6
            drawing.text(
                x, top + height + 16, f"{last * tick / 6:.3g}", size=11, anchor="middle", color=_QUIET
            )
        drawing.text(x0 + width / 2, top + height + 34, "l₂ radius", size=12, anchor="middle")
        for number, curves in enumerate(found.curves.values()):
            points = [
                (x0 + width * r / last, top + height * (1 - value))
                for r, value in zip(curves[key]["radii"], curves[key]["mean"], strict=True)
            ]
            drawing.line(points, _COLORS[number % len(_COLORS)], dashed=number >= len(_COLORS))
    for number, (name, curves) in enumerate(found.curves.items()):
        y = top + height + 54 + 18 * number
        drawing.line(
            [(left, y - 4), (left + 26, y - 4)], _COLORS[number % len(_COLORS)], dashed=number >= len(_COLORS)
        )
        counts = f"n {curves['inside']['n']} ID, {curves['outside']['n']} OOD"
        drawing.text(left + 34, y, f"{short(name, 40)} ({counts})", size=12)
    return drawing
