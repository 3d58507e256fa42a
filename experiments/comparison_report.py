"""Tables and Figure 5 of the paper from a result of `experiments.comparison`.

    python -m experiments.comparison_report RESULT.json --figure figure5.png

Prints three Markdown tables: a row for each method (means over seeds where there are several, with the 95 %
interval of one seed or the range over several), AUROC by out-distribution, and recipe, settings and digests
of every model. An asterisk marks worst cases where the evaluation's self-check found the attack too weak.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "plain": "Plain",
    "oe": "OE",
    "acet": "ACET",
    "at": "AT",
    "at-0.5": "AT-0.5",
    "at-0.25": "AT-0.25",
    "trades-0.5": "TRADES-0.5",
    "ratio": "RATIO",
    "jem": "JEM-0",
    "ratio-0.5": "RATIO-0.5",
    "ratio-0.25": "RATIO-0.25",
    "ratio-0.25-short": "RATIO-0.25 from scratch",
    "plain-then-ratio-0.25": "Plain, then RATIO-0.25",
    "at-0.25-then-ratio-0.25": "AT-0.25, then RATIO-0.25",
}
COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]] = (
    ("clean", lambda m: m["name"] == "accuracy"),
    ("robust", lambda m: m["name"] == "robust_accuracy"),
    ("AUROC", lambda m: (m["name"], m["dataset"], m["ball"]) == ("auroc", "mean", None)),
    ("worst case", lambda m: m["name"] == "auroc" and m["dataset"] == "mean" and m["ball"] is not None),
    ("MMC", lambda m: (m["name"], m["dataset"], m["ball"]) == ("mmc", "mean", None)),
    ("worst-case MMC", lambda m: (m["name"], m["dataset"]) == ("mmc", "mean") and m["ball"] is not None),
    ("ECE before", lambda m: m["name"] == "ece_uncalibrated"),
    ("ECE", lambda m: m["name"] == "ece"),
)


WORST = ("worst case", "worst-case MMC")


def too_weak(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the evaluation's self-check found the attack on the OOD images too weak."""
    return any(w.startswith("worst case") and "too weak" in w for row in rows for w in row["warnings"])


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by method, all seeds together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"-seed\d+$", "", row["name"]), []).append(row)
    return groups


def cell(rows: Sequence[Mapping[str, Any]], select: Callable[[Mapping[str, Any]], bool]) -> str:
    found = [next((m for m in row["measurements"] if select(m)), None) for row in rows]
    known = [m for m in found if m is not None]
    if not known:
        return "-"
    values = [100 * m["value"] for m in known]
    if len(values) > 1:
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    interval = known[0]["interval"]
    span = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{values[0]:.1f}{span}"


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| method | steps in / out | 1,000 passes | T | " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|---" * (4 + len(COLUMNS)) + "|",
    ]
    for method, rows in grouped(result["rows"]).items():
        steps = " / ".join(map(str, rows[0]["attack_steps"]))
        temperatures = ", ".join(f"{row['temperature']:.2f}" for row in rows)
        cost = sum(row.get("total_passes", row["passes"]) for row in rows) / len(rows) / 1000
        mark = "\\*" if too_weak(rows) else ""
        cells = [cell(rows, select) + (mark if name in WORST else "") for name, select in COLUMNS]
        first = [NAMES.get(method, method), steps, f"{cost:,.0f}", temperatures]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join(lines)


def _auroc_of(name: str, clean: bool, m: Mapping[str, Any]) -> bool:
    return m["name"] == "auroc" and m["dataset"] == name and (m["ball"] is None) is clean


def by_set(result: Mapping[str, Any]) -> str:
    """AUROC in percent by out-distribution, clean and worst case, as in `table`."""
    kinds = {
        (m["dataset"], m["ball"] is None): m
        for row in result["rows"]
        for m in row["measurements"]
        if m["name"] == "auroc" and m["dataset"] != "mean"
    }
    titles = (
        f"{name}, n {m['n']:,}" + ("" if clean else f", worst case at l{m['ball']['p']} {m['ball']['eps']:g}")
        for (name, clean), m in kinds.items()
    )
    lines = ["| AUROC | " + " | ".join(titles) + " |", "|---" * (1 + len(kinds)) + "|"]
    for method, rows in grouped(result["rows"]).items():
        cells = [cell(rows, functools.partial(_auroc_of, *kind)) for kind in kinds]
        lines.append("| " + " | ".join([NAMES.get(method, method), *cells]) + " |")
    return "\n".join(lines)


def models(result: Mapping[str, Any]) -> str:
    """Recipe, settings and the first twelve digits of the digests of each row."""
    lines = ["| model | recipe | settings | recipe's digest | package's digest |", "|---" * 5 + "|"]
    for row in result["rows"]:
        settings = ", ".join(
            [*row["settings"], *([f"init={row['start']['name']}"] if row.get("start") else [])]
        )
        digests = (row["recipe_digest"][:12], row["package_digest"][:12])
        lines.append("| " + " | ".join([row["name"], row["recipe"], settings or "-", *digests]) + " |")
    return "\n".join(lines)


def family(method: str) -> str:
    """A method without its radius."""
    return method.split("-")[0]


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Figure 5: confidence over the radius, of the true class (ID) and of the highest class (OOD).

    Shows the first of several seeds; a color for each method, dashed for the smaller of two training radii.
    """
    if not any(row["radius"].get("inside") for row in result["rows"]):
        sys.exit(f"{path}: the result has no confidences by radius. Use that of `small` or `digits`.")
    try:
        import matplotlib
    except ImportError:
        sys.exit("--figure needs matplotlib. Run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = (
        "in-distribution: the true class, attacked down",
        "out-distribution: the highest class, attacked up",
    )
    groups = grouped(result["rows"])
    families = list(dict.fromkeys(family(method) for method in groups))
    palette = plt.get_cmap("Dark2")
    colors = {name: palette(k) for k, name in enumerate(families)}
    for axis, side, title in zip(axes, ("inside", "outside"), titles, strict=True):
        for method, rows in groups.items():
            curve = rows[0]["radius"].get(side)
            if curve is None:
                continue
            several = sum(family(other) == family(method) for other in groups) > 1
            dashes = "--" if several and method.endswith("0.25") else "-"
            color = colors[family(method)]
            axis.plot(
                curve["radii"],
                curve["mean"],
                dashes,
                color=color,
                label=NAMES.get(method, method) + ("*" if too_weak(rows) else ""),
                marker="o",
                markersize=3,
                linewidth=2.2 if family(method) == "ratio" else 1.4,
            )
            axis.fill_between(curve["radii"], curve["low"], curve["high"], color=color, alpha=0.08, lw=0)
        axis.set(title=title, xlabel="l2 radius", ylim=(0, 1))
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean confidence")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if not options.result.is_file():
        sys.exit(f"{options.result}: no such file. Examples are in experiments/results.")
    result = json.loads(options.result.read_text(encoding="utf-8"))
    if not str(result.get("benchmark")).startswith("comparison"):
        sys.exit(f"{options.result}: not a result of experiments.comparison.")
    print(table(result), by_set(result), models(result), sep="\n\n")
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()
