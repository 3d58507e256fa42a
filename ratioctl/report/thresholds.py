"""The thresholds of a model: a table, JSON, and a page with ID acceptance over OOD acceptance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ratioctl.package import Spec
from ratioctl.package.records import (
    AcceptanceQuantiles,
    Acceptances,
    ThresholdRecord,
    acceptances,
    records,
)
from ratioctl.report import figures
from ratioctl.report.html import safe_lines, templates
from ratioctl.report.table import Table
from ratioctl.utils.text import threshold_text

_NOTE = (
    "Shares of the calibration images that each threshold accepts, with exact (Clopper-Pearson) 95 % "
    "intervals. ID: in distribution; OOD: out of distribution."
)
_OLD = (
    "This model was calibrated before acceptance rates were stored; `ratioctl calibrate` stores them. Rates "
    "shown here are those that `ratioctl evaluate` measured, on its test images."
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
    """A row for every threshold and set: of the calibration images, or else of what `evaluate` measured."""
    rows: list[tuple[str, ...]] = []
    known = {record.name: record for record in records(spec)}
    for name, value in spec.thresholds_of(spec.score).items():
        record = known.get(name)
        rates = _measured(spec, name) if record is None else _calibrated(record)
        head = (name, "-" if record is None else record.rule, threshold_text(value, ".6g"))
        head = head if value.classes is None else (*head[:2], f"{head[2]} (per class)")
        rows += [(*head, *cells) if k == 0 else ("", "", "", *cells) for k, cells in enumerate(rates)]
        rows += [] if rates else [(*head, "-", "-", "-", "-")]
    return Table(
        title=f"Thresholds of {spec.name}, score {spec.score}",
        header=("threshold", "rule", "value", "images", "accepted, %", "95 % interval", "n"),
        rows=tuple(rows),
        note=_NOTE if known else _OLD,
    )


def _calibrated(record: ThresholdRecord) -> list[tuple[str, ...]]:
    return [
        _cells(f"{part.title} ({'OOD' if k else 'ID'})", part.rate, part.interval, part.n)
        for k, part in enumerate((record.id, *record.ood))
    ]


def _measured(spec: Spec, name: str) -> list[tuple[str, ...]]:
    """Rates that `evaluate --write` stored; parts that are damaged are left out."""
    found = spec.config["ratio"].get("metrics")
    stored = found.get("measurements") if isinstance(found, dict) else None
    rows = []
    for row in stored if isinstance(stored, list) else ():
        for prefix, kind in (("kept_at_", "ID"), ("let_through_at_", "OOD")):
            if isinstance(row, dict) and row.get("name") == prefix + name and row.get("dataset") != "mean":
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    ball = row["ball"]
                    attacked = f", attacked in l{ball['p']} {ball['eps']:.4g}" if ball else ""
                    title = f"{row['dataset']}{attacked} ({kind})"
                    rows.append(_cells(title, row["value"], row["interval"], row["n"]))
    return rows


def _cells(title: str, rate: float, interval: Sequence[float], n: int) -> tuple[str, ...]:
    low, high = (f"{100 * end:.1f}" for end in interval)
    return title, f"{100 * rate:.1f}", f"{low} to {high}", f"{n:,}"


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
