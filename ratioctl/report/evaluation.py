"""Evaluations for people and programs: terminal tables, JSON, Markdown, HTML, Parquet.

Every format draws on the same `tables`, so the terminal and the page cannot disagree.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratioctl import metrics
from ratioctl.report import explanation_tables
from ratioctl.report.table import Table, ball_text
from ratioctl.types import Evaluated, Evaluation, Measurement
from ratioctl.utils.atomic_files import make_folder, write_files
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

Select = Callable[[Measurement], bool]


def tables(evaluation: Evaluation) -> list[Table]:
    """What a reader wants first: the paper's Table 1, then each out-distribution, then operating points."""
    if evaluation.suite == "explanations":
        return explanation_tables.tables(evaluation)
    found = [_summary(evaluation)]
    for model in evaluation.models:
        suffix = f" of {model.name}" if len(evaluation.models) > 1 else ""
        found += [_calibration(model, suffix), *_breakdown(model, suffix), *_detection(model, suffix)]
        operating = _operating(model, suffix)
        if operating.rows:
            found.append(operating)
    return found


def find(
    model: Evaluated, name: str, dataset: str | None = None, attacked: bool = False
) -> Measurement | None:
    """The first measurement of that name, on that set, clean or attacked; None where there is none."""
    for row in model.report.measurements:
        if (
            row.name == name
            and (dataset is None or row.dataset == dataset)
            and (row.ball is not None) == attacked
        ):
            return row
    return None


# --- tables ------------------------------------------------------------------------------------------------


def _summary(evaluation: Evaluation) -> Table:
    """The form of the paper's Table 1: a row a measure, a column a model."""
    lines: list[tuple[str, bool, list[Measurement | None]]] = []

    def line(title: str, higher: bool, select: Select) -> None:
        found = [next(filter(select, model.report.measurements), None) for model in evaluation.models]
        if any(found):
            lines.append((title, higher, found))

    line("Accuracy", True, lambda m: m.name == "accuracy")
    balls = dict.fromkeys(
        (m.ball, m.details["attack"])
        for model in evaluation.models
        for m in model.report.measurements
        if m.name == "robust_accuracy"
    )
    for ball, attack in balls:
        line(
            f"Robust accuracy, {ball_text(ball)} ({attack})",
            True,
            lambda m, ball=ball, attack=attack: (  # type: ignore[misc]
                (m.name, m.ball, m.details.get("attack")) == ("robust_accuracy", ball, attack)
            ),
        )
    line("ECE", False, lambda m: m.name == "ece")
    line("ECE before temperature", False, lambda m: m.name == "ece_uncalibrated")
    line("ECE, half out-images", False, lambda m: m.name == "ece_mixture")
    line("Mean AUROC", True, lambda m: (m.name, m.dataset, m.ball) == ("auroc", "mean", None))
    worst = dict.fromkeys(
        m.ball for model in evaluation.models for m in model.report.measurements if _is_worst(m, "auroc")
    )
    for ball in worst:
        line(
            f"Worst-case mean AUROC, {ball_text(ball)}",
            True,
            lambda m, ball=ball: _is_worst(m, "auroc") and m.ball == ball,  # type: ignore[misc]
        )
    line("Mean FPR@95TPR", False, lambda m: (m.name, m.dataset, m.ball) == ("fpr_at_95_tpr", "mean", None))
    line(
        "Mean confidence on out-images", False, lambda m: (m.name, m.dataset, m.ball) == ("mmc", "mean", None)
    )
    for ball in worst:
        line(
            f"The same, worst case, {ball_text(ball)}",
            False,
            lambda m, ball=ball: _is_worst(m, "mmc") and m.ball == ball,  # type: ignore[misc]
        )
    if len(evaluation.models) == 1:
        rows = tuple((title, _percent(m), _interval(m), f"{m.n:,}") for title, _, [m] in lines if m)
        return Table(
            title=f"Summary of {evaluation.models[0].name}",
            header=("per cent", "value", "95 % interval", "n"),
            rows=rows,
            note=_SUMMARY_NOTE,
        )
    marked = {
        (r, c + 1)
        for r, (_, higher, found) in enumerate(lines)
        for c in _worse(found, higher, evaluation.models)
    }
    return _table(
        "Summary",
        ("per cent", *(model.name for model in evaluation.models), "n"),
        [(title, *found, _count(found)) for title, _, found in lines],
        note=(
            "* significantly worse than the best of the row: p < 0.05 in a paired test on the same images "
            "(accuracies: McNemar; AUROC: DeLong; confidence: mean difference), elsewhere 95 % intervals "
            f"that do not overlap. {_SUMMARY_NOTE}"
        ),
        marked=frozenset(marked),
    )


_SUMMARY_NOTE = (
    "ECE: how far confidence is from accuracy. AUROC: how often an in-image gets more confidence than an "
    "out-image, 50 is guessing. FPR@95TPR: in-images flagged where 95 % of the out-images are."
)


def _table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Measurement | None]],
    note: str = "",
    marked: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    """A table of texts and of measurements in per cent."""
    return Table(
        title=title,
        header=tuple(header),
        rows=tuple(tuple(cell if isinstance(cell, str) else _percent(cell) for cell in row) for row in rows),
        note=note,
        intervals={
            (r, c): _interval(cell)
            for r, row in enumerate(rows)
            for c, cell in enumerate(row)
            if isinstance(cell, Measurement) and cell.interval is not None
        },
        marked=marked,
    )


def _is_worst(m: Measurement, name: str) -> bool:
    return m.name == name and m.dataset == "mean" and m.ball is not None


def _worse(found: Sequence[Measurement | None], higher: bool, models: Sequence[Evaluated] = ()) -> list[int]:
    """Which entries are significantly worse than the best one.

    By a paired test where `models` (one an entry) saw the same images, else where an entry's interval lies
    wholly on the wrong side of the best entry's.
    """
    known = [k for k, m in enumerate(found) if m is not None]
    first = max(known, key=lambda k: found[k].value if higher else -found[k].value)  # type: ignore[union-attr]
    best, worse = found[first], []
    assert best is not None
    for k in known:
        m = found[k]
        assert m is not None
        if m.value == best.value:
            continue
        p = _paired(best, m, models[first], models[k]) if models else None
        if p is not None:
            apart = p < 0.05
        elif m.interval is None or best.interval is None:
            apart = False
        else:
            apart = m.interval[1] < best.interval[0] if higher else m.interval[0] > best.interval[1]
        if apart:
            worse.append(k)
    return worse


def _paired(one: Measurement, other: Measurement, first: Evaluated, second: Evaluated) -> float | None:
    """The p-value that two models' measurements are equal; None where no test on the same images exists."""
    if one.name in ("accuracy", "robust_accuracy"):
        attack = "clean" if one.ball is None else f"{one.ball}: {one.details['attack']}"
        a, b = (_rows(model, one.dataset, attack) for model in (first, second))
        if a is None or b is None or not _same(a, b):
            return None
        return metrics.mcnemar(a["verdict"] > 0, b["verdict"] > 0)
    if one.name not in ("auroc", "mmc") or "sets" not in one.details:
        return None
    attack = "clean" if one.ball is None else f"{one.ball}: worst case"
    outside = [[_rows(model, name, attack) for name in one.details["sets"]] for model in (first, second)]
    inside = [_rows(model, one.details["inside"], "clean") for model in (first, second)]
    pairs = [*zip(*outside, strict=True), tuple(inside)]
    if any(a is None or b is None or not _same(a, b) for a, b in pairs):
        return None
    if one.name == "mmc":
        return metrics.paired_mean_test(*([rows["confidence"] for rows in rows_of] for rows_of in outside))  # type: ignore[index]
    return metrics.paired_auroc_test(
        *(
            (-i["log_odds"], [-rows["log_odds"] for rows in o])  # type: ignore[index]
            for i, o in zip(inside, outside, strict=True)
        )
    )


def _rows(model: Evaluated, dataset: str, attack: str) -> dict[str, np.ndarray] | None:
    """A model's examples of one set under one attack; None where there are none."""
    at = (model.examples["dataset"] == dataset) & (model.examples["attack"] == attack)
    return {key: column[at] for key, column in model.examples.items()} if at.any() else None


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a["index"].shape == b["index"].shape and bool((a["index"] == b["index"]).all())


def _calibration(model: Evaluated, suffix: str) -> Table:
    """Every figure of calibration, after and before the temperature."""
    found = {m.name: m for m in model.report.measurements if m.dataset != "mean" and m.ball is None}
    rows: list[tuple[str, ...]] = []
    intervals = {}
    for title, name in (
        ("ECE", "ece"),
        ("ECE, bins of equal mass", "adaptive_ece"),
        ("ECE, half out-images", "ece_mixture"),
        ("NLL", "nll"),
        ("Brier score", "brier"),
    ):
        if name in found:
            pair = (found[name], found[f"{name}_uncalibrated"])
            for column, m in enumerate(pair, 1):
                if m.interval is not None:
                    intervals[len(rows), column] = "{:.4f} to {:.4f}".format(*m.interval)
            rows.append((title, *(f"{m.value:.4f}" for m in pair), f"{pair[0].n:,}"))
    note = ""
    if "ece" in found:
        bins, (low, high) = found["ece"].details["bins"], found["ece"].details["range"]
        note = f"{bins} bins on [{low:.4g}, {high:g}]."
    return Table(
        title=f"Calibration{suffix}",
        header=("", "after temperature", "before", "n"),
        rows=tuple(rows),
        note=note,
        intervals=intervals,
    )


def _breakdown(model: Evaluated, suffix: str) -> list[Table]:
    """What each attack of the robust accuracy left standing; none where a single one ran."""
    rows = model.report.measurements
    after = {(m.ball, m.name.removeprefix("accuracy_after_")): m for m in rows if "accuracy_after_" in m.name}
    attacks = list(dict.fromkeys(attack for _, attack in after))
    before = next((m for m in rows if m.name == "accuracy_before_attack"), None)
    if len(attacks) < 2 or before is None:
        return []
    return [
        _table(
            f"Robust accuracy by attack{suffix}",
            ("per cent", "before", *(attack.upper().replace("_", "-") for attack in attacks), "n"),
            [
                (
                    ball_text(ball),
                    before,
                    *(after.get((ball, attack)) for attack in attacks),
                    f"{before.n:,}",
                )
                for ball in dict.fromkeys(ball for ball, _ in after)
            ],
            note="Each attack meets what those before it left standing: the last number is the worst case.",
        )
    ]


def _detection(model: Evaluated, suffix: str) -> list[Table]:
    """The form of Table 5: every out-distribution, clean and worst case; two tables, for 80 columns."""
    sets = list(dict.fromkeys(m.dataset for m in model.report.measurements if m.name == "auroc"))
    first = (
        ("AUROC", "auroc", False),
        ("AUROC worst case", "auroc", True),
        ("AUROC ties lost", "conservative_auroc", True),
        ("AUROC in attacked", "auroc_inside_attacked", True),
        ("FPR@ 95TPR", "fpr_at_95_tpr", False),
        ("FPR@ 95TPR worst case", "fpr_at_95_tpr", True),
    )
    second = (
        ("AUPR out", "aupr_out", False),
        ("AUPR in", "aupr_in", False),
        ("MMC", "mmc", False),
        ("MMC worst case", "mmc", True),
    )
    ball = next((m.ball for m in model.report.measurements if _is_worst(m, "auroc")), None)
    inner = next((m.ball for m in model.report.measurements if m.name == "auroc_inside_attacked"), None)
    note = (
        f"Worst case: out-images attacked in {ball_text(ball)}; ties lost: the same, ties counting against "
        f"us. In attacked: in-images in {ball_text(inner)} against unchanged out-images."
    )
    return [
        _table(
            title + suffix,
            ("per cent", *(name for name, _, _ in columns), *(name for name, _ in counted)),
            [
                (
                    dataset,
                    *(find(model, name, dataset, attacked) for _, name, attacked in columns),
                    *(_count([find(model, "mmc", dataset, attacked)]) for _, attacked in counted),
                )
                for dataset in sets
            ],
            note=below,
        )
        for title, columns, below, counted in (
            ("Out-distributions", first, note, ()),
            (
                "Out-distributions, precision and confidence",
                second,
                "MMC: mean confidence. n: out-images.",
                _COUNTS,
            ),
        )
    ]


_COUNTS = (("n", False), ("n attacked", True))


def _count(found: Sequence[Measurement | None]) -> str:
    """On how many examples: "10,000", or "355 to 10,000"."""
    counts = sorted({m.n for m in found if m is not None})
    return " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))) if counts else "-"


def _operating(model: Evaluated, suffix: str) -> Table:
    """What a pipeline is run by: shares kept and let through at each stored threshold."""
    names = sorted(
        {m.name.partition("_at_")[2] for m in model.report.measurements if m.name.startswith("kept_at_")}
    )
    sets = dict.fromkeys(
        (m.dataset, m.name.partition("_at_")[0])
        for m in model.report.measurements
        if m.name.startswith(("kept_at_", "let_through_at_"))
    )
    rows: list[tuple[str | Measurement | None, ...]] = []
    for dataset, what in sets:
        cells = [
            find(model, f"{what}_at_{name}", dataset, attacked)
            for name in names
            for attacked in (False, True)
        ]
        counts = [
            _count([find(model, f"{what}_at_{names[0]}", dataset, attacked)]) for _, attacked in _COUNTS
        ]
        rows.append((f"{dataset}: {'kept' if what == 'kept' else 'let through'}", *cells, *counts))
    attacked_rows = [m for m in model.report.measurements if m.ball is not None]
    at = {m.name: m for m in attacked_rows if m.name.startswith("kept_at_")}
    inner = next((m.ball for m in at.values()), None)
    outer = next((m.ball for m in model.report.measurements if _is_worst(m, "auroc")), None)
    thresholds = ", ".join(f"{name} {at[f'kept_at_{name}'].details['threshold']:.3g}" for name in names)
    return _table(
        f"Operating points{suffix}",
        (
            "per cent",
            *(title for name in names for title in (name, f"{name} attacked")),
            *(title for title, _ in _COUNTS),
        ),
        rows,
        note=(
            f"Shares with a confidence of at least the threshold ({thresholds}). Attacked: in-images made to "
            f"look outlying in {ball_text(inner)}, out-images to look familiar in {ball_text(outer)}."
        ),
    )


def _percent(m: Measurement | None) -> str:
    return "-" if m is None else f"{100 * m.value:.1f}"


def _interval(m: Measurement) -> str:
    return "-" if m.interval is None else f"{100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f}"


# --- terminal, JSON, Markdown ------------------------------------------------------------------------------


def rich_tables(evaluation: Evaluation) -> list[RenderableType]:
    """For a rich console: tables and their notes."""
    from rich.table import Table as Rich
    from rich.text import Text

    drawn: list[RenderableType] = [
        Text(safe_text(f"Suite {evaluation.suite}: {evaluation.protocol}."), style="dim")
    ]
    for table in tables(evaluation):
        grid = Rich(title=Text(safe_text(table.title), style="bold"), title_justify="left")
        for k, title in enumerate(table.header):
            grid.add_column(
                Text(safe_text(title)),
                justify="left" if k == 0 else "right",
                min_width=5,
                overflow="fold",  # a name is never cut off
            )
        room = len({c for _, c in table.intervals}) <= 2
        for r, row in enumerate(table.rows):
            cells = []
            for c, text in enumerate(row):
                worse = (r, c) in table.marked
                cell = text + (f" ({table.intervals[r, c]})" if room and (r, c) in table.intervals else "")
                cells.append(Text(safe_text(cell) + (" *" if worse else ""), style="red" if worse else ""))
            grid.add_row(*cells)
        drawn.append(grid)
        if table.note:
            drawn.append(Text(safe_text(table.note), style="dim"))
    return drawn


def markdown(evaluation: Evaluation) -> str:
    """`report.md`: the tables, the doubts, the data."""
    lines = [f"# Evaluation of {', '.join(_md(model.name) for model in evaluation.models)}", ""]
    lines += [f"Suite {_md(evaluation.suite)}: {_md(evaluation.protocol)}. Brackets hold 95 % intervals.", ""]
    for model in evaluation.models:
        prefix = f"{model.name}: " if len(evaluation.models) > 1 else ""
        lines += [f"- **Warning:** {_md(prefix + warning)}" for warning in model.report.warnings]
    for table in tables(evaluation):
        lines += ["", f"## {_md(table.title)}", "", "| " + " | ".join(map(_md, table.header)) + " |"]
        lines += ["|---" + "|---:" * (len(table.header) - 1) + "|"]
        for r, row in enumerate(table.rows):
            cells = [
                _md(cell)
                + (f" ({table.intervals[r, c]})" if (r, c) in table.intervals else "")
                + (" \\*" if (r, c) in table.marked else "")
                for c, cell in enumerate(row)
            ]
            lines.append("| " + " | ".join(cells) + " |")
        if table.note:
            lines += ["", _md(table.note)]
    lines += [
        "",
        "## Data and environment",
        "",
        "| set | source | role | n | fingerprint |",
        "|---|---|---|---:|---|",
    ]
    for entry in evaluation.data:
        cells = [entry["name"], entry["source"], entry["role"], f"{entry['n']:,}", entry["fingerprint"][:12]]
        lines.append("| " + " | ".join(map(_md, cells)) + " |")
    lines += [""]
    for model in evaluation.models:
        report = model.report
        lines += [f"- {_md(model.name)}: package digest `{report.package_digest}`, seed {report.seed}"]
    return "\n".join([*lines, f"- {_md(_environment(evaluation))}", ""])


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|#~<>])", r"\\\1", safe_text(text))


def _environment(evaluation: Evaluation) -> str:
    def flat(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(
                f"{key.replace('_', ' ')} {flat(item)}" for key, item in value.items() if item is not None
            )
        return str(value)

    return flat(evaluation.environment)


def parquet(evaluation: Evaluation) -> bytes:
    """`examples.parquet`: a row an example and attack."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [model.examples for model in evaluation.models]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays = {
        key: pa.array(column).dictionary_encode() if column.dtype == object else pa.array(column)
        for key, column in columns.items()
        if key not in ("label", "verdict")
    }
    arrays["label"] = pa.array(columns["label"], mask=columns["label"] < 0)
    arrays["verdict"] = pa.array(columns["verdict"] > 0, mask=columns["verdict"] < 0)
    stream = io.BytesIO()
    pq.write_table(pa.table({key: arrays[key] for key in columns}), stream)
    return stream.getvalue()


def write(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write every output into the folder `out`; without room for all of them the old ones stay.

    Raises:
        OutputError, DiskError: it cannot be written.
    """
    make_folder(out)
    document = json.dumps(finite(evaluation.to_json()), indent=1, allow_nan=False)
    contents = {
        "report.json": document.encode(),
        "report.md": markdown(evaluation).encode(),
        "report.html": page(evaluation).encode(),
        "examples.parquet": parquet(evaluation),
    }
    write_files({out / name: content for name, content in contents.items()})
    return [out / name for name in contents]


def finite(value: Any) -> Any:
    """A JSON document with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


# --- the page ----------------------------------------------------------------------------------------------


def page(evaluation: Evaluation) -> str:
    """`report.html`: one file, figures and pictures inside, no script, nothing fetched."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    galleries = []
    for model in evaluation.models:
        sets: dict[str, list[dict[str, str]]] = {}
        for picture in model.gallery:
            shown = {
                "image": _data_uri(picture.image),
                "attacked": _data_uri(picture.attacked),
                "before": f"{picture.before:.2f}",
                "after": f"{picture.after:.2f}",
                "label": picture.label,
            }
            sets.setdefault(picture.dataset, []).append(shown)
        galleries.append(sets)
    text = templates.get_template("evaluation.html").render(
        evaluation=evaluation,
        tables=tables(evaluation),
        figures=[figures(model) for model in evaluation.models],
        galleries=galleries,
        environment=_environment(evaluation),
    )
    return "\n".join(map(safe_text, text.split("\n")))  # names of models and sets come from outside


def _data_uri(image: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure: points in data units, a colour 0 to 2, and how it is drawn.

    Attributes:
        low, high: a band around the line.
        bars: right edges; each point then is a bar from its x to there, down to 0.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    bars: Sequence[float] = ()


def figures(model: Evaluated) -> list[dict[str, Any]]:
    """The page's figures of one model: "title", "svg", "legend" and "note"."""
    drawn, found = [], model.figures
    if "reliability" not in found:  # of the suite "explanations"
        return []
    reliable = found["reliability"]["calibrated"]
    raw = found["reliability"]["uncalibrated"]
    used = [k for k, n in enumerate(raw["count"]) if n]
    bins = Series(
        name=f"accuracy (temperature {reliable['temperature']:.3g}, ECE {reliable['ece']:.1%})",
        x=reliable["edges"][:-1],
        y=reliable["accuracy"],
        bars=reliable["edges"][1:],
    )
    before = Series(
        name=f"before temperature (ECE {raw['ece']:.1%})",
        x=[raw["confidence"][k] for k in used],
        y=[raw["accuracy"][k] for k in used],
        colour=1,
        dashed=True,
    )
    low = reliable["edges"][0]
    rows = model.report.measurements
    outer = next((m.ball for m in rows if _is_worst(m, "auroc")), None)
    inner = next((m.ball for m in rows if m.name == "auroc_inside_attacked"), None)
    drawn.append(
        _figure(
            "Reliability",
            "confidence",
            "accuracy",
            [bins, before],
            (low, 1.0),
            (0.0, 1.0),
            diagonal="as sure as right",
        )
    )
    if found["radius"]:
        lines = []
        for key, name, colour in (
            ("inside", "in-images: true class, lowest", 0),
            ("outside", "out-images: largest", 1),
        ):
            curve = found["radius"][key]
            lines.append(
                Series(
                    name=f"{name} (n {curve['n']})",
                    x=curve["radii"],
                    y=curve["mean"],
                    low=curve["low"],
                    high=curve["high"],
                    colour=colour,
                    dashed=colour == 1,
                )
            )
        span = (0.0, max(found["radius"]["inside"]["radii"]))
        drawn.append(
            _figure("Confidence over the radius", "l2 radius", "mean confidence", lines, span, (0.0, 1.0))
        )
    for dataset, curves in found["roc"].items():
        lines = [
            Series(name=name, x=curve["fpr"], y=curve["tpr"], colour=k, dashed=k == 1)
            for k, (name, curve) in enumerate(curves.items())
        ]
        title = f"ROC, {dataset}"
        drawn.append(
            _figure(
                title,
                "in-images flagged",
                "out-images flagged",
                lines,
                (0.0, 1.0),
                (0.0, 1.0),
                diagonal="guessing",
                note=f"Attacked: out-images in {ball_text(outer)}.",
            )
        )
    for dataset, shares in found["histograms"].items():
        lines = []
        for k, (name, values) in enumerate(shares.items()):
            edges = [low + (1 - low) * i / len(values) for i in range(len(values) + 1)]
            if k == 0:
                lines.append(Series(name=name, x=edges[:-1], y=values, bars=edges[1:]))
            else:
                steps_x = [edge for i in range(len(values)) for edge in (edges[i], edges[i + 1])]
                steps_y = [value for value in values for _ in range(2)]
                lines.append(Series(name=name, x=steps_x, y=steps_y, colour=1))
        top = 1.05 * max(max(series.y) for series in lines) or 1.0
        title = f"Confidences, {dataset}"
        how = (
            f"in {ball_text(outer)} to look familiar"
            if dataset in found["roc"]
            else f"in {ball_text(inner)} to look outlying"
        )
        spans = (low, 1.0), (0.0, top)
        drawn.append(_figure(title, "confidence", "share of images", lines, *spans, note=f"Attacked: {how}."))
    return drawn


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 250, 52, 12, 10, 40


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in [low, high]."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-6) + 1)]


def _figure(
    title: str,
    x_name: str,
    y_name: str,
    lines: Sequence[Series],
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    *,
    diagonal: str = "",
    note: str = "",
) -> dict[str, Any]:
    """A chart as inline SVG; colours come from the page's style, so it follows light and dark.

    Args:
        diagonal: what the diagonal stands for; none is drawn without.
        note: beneath the legend.
    """
    from markupsafe import Markup, escape

    def px(x: float) -> float:
        return _LEFT + (x - x_span[0]) / (x_span[1] - x_span[0]) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_span[0]) / (y_span[1] - y_span[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(xs, ys, strict=True))

    parts = []
    for y in _ticks(*y_span):
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(*x_span):
        anchor = "end" if px(x) > _WIDTH - _RIGHT - 8 else "middle"
        parts.append(
            f'<text x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{x:g}</text>'
        )
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    turned = f'x="12" y="{middle}" transform="rotate(-90 12 {middle})"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_name)}</text>')
    keys: list[dict[str, Any]] = []

    def key(mark: str, name: str) -> None:
        keys.append(
            {"mark": Markup(f'<svg viewBox="0 0 32 12" aria-hidden="true">{mark}</svg>'), "name": name}
        )

    for series in lines:
        dash = " dash" if series.dashed else ""
        if series.bars:
            for x, right, y in zip(series.x, series.bars, series.y, strict=True):
                box = f'x="{px(x) + 0.5:.1f}" y="{py(y):.1f}" width="{max(px(right) - px(x) - 1, 0.5):.1f}"'
                parts.append(
                    f'<rect class="bar f{series.colour}" {box} height="{py(y_span[0]) - py(y):.1f}"/>'
                )
            mark = f'<rect class="bar f{series.colour}" x="8" y="2" width="16" height="8"/>'
        else:
            if series.low:
                around = path(series.x, series.high) + " " + path(series.x[::-1], series.low[::-1])
                parts.append(f'<polygon class="f{series.colour} soft" points="{around}"/>')
            parts.append(
                f'<polyline class="line l{series.colour}{dash}" points="{path(series.x, series.y)}"/>'
            )
            mark = f'<line class="line l{series.colour}{dash}" x1="0" x2="32" y1="6" y2="6"/>'
        key(mark, series.name)
    if diagonal:
        key('<line class="diagonal dash" x1="0" x2="32" y1="6" y2="6"/>', diagonal)
        ends = (x_span[0], x_span[1])
        parts.append(f'<polyline class="diagonal dash" points="{path(ends, ends)}"/>')
    corner = path((x_span[0], x_span[0], x_span[1]), (y_span[1], y_span[0], y_span[0]))
    parts.append(f'<polyline class="axis" points="{corner}"/>')
    label = escape(f"{title}: {y_name} over {x_name}")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return {"title": title, "svg": Markup(svg), "legend": keys, "note": note}
