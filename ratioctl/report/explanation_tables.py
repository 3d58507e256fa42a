"""Tables of the suite "explanations"."""

from __future__ import annotations

from collections.abc import Iterable

from ratioctl.report.table import Table, ball_text
from ratioctl.types import Evaluated, Evaluation, Measurement

_COLUMNS = (
    ("reached %", "validity", 100),
    ("confidence %", "target_confidence", 100),
    ("judge's %", "judge_confidence", 100),
    ("judge predicts target %", "judge_agreement", 100),
    ("pixels changed %", "changed_pixels", 100),
    ("l1", "distance_l1", 1),
    ("l2", "distance_l2", 1),
    ("linf", "distance_linf", 1),
)
_NOTE = (
    "Reached: the saved image is predicted as the target with a confidence above one half. Pixels changed: "
    "by more than 1/255 in some channel. Brackets: 95 % intervals."
)
_JUDGE = " The judge predicts the target at any confidence."


def _note(rows: Iterable[Measurement]) -> str:
    return _NOTE + (_JUDGE if any(m.name == "judge_agreement" for m in rows) else "")


def tables(evaluation: Evaluation) -> list[Table]:
    """A comparison where there are several models; then by radius, and OOD images, of each."""
    found = [_compared(evaluation)] if len(evaluation.models) > 1 else []
    for model in evaluation.models:
        rows = model.report.measurements
        for dataset in dict.fromkeys(m.dataset for m in rows if m.name == "validity"):
            found.append(_by_budget(model, dataset))
        outside = _outside(model)
        if outside.rows:
            found.append(outside)
    return found


def _compared(evaluation: Evaluation) -> Table:
    names = ("validity", "judge_confidence", "judge_agreement", "flip_radius_q50", "flip_changed_pixels")
    titles = {
        "validity": "reached %",
        "judge_confidence": "judge's confidence %",
        "judge_agreement": "judge predicts target %",
        "flip_radius_q50": "median flip radius",
        "flip_changed_pixels": "pixels changed at that radius %",
    }
    kinds = dict.fromkeys(
        (m.name, m.ball)
        for name in names
        for model in evaluation.models
        for m in model.report.measurements
        if m.name == name
    )
    rows = []
    for name, ball in kinds:
        cells = []
        for model in evaluation.models:
            of = [m for m in model.report.measurements if (m.name, m.ball) == (name, ball)]
            cells.append(_cell(of[0], 1 if name == "flip_radius_q50" else 100) if of else "-")
        within = f", {ball_text(ball)}" if ball is not None else ""
        rows.append((titles[name] + within, *cells))
    return Table(
        title="Counterfactuals",
        header=("", *(model.name for model in evaluation.models)),
        rows=tuple(rows),
        note=_note(m for model in evaluation.models for m in model.report.measurements),
    )


def _by_budget(model: Evaluated, dataset: str) -> Table:
    rows = [m for m in model.report.measurements if m.dataset == dataset]
    columns = [column for column in _COLUMNS if any(m.name == column[1] for m in rows)]
    lines = []
    for ball in dict.fromkeys(m.ball for m in rows if m.name == "validity"):
        mine = {m.name: m for m in rows if m.ball == ball}
        cells = [
            _cell(mine[name], factor, width=name == "validity") if name in mine else "-"
            for _, name, factor in columns
        ]
        lines.append(("unchanged" if ball is None else ball_text(ball), *cells))
    flipped = next(m for m in rows if m.name == "flipped")
    flips = f"Predicted as the target within the largest radius: {_cell(flipped, 100)} % of {flipped.n}"
    for name, title in (("flip", "flip radius"), ("in_distribution", "ID radius")):
        quartiles = [m for m in rows if m.name.startswith(f"{name}_radius_q")]
        if quartiles:
            flips += f"; {title} " + ", ".join(
                f"{_cell(m, 1, 3)} at {m.name.rpartition('q')[2]} %" for m in quartiles
            )
    return Table(
        title=f"Counterfactuals of {model.name}, {dataset}",
        header=("radius", *(title for title, _, _ in columns)),
        rows=tuple(lines),
        note=f"{flips}. n {flipped.n}. {_note(rows)}",
    )


def _outside(model: Evaluated) -> Table:
    rows = [m for m in model.report.measurements if m.name == "confidence"]
    balls = list(dict.fromkeys(m.ball for m in rows))
    lines = []
    for dataset in dict.fromkeys(m.dataset for m in rows):
        mine = {m.ball: m for m in rows if m.dataset == dataset}
        n = next(iter(mine.values())).n
        lines.append((f"{dataset} (n {n})", *(_cell(mine[ball], 100) for ball in balls)))
    return Table(
        title=f"OOD images towards the predicted class, {model.name}: mean confidence",
        header=("per cent", *("unchanged" if ball is None else ball_text(ball) for ball in balls)),
        rows=tuple(lines),
        note="Lower is better: confidence in OOD images should stay low at small radii.",
    )


def _cell(m: Measurement, factor: float, digits: int = 1, width: bool = True) -> str:
    """ "82.0 (68.1 to 91.0)"."""

    def number(value: float) -> str:
        scaled = factor * value
        return f"{scaled:.{digits}f}" if factor == 100 else f"{scaled:.3g}"

    if m.interval is None or not width:
        return number(m.value)
    low, high = m.interval
    return f"{number(m.value)} ({number(low)} to {number(high)})"
