"""The thresholds of a model: a table, JSON, and a page with ID acceptance over OOD acceptance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ratioctl.package import Spec
from ratioctl.package.records import AcceptanceQuantiles, Acceptances, acceptances, records
from ratioctl.report import figures
from ratioctl.report.html import safe_lines, templates
from ratioctl.report.table import Table

_NOTE = (
    "Shares of the calibration images that each threshold accepts, with exact (Clopper-Pearson) 95 % "
    "intervals. ID: in distribution; OOD: out of distribution."
)
_OLD = (
    "This model was calibrated before acceptance rates were stored; `ratioctl calibrate` stores them. "
    "`ratioctl evaluate` measures them on images of yours."
)
MARK = "<!-- ratioctl thresholds -->"


def document(spec: Spec) -> dict[str, Any]:
    """Plain JSON values: every threshold of the model's own score with its record, and the curves."""
    stored = spec.thresholds_of(spec.score)
    known = {record.name: record for record in records(spec)}
    found = []
    for name, value in stored.items():
        row: dict[str, Any] = {"name": name, "threshold": float(value), "classes": None}
        if value.classes is not None:
            row["classes"] = dict(zip(spec.label_names, value.classes, strict=True))
        if name in known:
            row |= known[name].model_dump(mode="json", exclude={"name", "threshold"})
        found.append(row)
    measured = acceptances(spec)
    return {
        "schema": "ratioctl/thresholds/1",
        "model": spec.name,
        "score": spec.score,
        "temperature": spec.temperature,
        "thresholds": found,
        "curves": [] if measured is None else [_curve(measured, part) for part in measured.ood],
    }


def table(spec: Spec) -> Table:
    """A row for every threshold and set."""
    rows: list[tuple[str, ...]] = []
    known = {record.name: record for record in records(spec)}
    for name, value in spec.thresholds_of(spec.score).items():
        shown = f"{value:.6g}" + (" (per class)" if value.classes is not None else "")
        record = known.get(name)
        if record is None:
            rows.append((name, "-", shown, "-", "-", "-", "-"))
            continue
        for k, part in enumerate((record.id, *record.ood)):
            head = (name, record.rule, shown) if k == 0 else ("", "", "")
            low, high = (f"{100 * end:.1f}" for end in part.interval)
            title = f"{part.title} ({'OOD' if k else 'ID'})"
            rows.append((*head, title, f"{100 * part.rate:.1f}", f"{low} to {high}", f"{part.n:,}"))
    return Table(
        title=f"Thresholds of {spec.name}, score {spec.score}",
        header=("threshold", "rule", "value", "images", "accepted, %", "95 % interval", "n"),
        rows=tuple(rows),
        note=_NOTE if known else _OLD,
    )


def statements(spec: Spec) -> list[str]:
    """What rules guarantee, and under which assumptions."""
    return [
        f"{record.name}: {record.statement} Assumptions: {'; '.join(record.assumptions)}."
        for record in records(spec)
        if record.statement
    ]


def page(spec: Spec) -> str:
    """One HTML file with the table and a figure for each OOD set; no script, no requests."""
    text = (
        templates()
        .get_template("thresholds.html")
        .render(
            name=spec.name,
            table=table(spec),
            statements=statements(spec),
            figures=list(_figures(spec)),
            mark=MARK,
        )
    )
    return safe_lines(text)


def _figures(spec: Spec) -> Iterator[dict[str, Any]]:
    measured = acceptances(spec)
    for name in dict.fromkeys(part.set for part in measured.ood) if measured else ():
        assert measured is not None
        lines = []
        for k, part in enumerate(p for p in measured.ood if p.set == name):
            curve = _curve(measured, part)
            title = "clean" if part.ball is None else part.title.partition(", ")[2]
            lines.append(
                figures.Series(
                    name=title, x=curve["ood"], y=curve["id"], color=min(k, 2), dashed=part.ball is not None
                )
            )
            points = [
                (rate.rate, record.id.rate, record.name)
                for record in records(spec)
                for rate in record.ood
                if (rate.set, rate.ball) == (part.set, part.ball)
            ]
            if points:
                x, y, names = zip(*points, strict=True)
                # Names once: the points of the attacked set lie at the same heights.
                shown = [name if k == 0 else "" for name in names]
                lines.append(figures.Series(name="", x=x, y=y, color=min(k, 2), dots=shown))
        yield figures.figure(
            f"Acceptance, {name}",
            "OOD images accepted",
            "ID images accepted",
            lines,
            (0.0, 1.0),
            note=f"Points: the stored thresholds. n = {measured.id.n:,} ID images ({measured.id.set}).",
        )


def _curve(measured: Acceptances, part: AcceptanceQuantiles) -> dict[str, Any]:
    """Acceptance rates of the ID images ("id") and of a set ("ood") as the threshold rises."""
    at = np.unique([*measured.id.quantiles, *part.quantiles])
    at = np.concatenate([[at[0] - 1], at, [at[-1] + 1]])

    def accepted(of: AcceptanceQuantiles) -> list[float]:
        below = [0.0, *(of.share_below(float(value)) for value in at[1:-1]), 1.0]
        return [round(1 - share, 6) for share in below]

    return {"set": part.set, "ball": part.ball, "id": accepted(measured.id), "ood": accepted(part)}
