"""`ratioctl evaluate`: options, output, exit codes, and what survives a kill."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ratioctl import package
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.cli import main
from ratioctl.cli.evaluate import default_folder
from ratioctl.evaluation import SUITES, Suite
from ratioctl.utils.durations import duration

TINY = Suite(
    name="quick",
    inside=6,
    balls=1,
    attacks=("apgd-ce",),
    budget=AttackBudget(steps=2),
    outside=4,
    outside_steps=2,
    curve=2,
    curve_steps=2,
    probe=1,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "quick", TINY)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def line(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["evaluate", str(model), "--data", str(data), "--ood", "uni=noise:uniform", "--out", str(out)]
    return [*arguments, "--limit", "8", "--device", "cpu", "--precision", "fp32", *more]


def test_a_table_on_stdout_warnings_on_stderr_and_files(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(small_package, cats_and_dogs, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    assert "Robust accuracy, l2 0.125 (APGD-CE 2 steps)" in out
    assert "AutoAttack" not in out
    assert "Worst-case mean AUROC, l2 0.25" in out
    assert "uni: OOD acceptance rate" in out
    assert "Warning: fewer than 1,000 examples" in err
    assert "This takes about" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "report.json",
        "report.md",
        "report.html",
        "examples.parquet",
    }


def test_json_is_the_report_and_nothing_else(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(small_package, cats_and_dogs, tmp_path / "out", "--json", "-q")) == 0
    out, _ = capsys.readouterr()
    document = json.loads(out)
    filed = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert document.pop("files") == [
        str(tmp_path / "out" / name)
        for name in ("report.json", "report.md", "report.html", "examples.parquet")
    ]
    assert document == filed
    row = next(r for r in document["models"][0]["measurements"] if r["name"] == "robust_accuracy")
    assert row["ball"] == {"p": "2", "eps": 0.125}
    assert (row["n"], row["attack"], row["seed"]) == (6, "APGD-CE 2 steps", 0)


def test_what_was_wrong_is_said_before_anything_is_computed(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: list[str], code: int, *says: str) -> None:
        assert main(arguments) == code
        err = capsys.readouterr().err
        assert all(text in err for text in says), err

    out = tmp_path / "out"
    fails(line(small_package, cats_and_dogs, out, "--suite", "slow"), 2, "slow")
    fails(line(small_package, cats_and_dogs, out, "--ood", "svhn"), 2, "NAME=SOURCE")
    fails(line(tmp_path / "no-model", cats_and_dogs, out), 5, "no-model")
    fails(line(small_package, tmp_path / "no-data", out), 2, "no-data")
    fails(["evaluate", str(small_package)], 2, "--data")
    (cats_and_dogs / "zebra").mkdir()
    (cats_and_dogs / "cat" / "0.png").rename(cats_and_dogs / "zebra" / "0.png")
    fails(line(small_package, cats_and_dogs, out), 2, "zebra", "is not a label of the model")
    (tmp_path / "file").touch()
    fails(line(small_package, cats_and_dogs, tmp_path / "file"), 2, "file")


@pytest.mark.parametrize("suite", ["clean", "quick", "explanations"])
def test_finite_weights_whose_logits_overflow_are_the_models_fault(
    suite: str, small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((small_package / "config.json").read_text(encoding="utf-8"))
    weights = load_file(small_package / "model.safetensors")
    large = {k: v * np.float32(1e30) if v.ndim == 4 else v for k, v in weights.items()}
    assert all(np.isfinite(v).all() for v in large.values())
    package.write(tmp_path / "large", config=config, weights=large)
    assert main(line(tmp_path / "large", cats_and_dogs, tmp_path / "out", "--suite", suite)) == 5
    err = capsys.readouterr().err
    assert f"{tmp_path / 'large'}: computes logits that hold NaN or infinite values" in " ".join(err.split())
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("suite", ["quick", "explanations"])
def test_images_that_cannot_be_read_are_said_and_change_the_exit_code(
    suite: str, small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cats_and_dogs / "dog" / "0.png").write_bytes(b"no picture")
    more = ["--suite", suite, "--json", "-q"]
    if suite == "explanations":
        more += ["--limit", "1"]
    assert main(line(small_package, cats_and_dogs, tmp_path / "out", *more)) == 3
    document = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["unreadable"]) for entry in document["data"]] == [("data", 1), ("uni", 0)]
    said = "images of data that could not be read and are left out: 1 (dog/0.png: is text, not an image)"
    assert said in document["models"][0]["warnings"]
    environment = document["environment"]
    assert {"ratioctl", "torch", "numpy", "python"} <= set(environment["versions"])
    assert environment["hardware"]["processor"]


def test_the_clean_suite_measures_without_an_attack(
    small_package: Path,
    cats_and_dogs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ratioctl.attacks import engine

    searched: list[int] = []
    perturb = engine.perturb

    def counted(logits_of: Any, x0: Any, goal: Any, attack: Any, **more: Any) -> Any:
        searched.append(attack.steps)
        return perturb(logits_of, x0, goal, attack, **more)

    monkeypatch.setattr("ratioctl.evaluation.attack_batches.perturb", counted)
    assert main(line(small_package, cats_and_dogs, tmp_path / "out", "--suite", "clean")) == 0
    assert searched == [], "not even for the time estimate"
    out, _ = capsys.readouterr()
    for text in ("Accuracy", "Mean AUROC", "Brier score", "uni: OOD acceptance rate"):
        assert text in out
    assert "attacked" not in out
    assert "worst case" not in out.lower()
    document = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    rows = document["models"][0]["measurements"]
    assert {row["name"] for row in rows} >= {"accuracy", "ece", "ece_mixture", "auroc", "fpr_at_95_tpr"}
    assert all(row["ball"] is None and row["attack"] is None for row in rows)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Attacked" not in page
    assert page.count("<figure>") == 5  # reliability, risk over coverage, ROC, two histograms
    assert main(line(small_package, cats_and_dogs, tmp_path / "whole", "--json", "-q")) == 0
    quick = json.loads(capsys.readouterr().out)["models"][0]["measurements"]
    key = ("name", "dataset", "value", "interval", "n")
    clean = [[row[k] for k in key] for row in rows]
    assert clean == [
        [row[k] for k in key]
        for row in quick
        if row["ball"] is None and row["attack"] is None and row["name"] != "accuracy_before_attack"
    ]


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from test_evaluate import SUITES, TINY
from ratioctl import evaluate
SUITES["quick"] = TINY
seen = []
def watch(event):
    seen.append(event["event"])
    if seen.count("batch") == 5:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate({model!r}, data={data!r}, ood=["uni=noise:uniform"], limit=8, out={out!r}, device="cpu",
         precision="fp32", callback=watch)
"""


def test_a_killed_evaluation_continues_with_the_same_command(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    program = PROGRAM.format(
        folder=str(Path(__file__).parent), model=str(small_package), data=str(cats_and_dogs), out=str(out)
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / ".result-cache").glob("*.npz")}
    assert len(before) == 5

    assert main(line(small_package, cats_and_dogs, out, "-q")) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main(line(small_package, cats_and_dogs, tmp_path / "whole", "-q")) == 0
    assert timeless(out) == timeless(tmp_path / "whole")


def timeless(folder: Path) -> Any:
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for row in document["models"][0]["measurements"]:
        row.pop("duration_s", None)
    return document


def test_defaults_and_durations_read_well() -> None:
    one, other = "0123456789abcdef", "fedcba9876543210"
    assert default_folder([("small", one)], "quick") == Path("reports/small-01234567-quick")
    assert default_folder([("small", other)], "quick") == Path("reports/small-fedcba98-quick")
    assert default_folder([("../x y", one)], "clean") == Path("reports/x-y-01234567-clean")
    both = default_folder([("a", one), ("b", other)], "paper")
    assert re.fullmatch(r"reports/comparison-[0-9a-f]{8}-paper", both.as_posix())
    assert both != default_folder([("a", one), ("b", one)], "paper")
    assert [duration(s) for s in (0.2, 59, 90, 7500)] == ["1 s", "59 s", "2 min", "2 h 5 min"]
