"""The tables of an evaluation; every report format renders the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ratioctl.evaluation import compare
from ratioctl.report import explanation_tables
from ratioctl.report.table import Table, ball_text, count_text, interval_text, measurement_table, percent
from ratioctl.types import Evaluated, Evaluation, Measurement

Select = Callable[[Measurement], bool]

_SUMMARY_NOTE = (
    "ECE: expected calibration error. AUROC: probability that an ID image has a higher confidence than an "
    "OOD image; 50 is chance. FPR@95TPR: ID images flagged at the threshold that flags 95 % of the OOD "
    "images (OOD images are the positive class)."
)
_COMPARISON_NOTE = (
    "* significantly worse than the best of the row: p < 0.05 in a paired test on the same images "
    "(accuracies: McNemar; AUROC: DeLong; confidence: mean difference), elsewhere 95 % intervals that do not "
    "overlap."
)
_COUNTS = (("n", False), ("n attacked", True))


def tables(evaluation: Evaluation) -> list[Table]:
    """The summary (as Table 1 of the RATIO paper), then calibration, attacks, OOD sets, operating points."""
    if evaluation.suite == "explanations":
        return explanation_tables.tables(evaluation)
    found = [] if evaluation.comparison is None else [_compared(evaluation.comparison)]
    found.append(_summary(evaluation))
    for model in evaluation.models:
        suffix = f" of {model.name}" if len(evaluation.models) > 1 else ""
        found += [_calibration(model, suffix), *_breakdown(model, suffix), *_detection(model, suffix)]
        more = (part(model, suffix) for part in (_certified, _selective, _scores, _operating))
        found += [table for table in more if table.rows]
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


def is_worst_case(m: Measurement, name: str) -> bool:
    """Whether it is the mean of `name` over the attacked OOD sets."""
    return m.name == name and m.dataset == "mean" and m.ball is not None


def _summary(evaluation: Evaluation) -> Table:
    """One row per measure, one column per model."""
    models = evaluation.models
    lines = [
        (title, higher, found)
        for title, higher, select in _measures(evaluation)
        if any(found := [next(filter(select, model.report.measurements), None) for model in models])
    ]
    if len(models) == 1:
        rows = tuple((title, percent(m), interval_text(m), f"{m.n:,}") for title, _, [m] in lines if m)
        return Table(
            title=f"Summary of {models[0].name}",
            header=("per cent", "value", "95 % interval", "n"),
            rows=rows,
            note=_SUMMARY_NOTE,
        )
    marked = {
        (r, c + 1)
        for r, (_, higher, found) in enumerate(lines)
        for c in compare.significantly_worse(found, higher, models)
    }
    return measurement_table(
        "Summary",
        ("per cent", *(model.name for model in models), "n"),
        [(title, *found, count_text(found)) for title, _, found in lines],
        note=f"{_COMPARISON_NOTE} {_SUMMARY_NOTE}",
        marked=frozenset(marked),
    )


def _compared(comparison: Mapping[str, Any]) -> Table:
    """A protocol's table: our rows, then the published ones, which are marked."""
    keys = [column["key"] for column in comparison["columns"]]
    each = any(row["dataset"] for row in comparison["rows"])
    rows: list[tuple[str, ...]] = []
    intervals: dict[tuple[int, int], str] = {}
    sources: dict[str, int] = {}
    for row in comparison["rows"]:
        cells = [row["name"], *([row["dataset"] or ""] if each else [])]
        for key in keys:
            figure = row["figures"][key]
            if figure is not None and figure["interval"] is not None:
                ends = [f"{100 * end:.1f}" for end in figure["interval"]]
                intervals[len(rows), len(cells)] = " to ".join(ends)
            cells.append("-" if figure is None else f"{100 * figure['value']:.1f}")
        origin = "this run"
        if row["published"]:
            number = sources.setdefault(row["source"], len(sources) + 1)
            origin = f"published [{number}]: {row['network']}, {row['data']}"
        rows.append((*cells, origin))
    listed = "; ".join(f"[{number}] {source}" for source, number in sources.items())
    note = f"{comparison['description']} ({comparison['source']})."
    if sources:
        note += f" Published rows are of other networks, data and attacks and were not run here: {listed}."
    titles = (column["title"] for column in comparison["columns"])
    return Table(
        title=f"Protocol {comparison['protocol']}",
        header=("per cent", *(["OOD set"] if each else []), *titles, "origin"),
        rows=tuple(rows),
        note=note,
        intervals=intervals,
    )


def _measures(evaluation: Evaluation) -> list[tuple[str, bool, Select]]:
    """Title, whether higher is better, and selection of every row of the summary."""
    rows = [m for model in evaluation.models for m in model.report.measurements]
    robust = dict.fromkeys((m.ball, m.details["attack"]) for m in rows if m.name == "robust_accuracy")
    worst = dict.fromkeys(m.ball for m in rows if is_worst_case(m, "auroc"))

    def named(name: str) -> Select:
        return lambda m: m.name == name

    def mean(name: str) -> Select:
        return lambda m: (m.name, m.dataset, m.ball) == (name, "mean", None)

    return [
        ("Accuracy", True, named("accuracy")),
        *(
            (
                f"Robust accuracy, {ball_text(ball)} ({attack})",
                True,
                lambda m, key=("robust_accuracy", ball, attack): (
                    (m.name, m.ball, m.details.get("attack")) == key
                ),
            )
            for ball, attack in robust
        ),
        ("ECE", False, named("ece")),
        ("ECE before temperature", False, named("ece_uncalibrated")),
        ("ECE, half OOD images", False, named("ece_mixture")),
        ("Mean AUROC", True, mean("auroc")),
        *(
            (
                f"Worst-case mean AUROC, {ball_text(ball)}",
                True,
                lambda m, ball=ball: is_worst_case(m, "auroc") and m.ball == ball,
            )
            for ball in worst
        ),
        ("Mean FPR@95TPR", False, mean("fpr_at_95_tpr")),
        ("Mean confidence on OOD images", False, mean("mmc")),
        *(
            (
                f"The same, worst case, {ball_text(ball)}",
                False,
                lambda m, ball=ball: is_worst_case(m, "mmc") and m.ball == ball,
            )
            for ball in worst
        ),
    ]


def _calibration(model: Evaluated, suffix: str) -> Table:
    """Calibration measures after and before the temperature; ECE in percent."""
    found = {m.name: m for m in model.report.measurements if m.dataset != "mean" and m.ball is None}
    rows: list[tuple[str, ...]] = []
    intervals = {}
    for title, name, factor, digits in (
        ("ECE, %", "ece", 100, 2),
        ("ECE, bins of equal mass, %", "adaptive_ece", 100, 2),
        ("ECE, half OOD images, %", "ece_mixture", 100, 2),
        ("NLL", "nll", 1, 4),
        ("Brier score", "brier", 1, 4),
    ):
        if name in found:
            pair = (found[name], found[f"{name}_uncalibrated"])
            for column, m in enumerate(pair, 1):
                if m.interval is not None:
                    ends = [f"{factor * end:.{digits}f}" for end in m.interval]
                    intervals[len(rows), column] = " to ".join(ends)
            rows.append((title, *(f"{factor * m.value:.{digits}f}" for m in pair), f"{pair[0].n:,}"))
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
    """Accuracy after each attack of the robust accuracy; empty where a single one ran."""
    rows = model.report.measurements
    after = {(m.ball, m.name.removeprefix("accuracy_after_")): m for m in rows if "accuracy_after_" in m.name}
    attacks = list(dict.fromkeys(attack for _, attack in after))
    before = next((m for m in rows if m.name == "accuracy_before_attack"), None)
    if len(attacks) < 2 or before is None:
        return []
    return [
        measurement_table(
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
            note="Each attack runs on the survivors of those before it: the last number is the worst case.",
        )
    ]


def _detection(model: Evaluated, suffix: str) -> list[Table]:
    """Every OOD set, clean and worst case (as Table 5 of the paper); two tables, to fit 80 columns."""
    rows = model.report.measurements
    sets = list(dict.fromkeys(m.dataset for m in rows if m.name == "auroc"))
    ball = next((m.ball for m in rows if is_worst_case(m, "auroc")), None)
    inner = next((m.ball for m in rows if m.name == "auroc_inside_attacked"), None)
    first = [
        ("AUROC", "auroc", False),
        ("AUROC worst case", "auroc", True),
        ("AUROC ties lost", "conservative_auroc", True),
        ("AUROC ID attacked", "auroc_inside_attacked", True),
        ("FPR95", "fpr_at_95_tpr", False),
        ("FPR95 worst case", "fpr_at_95_tpr", True),
    ]
    second = [
        ("AUPR OOD", "aupr_out", False),
        ("AUPR ID", "aupr_in", False),
        ("MMC", "mmc", False),
        ("MMC worst case", "mmc", True),
    ]
    attacked = (
        f"Worst case: OOD images attacked in {ball_text(ball)}; ties lost: the same, with ties counted as "
        f"errors. ID attacked: ID images attacked in {ball_text(inner)} against unchanged OOD images. "
    )
    note = f"{attacked if ball else ''}FPR95: FPR@95TPR, with OOD images as the positive class."
    counts = _COUNTS if ball else _COUNTS[:1]
    first, second = ([column for column in some if ball or not column[2]] for some in (first, second))
    return [
        measurement_table(
            title + suffix,
            ("per cent", *(title for title, _, _ in columns), *(title for title, _ in counted)),
            [
                (
                    dataset,
                    *(find(model, name, dataset, on) for _, name, on in columns),
                    *(count_text([find(model, "mmc", dataset, on)]) for _, on in counted),
                )
                for dataset in sets
            ],
            note=below,
        )
        for title, columns, below, counted in (
            ("OOD sets", first, note, ()),
            ("OOD sets, precision and confidence", second, "MMC: mean confidence. n: OOD images.", counts),
        )
    ]


def _certified(model: Evaluated, suffix: str) -> Table:
    """What a certified head guarantees, by OOD set, beside unchanged and attacked images."""
    rows = model.report.measurements
    found = [m for m in rows if m.name == "auroc_guaranteed"]
    ball = found[0].ball if found else None
    attacked = any(m.name == "auroc" and m.ball == ball is not None for m in rows)
    rates = {m.name: m.name.removeprefix("let_through_at_") for m in rows}
    names = [name for name, rest in rates.items() if name != rest and rest.endswith("_guaranteed")]
    columns = [
        ("AUROC", "auroc", False),
        *([("AUROC attacked", "auroc", True)] if attacked else []),
        ("AUROC guaranteed", "auroc_guaranteed", True),
        ("MMC", "mmc", False),
        *([("MMC attacked", "mmc", True)] if attacked else []),
        ("MMC guaranteed", "mmc_guaranteed", True),
    ]
    for name in names:
        title = rates[name].removesuffix("_guaranteed")
        columns += [(title, name.removesuffix("_guaranteed"), False), (f"{title} guaranteed", name, True)]
    return measurement_table(
        f"Certified, {ball_text(ball)}{suffix}",
        ("per cent", *(title for title, _, _ in columns), "n"),
        [
            (
                m.dataset,
                *(find(model, name, m.dataset, on) for _, name, on in columns),
                count_text([find(model, "mmc_guaranteed", m.dataset, True)]),
            )
            for m in found
        ],
        note="Guaranteed: no change of the OOD images within the ball, by whatever attack, gives a lower "
        "AUROC or a higher mean confidence (MMC) or acceptance rate at a threshold (interval bounds of the "
        "certified head). n: OOD images with bounds.",
    )


def _selective(model: Evaluated, suffix: str) -> Table:
    """Selective prediction: errors among the accepted ID images."""
    rows = [m for m in model.report.measurements if m.name == "aurc" or m.name.startswith("coverage_at_")]
    titles = [
        "AURC" if m.name == "aurc" else f"Coverage at a risk of {100 * m.details['risk']:g} %" for m in rows
    ]
    return measurement_table(
        "Selective prediction" + suffix,
        ("per cent", "value", "n"),
        [(title, m, f"{m.n:,}") for title, m in zip(titles, rows, strict=True)],
        note="Risk: share of errors among accepted ID images. Coverage: share of images accepted. AURC: area "
        "under the curve of the risk over the coverage, lower is better.",
    )


def _scores(model: Evaluated, suffix: str) -> Table:
    """OOD detection by further OOD scores beside the confidence."""
    found = model.report.measurements
    further = dict.fromkeys(m.details["score"] for m in found if "score" in m.details)
    sets = dict.fromkeys(m.dataset for m in found if m.name.startswith("auroc_") and "score" in m.details)
    names = {"msp": "", **{score: f"_{score}" for score in further}}
    attacked = any(m.ball is not None for m in found if "score" in m.details)
    columns = [
        ("AUROC", "auroc", False),
        ("AUROC worst case", "auroc", True),
        ("FPR95", "fpr_at_95_tpr", False),
    ]
    columns = [column for column in columns if attacked or not column[2]]
    return measurement_table(
        "OOD scores" + suffix,
        ("per cent", "score", *(title for title, _, _ in columns)),
        [
            (dataset, score, *(find(model, name + ending, dataset, on) for _, name, on in columns))
            for dataset in sets
            for score, ending in names.items()
        ],
        note="Worst case: each score under its own attack on OOD images. msp: maximum softmax probability.",
    )


def _operating(model: Evaluated, suffix: str) -> Table:
    """ID and OOD acceptance rates at each stored threshold."""
    all_rows = model.report.measurements
    names = sorted({m.name.partition("_at_")[2] for m in all_rows if m.name.startswith("kept_at_")})
    sets = dict.fromkeys(
        (m.dataset, m.name.partition("_at_")[0])
        for m in all_rows
        if m.name.startswith(("kept_at_", "let_through_at_"))
    )
    at = {m.name: m for m in all_rows if m.name.startswith("kept_at_")}
    inner = next((m.ball for m in all_rows if m.ball is not None and m.name.startswith("kept_at_")), None)
    outer = next((m.ball for m in all_rows if is_worst_case(m, "auroc")), None)
    states = (False, True) if inner else (False,)
    counts = _COUNTS if inner else _COUNTS[:1]
    rows: list[tuple[str | Measurement | None, ...]] = []
    for dataset, what in sets:
        cells = [find(model, f"{what}_at_{name}", dataset, state) for name in names for state in states]
        n = [count_text([find(model, f"{what}_at_{names[0]}", dataset, state)]) for _, state in counts]
        rows.append((f"{dataset}: {'ID' if what == 'kept' else 'OOD'} acceptance rate", *cells, *n))
    thresholds = ", ".join(f"{name} {at[f'kept_at_{name}'].details['threshold']:.3g}" for name in names)
    note = (
        f"Images with a confidence of at least the threshold ({thresholds}). tpr95 accepts 95 % of the ID "
        "images of the calibration data (ID images are the positive class)."
    )
    if inner:
        note += (
            f" Attacked: ID images towards low confidence in {ball_text(inner)}, OOD images towards high "
            f"confidence in {ball_text(outer)}."
        )
    titles = [title for name in names for title in (name, f"{name} attacked")[: len(states)]]
    header = ("per cent", *titles, *(title for title, _ in counts))
    return measurement_table(f"Operating points{suffix}", header, rows, note=note)
