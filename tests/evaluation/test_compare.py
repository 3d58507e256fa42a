"""Paired tests between models."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from rich.console import Console

from ratioctl import metrics
from ratioctl.evaluation import compare
from ratioctl.report import evaluation_tables, markdown, terminal
from ratioctl.types import Evaluated, Evaluation, Measurement, Report


def measured(name: str, value: float, interval: tuple[float, float]) -> Measurement:
    return Measurement(name=name, value=value, n=100, interval=interval, dataset="d")


def test_only_significantly_worse_entries_are_marked() -> None:
    best, close, far = (
        measured("accuracy", 0.9, (0.85, 0.95)),
        measured("accuracy", 0.8, (0.75, 0.86)),
        measured("accuracy", 0.7, (0.6, 0.8)),
    )
    assert compare.significantly_worse([close, best, far, None], True) == [2]
    assert compare.significantly_worse([close, best, far, None], False) == [1]


def test_significantly_worse_models_are_found_by_paired_tests() -> None:
    """Two models that differ on few images, always in the same direction: intervals overlap, pairs tell."""
    n = 200
    right = np.arange(n) % 10 < 8
    found = [paired_model("good", right), paired_model("bad", right & (np.arange(n) % 20 != 0))]
    evaluation = Evaluation(suite="s", protocol="p", data=(), environment={}, models=tuple(found))
    table = evaluation_tables.tables(evaluation)[0]
    titles = [row[0] for row in table.rows]
    assert titles == ["Accuracy", "Mean AUROC", "Mean confidence on OOD images"]
    assert table.marked == {(0, 2), (1, 2), (2, 2)}
    assert table.header == ("per cent", "good", "bad", "n")
    assert set(table.intervals) == {(r, c) for r in range(3) for c in (1, 2)}
    assert [row[3] for row in table.rows] == ["200", "400", "200"]
    lines = markdown.markdown(evaluation).splitlines()
    assert [line.count("\\*") for line in lines if line.startswith("| Accuracy")] == [1]
    console = Console(width=100, file=io.StringIO(), color_system=None)
    for drawn in terminal.evaluation_tables(evaluation):
        console.print(drawn)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.count(" *") for line in said.splitlines() if "Accuracy" in line] == [1]
    assert "significantly worse" in said
    apart = [dataclasses.replace(model, examples=shuffled(model.examples)) for model in found]
    assert (
        compare.significantly_worse(
            [model.report.measurements[0] for model in found], True, [found[0], apart[1]]
        )
        == []
    )  # other images: only the intervals can tell, and they overlap


def paired_model(name: str, right: np.ndarray) -> Evaluated:
    n, rng = len(right), np.random.default_rng(0)
    inside, outside = rng.normal(1.5, 1, n), rng.normal(0, 1, n)
    if name == "bad":
        outside = outside + 0.08 + 0.01 * rng.normal(size=n)
    sure = np.concatenate([inside, outside])
    k = int(right.sum())
    auroc = metrics.auroc(-inside, -outside)
    c = 1 / (1 + np.exp(-outside))
    details = {"sets": ["o"], "inside": "i"}
    rows = (
        Measurement(name="accuracy", value=k / n, n=n, interval=metrics.wilson_interval(k, n), dataset="i"),
        Measurement(
            name="auroc",
            value=auroc,
            n=2 * n,
            interval=metrics.auroc_interval(auroc, n, n),
            dataset="mean",
            details=details,
        ),
        Measurement(
            name="mmc",
            value=c.mean(),
            n=n,
            interval=metrics.mean_interval(c),
            dataset="mean",
            details=details,
        ),
    )
    examples = {
        "dataset": np.repeat(np.array(["i", "o"], dtype=object), n),
        "attack": np.full(2 * n, "clean", dtype=object),
        "index": np.tile(np.arange(n), 2),
        "verdict": np.concatenate([right, np.full(n, -1)]).astype(np.int8),
        "log_odds": sure,
        "confidence": 1 / (1 + np.exp(-sure)),
    }
    return Evaluated(
        name=name,
        report=Report(package_digest="d", seed=0, measurements=rows),
        figures={},
        gallery=(),
        examples=examples,
    )


def shuffled(examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**examples, "index": examples["index"] + 1}
