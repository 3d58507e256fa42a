"""`ratioctl evaluate --suite explanations`: what it measures, and what survives a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ratioctl.cli import main
from ratioctl.evaluation import SUITES, measurements
from ratioctl.evaluation.judge import Judge
from ratioctl.evaluation.stages import explanations as suite

BUDGETS = (0.25, 0.5, 1.0)  # the small package's ladder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(SUITES["explanations"], explanation_steps=3)
    monkeypatch.setitem(SUITES, "explanations", short)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def line(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["evaluate", str(model), "--data", str(data), "--ood", "uni=noise:uniform", "--out", str(out)]
    arguments += ["--suite", "explanations", "--limit", "3", "--device", "cpu", "--precision", "fp32"]
    return [*arguments, *more]


def rows(document: Any, name: str, dataset: str) -> list[Any]:
    found = document["models"][0]["measurements"]
    return [row for row in found if (row["name"], row["dataset"]) == (name, dataset)]


def timeless(document: Any) -> Any:
    for model in document["models"]:
        for row in model["measurements"]:
            row.pop("duration_s", None)
    return document


def test_numbers_are_those_of_the_counterfactuals(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Worked out again with `counterfactual` on the same images and targets; the judge is the model."""
    import ratioctl

    out = tmp_path / "out"
    assert main(line(small_package, cats_and_dogs, out, "--judge", str(small_package))) == 0
    shown, err = capsys.readouterr()
    assert "reached %" in shown
    assert "uni (n 3)" in shown
    assert "the judge is the model itself" in err
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (document["schema"], document["suite"]) == ("ratioctl/evaluation/1", "explanations")
    assert {path.name for path in out.iterdir()} >= {"report.md", "report.html", "examples.parquet"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Counterfactuals of small, data" in page
    assert "<h2>Figures" not in page, "there are none"

    images = [(path, ("cat", "dog").index(path.parent.name)) for path in sorted(cats_and_dogs.rglob("*.png"))]
    pixels = {path: np.asarray(Image.open(path)) for path, _ in images}
    import pyarrow.parquet as pq

    examples = pq.read_table(out / "examples.parquet").to_pydict()
    labels = ["cat", "dog", "red panda", "air/plane"]
    answers = []
    for path, label in images:
        target = suite.target_of(pixels[path], label, 4, 0)
        assert target != label
        (answer,) = ratioctl.counterfactual(
            path, target=labels[target], model=small_package, steps=3, precision="fp32"
        )
        answers.append(answer.targets[0])
    columns = zip(examples["dataset"], examples["confidence"], strict=True)
    mine = np.array([confidence for dataset, confidence in columns if dataset == "data"])
    assert len(mine) == 3 * len(BUDGETS)
    everything = {round(b.confidence, 9) for answer in answers for b in answer.budgets}
    assert {round(value, 9) for value in mine} <= everything
    confidences = mine.reshape(3, len(BUDGETS))
    found = rows(document, "target_confidence", "data")
    assert [row["ball"] and row["ball"]["eps"] for row in found] == [None, *BUDGETS]
    assert [row["value"] for row in found[1:]] == pytest.approx(list(confidences.mean(0)))
    judged = rows(document, "judge_confidence", "data")
    assert [row["value"] for row in judged] == pytest.approx(list(confidences.mean(0)), abs=1e-6)
    seen = {round(b.confidence, 9): b.predicted == one.target for one in answers for b in one.budgets}
    hits = np.array([seen[round(value, 9)] for value in mine]).reshape(confidences.shape)
    assert [row["value"] for row in rows(document, "judge_agreement", "data")] == pytest.approx(
        list(hits.mean(0))
    )
    validity = rows(document, "validity", "data")
    assert [row["n"] for row in validity] == [3] * 4
    for row in validity:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    lengths = rows(document, "distance_l2", "data")
    for row, eps in zip(lengths, BUDGETS, strict=True):
        assert 0 < row["value"] <= eps
    by_confidence = {tuple(round(b.confidence, 9) for b in one.budgets): one for one in answers}
    measured = [by_confidence[tuple(round(value, 9) for value in row)] for row in confidences]
    for name, radii in (
        ("flip_radius", [one.flip_eps for one in measured]),
        ("in_distribution_radius", [one.in_distribution_eps for one in measured]),
    ):
        for q, radius in zip((25, 50, 75), sorted(math.inf if r is None else r for r in radii), strict=True):
            quartile = [row["value"] for row in rows(document, f"{name}_q{q}", "data")]
            assert quartile == ([pytest.approx(radius)] if radius < math.inf else []), radii
        assert min(r for r in radii if r is not None) > 0.5
    profile = rows(document, "confidence", "uni")
    values = [row["value"] for row in profile]
    assert values == sorted(values)  # towards the class it is seen as
    assert len(values) == 4


PROGRAM = """
import dataclasses, os, signal, sys
from ratioctl.evaluation import SUITES, run
suite = dataclasses.replace(SUITES["explanations"], explanation_steps=3)
seen = []
def watch(event):
    seen.append(event["event"])
    if seen.count("batch") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
run([{model!r}], data={data!r}, ood=["uni=noise:uniform"], suite=suite, limit=3, out={out!r}, device="cpu",
    precision="fp32", callback=watch)
"""


def test_a_killed_run_goes_on_with_the_next_image(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    program = PROGRAM.format(model=str(small_package), data=str(cats_and_dogs), out=str(out))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / ".result-cache").glob("*.npz")}
    assert len(before) == 4
    damaged = min(before)
    damaged.write_bytes(b"half a file")

    assert main(line(small_package, cats_and_dogs, out, "-q", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    after = {path: path.stat().st_mtime_ns for path in (out / ".result-cache").glob("*.npz")}
    assert len(after) == 6
    assert all(after[path] == time for path, time in before.items() if path != damaged)
    assert main(line(small_package, cats_and_dogs, tmp_path / "whole", "-q", "--json")) == 0
    whole = json.loads(capsys.readouterr().out)
    document.pop("files"), whole.pop("files")
    assert timeless(document) == timeless(whole)


def test_what_cannot_be_asked(
    small_package: Path,
    tiny_package: Path,
    cats_and_dogs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    for more, words in (
        (["--write"], "--write"),
        (["--judge", str(tiny_package)], 'does not know the class "cat"'),
        (["--judge", str(small_package), "--suite", "quick"], "--judge"),
        (["--ood", "svhn"], "NAME=SOURCE"),
        (["--ood", "uni=noise:smooth"], "is given twice"),
        (["--ood", "data=noise:smooth"], "is the name of the ID images"),
    ):
        assert main([*line(small_package, cats_and_dogs, out), *more]) == 2
        assert words in capsys.readouterr().err


def test_targets_are_other_classes_evenly() -> None:
    rng = np.random.default_rng(1)
    drawn = [suite.target_of(rng.integers(0, 256, (2, 2, 3), np.uint8), 2, 4, 0) for _ in range(300)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[2] == 0
    assert counts[[0, 1, 3]].min() > 60


def test_pixels_count_as_changed_beyond_one_value() -> None:
    original = np.full((2, 2, 3), 100, np.uint8)
    picture = original.copy()
    picture[0, 0] = 101
    picture[0, 1, 2] = 98
    assert suite.changed(picture, original) == 0.25


def test_the_judge_and_the_radii_of_pictures_by_hand(small_package: Path) -> None:
    """Three pictures by hand: the target is the judge's label, at 0.8 and at 0.4, and another class is."""
    from ratioctl import package as packages

    package = packages.read(small_package)
    p = np.array([[0.1, 0.8, 0.05, 0.05], [0.3, 0.4, 0.2, 0.1], [0.6, 0.3, 0.05, 0.05]])
    judge = Judge(package=package, predict=lambda pictures: next(answers)[None])
    context: Any = SimpleNamespace(package=package, suite=SUITES["explanations"], judge=judge)
    budgets = len(suite._radii(context))
    one = np.zeros((3, budgets, 8, 8, 3), np.uint8)
    answers = iter(np.repeat(np.log(p)[None], budgets, 0).reshape(-1, 4) * package.temperature)
    found = {
        "target": np.ones(3, int), "before": p, "confidence": np.full((3, budgets), 0.9),
        "largest": np.full((3, budgets), 0.9), "predicted": np.ones((3, budgets), int),
        "distance": np.ones((3, budgets, 3)), "changed": np.ones((3, budgets)), "pictures": one,
        "flip": np.full(3, 0.5), "in_distribution": np.array([0.75, np.nan, 1.0]), "flip_changed": np.ones(3),
    }  # fmt: skip
    images: Any = SimpleNamespace(fingerprint="f")
    source = measurements.Source(name="data", images=images, seed=0)
    rows = suite._inside(context, source, found)
    for name, value in (("judge_agreement", 2 / 3), ("judge_validity", 1 / 3), ("judge_confidence", 0.5)):
        measured = [row.value for row in rows if row.name == name]
        assert measured == pytest.approx([value] * budgets), name
    radii = {row.name: row.value for row in rows if "_radius_q" in row.name}
    assert radii == {
        **{f"flip_radius_q{q}": 0.5 for q in (25, 50, 75)},
        "in_distribution_radius_q25": 0.75,
        "in_distribution_radius_q50": 1.0,
    }
