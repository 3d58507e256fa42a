"""The figures of `report.html` as inline SVG. Colors come from the page's style (light and dark)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ratioctl.report.evaluation_tables import is_worst_case
from ratioctl.report.table import ball_text
from ratioctl.types import Evaluated

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 250, 52, 12, 10, 40
_UNIT = (0.0, 1.0)
Span = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure: points in data units, a color 0 to 2, and its style.

    Attributes:
        low, high: a band around the line.
        bars: right edges; each point then is a bar from its x to there, down to 0.
        dots: names of the points, which then are drawn as dots; not in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    bars: Sequence[float] = ()
    dots: Sequence[str] = ()


def figures(model: Evaluated) -> list[dict[str, Any]]:
    """The figures of one model, each with "title", "svg", "legend" and "note"; none without figure data."""
    if "reliability" not in model.figures:  # suite "explanations"
        return []
    return [
        *(_reliability(model), *_risk_coverage(model), *_radius(model)),
        *(*_roc(model), *_histograms(model)),
    ]


def _reliability(model: Evaluated) -> dict[str, Any]:
    found = model.figures["reliability"]
    calibrated, raw = found["calibrated"], found["uncalibrated"]
    used = [k for k, n in enumerate(raw["count"]) if n]
    bins = Series(
        name=f"accuracy (temperature {calibrated['temperature']:.3g}, ECE {calibrated['ece']:.1%})",
        x=calibrated["edges"][:-1],
        y=calibrated["accuracy"],
        bars=calibrated["edges"][1:],
    )
    before = Series(
        name=f"before temperature (ECE {raw['ece']:.1%})",
        x=[raw["confidence"][k] for k in used],
        y=[raw["accuracy"][k] for k in used],
        color=1,
        dashed=True,
    )
    span = (calibrated["edges"][0], 1.0)
    return figure(
        "Reliability", "confidence", "accuracy", [bins, before], span, diagonal="perfect calibration"
    )


def _risk_coverage(model: Evaluated) -> Iterator[dict[str, Any]]:
    curve = model.figures.get("risk_coverage")
    if curve is None:  # of an earlier version
        return
    line = Series(name="errors among the accepted ID images", x=curve["coverage"], y=curve["risk"])
    span = (0.0, max(0.01, *curve["risk"]) * 1.05)
    yield figure("Risk over coverage", "ID images accepted", "errors among them", [line], _UNIT, span)


def _radius(model: Evaluated) -> Iterator[dict[str, Any]]:
    curves = model.figures.get("radius")
    if not curves:
        return
    lines = [
        Series(
            name=f"{name} (n {curves[key]['n']})",
            x=curves[key]["radii"],
            y=curves[key]["mean"],
            low=curves[key]["low"],
            high=curves[key]["high"],
            color=color,
            dashed=color == 1,
        )
        for key, name, color in (
            ("inside", "ID images: true class, lowest", 0),
            ("outside", "OOD images: highest", 1),
        )
    ]
    span = (0.0, max(curves["inside"]["radii"]))
    yield figure("Confidence over the radius", "l2 radius", "mean confidence", lines, span)


def _roc(model: Evaluated) -> Iterator[dict[str, Any]]:
    outer, _ = _balls(model)
    for dataset, curves in model.figures.get("roc", {}).items():
        lines = [
            Series(name=name, x=curve["fpr"], y=curve["tpr"], color=k, dashed=k == 1)
            for k, (name, curve) in enumerate(curves.items())
        ]
        yield figure(
            f"ROC, {dataset}",
            "ID images flagged",
            "OOD images flagged",
            lines,
            _UNIT,
            diagonal="chance",
            note=f"Attacked: OOD images in {outer}." if "attacked" in curves else "",
        )


def _histograms(model: Evaluated) -> Iterator[dict[str, Any]]:
    outer, inner = _balls(model)
    low = model.figures["reliability"]["calibrated"]["edges"][0]
    for dataset, shares in model.figures["histograms"].items():
        lines = []
        for k, (name, values) in enumerate(shares.items()):
            edges = [low + (1 - low) * i / len(values) for i in range(len(values) + 1)]
            if k == 0:
                lines.append(Series(name=name, x=edges[:-1], y=values, bars=edges[1:]))
            else:
                steps_x = [edge for i in range(len(values)) for edge in (edges[i], edges[i + 1])]
                steps_y = [value for value in values for _ in range(2)]
                lines.append(Series(name=name, x=steps_x, y=steps_y, color=1))
        top = 1.05 * max(max(series.y) for series in lines) or 1.0
        outside = dataset in model.figures.get("roc", {})
        how = f"towards {'high' if outside else 'low'} confidence in {outer if outside else inner}"
        yield figure(
            f"Confidences, {dataset}",
            "confidence",
            "fraction of images",
            lines,
            (low, 1.0),
            (0.0, top),
            note=f"Attacked: {how}." if "attacked" in shares else "",
        )


def _balls(model: Evaluated) -> tuple[str, str]:
    """The balls of attacked OOD and of attacked ID images."""
    rows = model.report.measurements
    outer = next((m.ball for m in rows if is_worst_case(m, "auroc")), None)
    inner = next((m.ball for m in rows if m.name == "auroc_inside_attacked"), None)
    return ball_text(outer), ball_text(inner)


# --- SVG ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Data units to SVG units."""

    x_span: Span
    y_span: Span

    def x(self, value: float) -> float:
        low, high = self.x_span
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def grid(self) -> Iterator[str]:
        """Horizontal rules and the numbers of both axes."""
        for y in _ticks(*self.y_span):
            at = f"{self.y(y):.1f}"
            yield f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>'
            yield f'<text x="{_LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for x in _ticks(*self.x_span):
            anchor = "end" if self.x(x) > _WIDTH - _RIGHT - 8 else "middle"
            place = f'x="{self.x(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}"'
            yield f'<text {place} text-anchor="{anchor}">{x:g}</text>'

    def names(self, x_name: str, y_name: str) -> Iterator[str]:
        from markupsafe import escape

        middle, center = (_HEIGHT - _BOTTOM + _TOP) / 2, (_LEFT + _WIDTH - _RIGHT) / 2
        yield f'<text x="{center}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
        turned = f'x="12" y="{middle}" transform="rotate(-90 12 {middle})"'
        yield f'<text {turned} text-anchor="middle">{escape(y_name)}</text>'

    def series(self, series: Series) -> Iterator[str]:
        from markupsafe import escape

        if series.bars:
            for x, right, y in zip(series.x, series.bars, series.y, strict=True):
                width = max(self.x(right) - self.x(x) - 1, 0.5)
                box = f'x="{self.x(x) + 0.5:.1f}" y="{self.y(y):.1f}" width="{width:.1f}"'
                height = f"{self.y(self.y_span[0]) - self.y(y):.1f}"
                yield f'<rect class="bar f{series.color}" {box} height="{height}"/>'
            return
        if series.dots:
            for x, y, name in zip(series.x, series.y, series.dots, strict=True):
                yield f'<circle class="f{series.color}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4"/>'
                if name:
                    left = self.x(x) > _WIDTH - 120
                    place = f'x="{self.x(x) + (-8 if left else 8):.1f}" y="{self.y(y) + 4:.1f}"'
                    yield f'<text {place} text-anchor="{"end" if left else "start"}">{escape(name)}</text>'
            return
        if series.low:
            around = self.path(series.x, series.high) + " " + self.path(series.x[::-1], series.low[::-1])
            yield f'<polygon class="f{series.color} soft" points="{around}"/>'
        dash = " dash" if series.dashed else ""
        points = self.path(series.x, series.y)
        yield f'<polyline class="line l{series.color}{dash}" points="{points}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in [low, high]."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-6) + 1)]


def figure(
    title: str,
    x_name: str,
    y_name: str,
    lines: Sequence[Series],
    x_span: Span,
    y_span: Span = _UNIT,
    *,
    diagonal: str = "",
    note: str = "",
) -> dict[str, Any]:
    """A chart. `diagonal` names the diagonal, which is drawn only then; `note` goes below the legend."""
    from markupsafe import Markup, escape

    axes = _Axes(x_span, y_span)
    parts = [*axes.grid(), *axes.names(x_name, y_name)]
    legend = [(_mark(series), series.name) for series in lines if not series.dots]
    for series in lines:
        parts += axes.series(series)
    if diagonal:
        legend.append(('<line class="diagonal dash" x1="0" x2="32" y1="6" y2="6"/>', diagonal))
        parts.append(f'<polyline class="diagonal dash" points="{axes.path(x_span, x_span)}"/>')
    corner = axes.path((x_span[0], x_span[0], x_span[1]), (y_span[1], y_span[0], y_span[0]))
    parts.append(f'<polyline class="axis" points="{corner}"/>')
    label = escape(f"{title}: {y_name} over {x_name}")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    keys = [
        {"mark": Markup(f'<svg viewBox="0 0 32 12" aria-hidden="true">{mark}</svg>'), "name": name}
        for mark, name in legend
    ]
    return {"title": title, "svg": Markup(svg), "legend": keys, "note": note}


def _mark(series: Series) -> str:
    """Its sample in the legend."""
    if series.bars:
        return f'<rect class="bar f{series.color}" x="8" y="2" width="16" height="8"/>'
    dash = " dash" if series.dashed else ""
    return f'<line class="line l{series.color}{dash}" x1="0" x2="32" y1="6" y2="6"/>'
