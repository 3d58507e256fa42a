"""`report.html` of `ratioctl report`: one page about one model, without scripts and requests."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratioctl.errors import OutputError
from ratioctl.report.evaluation_tables import tables
from ratioctl.report.figures import figures
from ratioctl.report.html import safe_lines, templates
from ratioctl.report.markdown import environment_text
from ratioctl.report.pictures import grid, png, png_of
from ratioctl.report.table import ROLES, Table
from ratioctl.types import Explanation
from ratioctl.utils.atomic_files import make_folder, write_file

if TYPE_CHECKING:
    from ratioctl.evaluation.overview import Case, Overview

NAME = "report.html"
_MARK = b'content="ratioctl report"'
_WHOLE = 20  # classes up to which the whole confusion matrix is shown


def page(found: Overview) -> str:
    evaluation, package = found.evaluation, found.package
    (model,) = evaluation.models
    channels, height, width = package.input_size
    text = (
        templates()
        .get_template("overview.html")
        .render(
            name=package.name,
            about=(
                f"{package.architecture}, {len(package.label_names)} classes, "
                f"input {channels}x{height}x{width}, package digest {package.digest[:12]}."
            ),
            evaluation=evaluation,
            findings=[*_leaks(found.training), *model.report.warnings],
            tables=[*tables(evaluation), *_acceptance(found)],
            confusion=_confusion(found),
            figures=figures(model),
            wrong=[_shown(case) for case in found.wrong],
            outlying=[_shown(case) for case in found.outlying],
            accepted_ood=[_shown(case) for case in found.accepted_ood],
            typical=[_explained(found, *pair) for pair in found.typical],
            mistakes=[_explained(found, *pair) for pair in found.mistakes],
            training=list(_training(found.training)),
            environment=environment_text(evaluation),
            roles=ROLES,
        )
    )
    return safe_lines(text)  # names come from outside


def refuse_foreign(out: Path) -> None:
    """Raise OutputError where the page would replace a file that `ratioctl report` did not write."""
    path = out / NAME
    if path.exists() and not (path.is_file() and _MARK in path.read_bytes()[:2000]):
        raise OutputError(path, "exists and was not written by ratioctl report", "Choose another --out.")


def write(found: Overview, out: Path) -> Path:
    """Write the page into the folder `out`. Raises OutputError, DiskError."""
    refuse_foreign(out)
    make_folder(out)
    write_file(out / NAME, page(found).encode())
    return out / NAME


def _leaks(training: Mapping[str, Any]) -> Iterator[str]:
    """Duplicates that were found before training."""
    leaks = training.get("leaks") or {}
    held = leaks.get("held_out", 0)
    for key, text in (
        ("outside.exact", "have an exact copy among the OOD training images"),
        ("outside.near", "have a near duplicate among the OOD training images"),
        ("train.exact", "duplicate a training image"),
        ("init", "may have been seen by the model that training started from"),
    ):
        if leaks.get(key):
            yield f"leak check before training: {leaks[key]} of {held} held-out images {text}"


def _acceptance(found: Overview) -> list[Table]:
    """Recall, precision and acceptance rates by class; acceptance rates of the OOD sets."""
    names = sorted(found.package.thresholds)
    rows = [
        (
            row.label,
            f"{row.recall:.1%}",
            "-" if row.precision is None else f"{row.precision:.1%}",
            *(f"{row.accepted[name]:.1%}" for name in names),
            f"{row.n:,}",
        )
        for row in found.classes
    ]
    shown = ", ".join(f"{name}: {found.package.thresholds[name]:.3g}" for name in names)
    note = (
        f"Accepted: confidence at or above the threshold ({shown})." if names else "No thresholds are stored."
    )
    first = Table(
        title="Classes",
        header=("", "recall", "precision", *(f"accepted at {name}" for name in names), "n"),
        rows=tuple(rows),
        note=note,
    )
    second = Table(
        title="OOD images accepted",
        header=("", *(f"accepted at {name}" for name in names)),
        rows=tuple((name, *(f"{rates[key]:.1%}" for key in names)) for name, rates in found.accepted.items()),
    )
    return [first, *([second] if names and found.accepted else [])]


def _confusion(found: Overview) -> dict[str, Any]:
    labels, counts = found.package.label_names, found.confusion
    if len(labels) <= _WHOLE:
        return {
            "title": "Confusion matrix",
            "header": ["true class", *labels],
            "rows": [[label, *map(str, row)] for label, row in zip(labels, counts.tolist(), strict=True)],
            "square": True,
            "note": "Rows: true class. Columns: predicted class.",
        }
    off = counts.copy()
    off[range(len(labels)), range(len(labels))] = 0
    largest = sorted(zip(*off.nonzero(), strict=True), key=lambda at: -off[at])[:_WHOLE]
    return {
        "title": "Most frequent confusions",
        "header": ["true class", "predicted", "images", "of"],
        "rows": [[labels[t], labels[p], str(off[t, p]), str(counts[t].sum())] for t, p in largest],
        "square": False,
        "note": f"The {len(largest)} largest of {int((off > 0).sum())} pairs.",
    }


def _shown(case: Case) -> dict[str, Any]:
    return {
        "image": _uri(png(case.image)),
        "name": case.name,
        "dataset": case.dataset,
        "truth": case.truth,
        "predicted": case.predicted,
        "confidence": f"{case.confidence:.2f}",
        "is_ood": case.is_ood,
    }


def _explained(found: Overview, case: Case, explanation: Explanation) -> dict[str, Any]:
    (target,) = explanation.targets
    picture = grid(explanation, target, labels=found.package.label_names, norm="2")
    return {
        **_shown(case),
        "target": target.target,
        "radius": None if target.flip_eps is None else f"l2 {target.flip_eps:.3g}",
        "grid": _uri(png_of(picture)),
    }


def _training(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts = training.get("images") or {}
    for key, title in (
        ("train", "Training images"),
        ("held_out", "Held-out images"),
        ("outside", "OOD training images"),
    ):
        if key in counts:
            yield title, f"{counts[key]:,}"
    if training.get("recipe"):
        yield "Recipe", f"{training['recipe']} ({str(training.get('recipe_digest', ''))[:12]})"
    if training.get("init"):
        yield "Start", str(training["init"]["name"])
    if training.get("trained") == "elsewhere":
        yield "Trained", "elsewhere"


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
