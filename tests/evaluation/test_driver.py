"""The whole of an evaluation on a tiny model: results, files, interruptions and wrong usage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ratioctl
from ratioctl import package
from ratioctl.errors import OutputError, PackageError, SourceError, UsageError
from ratioctl.evaluation import SUITES, run
from ratioctl.report import evaluation_files, evaluation_tables
from ratioctl.types import Evaluation
from tests.evaluation.helpers import TINY, evaluated, timeless


def test_an_evaluation_measures_everything_and_its_files_agree(
    plain: tuple[Evaluation, list[dict[str, Any]]], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    found, events = plain
    rows = found.models[0].report.measurements
    names = {(row.name, row.dataset == "mean", row.ball is not None) for row in rows}
    for name in ("auroc", "conservative_auroc", "fpr_at_95_tpr", "aupr_in", "aupr_out", "mmc"):
        assert {(name, mean, attacked) for mean in (True, False) for attacked in (True, False)} <= names
    assert {"accuracy", "robust_accuracy", "ece", "adaptive_ece", "nll", "brier", "ece_mixture"} <= {
        row.name for row in rows
    }
    for row in rows:
        assert row.n > 0
        assert row.interval is not None
        assert row.interval[0] - 1e-9 <= row.value <= row.interval[1] + 1e-9 or row.name.startswith(
            ("aupr", "fpr")  # the bootstrap does not promise that
        )
        assert len(row.details["fingerprint"]) == 64
        assert row.details["duration_s"] >= 0
        assert row.details["seed"] == 0
        assert (row.ball is None) is (row.details["attack"] is None)
    clean, worst = (
        next(r.value for r in rows if r.name == "mmc" and r.dataset == "uni" and bool(r.ball) == attacked)
        for attacked in (False, True)
    )
    assert worst > clean
    assert {row.dataset for row in rows} == {"test", "uni", "mean", "test + uni"}  # no folders of ours
    assert events[0]["event"] == "plan"
    shares = [event["share"] for event in events[1:]]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=0.05)
    assert any("fewer than 1,000" in text for text in found.models[0].report.warnings)

    paths = evaluation_files.write(found, tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html", "examples.parquet"]
    document = json.loads(paths[0].read_text(encoding="utf-8"))
    assert document["schema"] == "ratioctl/evaluation/1"
    assert len(document["models"][0]["measurements"]) == len(rows)
    page = paths[2].read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<figure>") == len(found.models[0].gallery) + 6
    table = pq.read_table(paths[3])
    by_attack = table.group_by(["dataset", "attack"]).aggregate([("index", "count")]).num_rows
    attacks = {r["attack"] for r in table.to_pylist() if r["dataset"] == "test"}
    assert attacks >= {"clean", "l2 0.125: apgd-ce", "l2 0.125: apgd-t", "l2 0.125: lowest confidence"}
    assert by_attack == 7  # inside: clean, two attacks, both, lowest; outside: clean, worst case
    left = [r for r in table.to_pylist() if r["attack"] == "l2 0.125: apgd-t"]
    assert sum(r["verdict"] for r in left) == sum(
        r["attack"].endswith(")") and r["verdict"] for r in table.to_pylist()
    )
    assert all((r["distance"] > 0) is not r["verdict"] for r in left)
    assert found.protocol.endswith("3 steps, 1 restart; at most 9 images of a set")
    titles = [shown.title for shown in evaluation_tables.tables(found)]
    assert titles[:3] == ["Summary of small", "Calibration", "Robust accuracy by attack"]
    by = evaluation_tables.tables(found)[2]
    assert by.header == ("per cent", "before", "APGD-CE", "APGD-T", "n")
    assert [float(cell) for cell in by.rows[0][1:4]] == pytest.approx(
        [
            100 * next(r.value for r in rows if r.name == name)
            for name in ("accuracy_before_attack", "accuracy_after_apgd_ce", "robust_accuracy")
        ],
        abs=0.05,
    )
    calibration = evaluation_tables.tables(found)[1]
    assert [row[0] for row in calibration.rows] == [
        *("ECE, %", "ECE, bins of equal mass, %", "ECE, half OOD images, %", "NLL", "Brier score")
    ]
    assert "15 bins on [0.25, 1]" in calibration.note
    ece = next(r for r in rows if r.name == "ece")
    assert calibration.rows[0][1] == f"{100 * ece.value:.2f}", "in percent as in the summary"
    operating = next(t for t in evaluation_tables.tables(found) if t.title == "Operating points")
    assert "(tpr95 0.5, tpr99 0.3)" in operating.note
    assert (
        "ID images towards low confidence in l2 0.125, OOD images towards high confidence in l2 0.25"
        in operating.note
    )
    kept_at = next(r for r in rows if r.name == "kept_at_tpr95" and r.ball is None)
    assert kept_at.interval is not None
    low, high = (100 * end for end in kept_at.interval)
    assert operating.intervals[0, 1] == f"{low:.1f} to {high:.1f}"
    assert f"| {100 * kept_at.value:.1f} ({low:.1f} to {high:.1f}) |" in paths[1].read_text(encoding="utf-8")
    assert f"<small>{low:.1f} to {high:.1f}</small>" in page
    shares = [t for t in evaluation_tables.tables(found) if t.header[0] == "per cent"]
    assert len(shares) == 6
    for shown in shares[1:]:  # the first one has a column for them
        cells = {(r, c) for r, row in enumerate(shown.rows) for c, cell in enumerate(row) if "." in cell}
        assert {at for at in cells if at[1]} == set(shown.intervals), "no share without its interval"
    counts = {shown.title: [row[-2:] for row in shown.rows] for shown in evaluation_tables.tables(found)}
    assert counts["OOD sets, precision and confidence"] == [("9", "5"), ("9", "5")]  # uni, mean
    assert counts["Operating points"] == [("9", "5")] * 3  # test, uni, mean
    kept = [r for r in table.to_pylist() if r["attack"].endswith(")") and r["verdict"]]
    robust = next(r for r in rows if r.name == "robust_accuracy")
    assert len(kept) == round(robust.value * robust.n)


def test_scikit_learn_finds_the_same_numbers_in_the_examples(
    plain: tuple[Evaluation, list[dict[str, Any]]],
) -> None:
    """Every rate, area and share of the report, worked out again from what `examples.parquet` holds."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    found = plain[0].models[0]
    columns = found.examples

    def of(dataset: str, attack: str, what: str) -> np.ndarray:
        return columns[what][(columns["dataset"] == dataset) & (columns["attack"] == attack)]

    truth = np.r_[np.zeros(9), np.ones(9)], np.r_[np.zeros(9), np.ones(5)]
    expected: dict[tuple[str, str, bool], float] = {}
    for attacked, outside in ((False, "clean"), (True, "l2 0.25: worst case")):
        scores = -np.r_[of("test", "clean", "log_odds"), of("uni", outside, "log_odds")]
        fpr, tpr, _ = roc_curve(truth[attacked], scores, drop_intermediate=False)
        confidence = of("uni", outside, "confidence")
        expected |= {
            ("auroc", "uni", attacked): float(roc_auc_score(truth[attacked], scores)),
            ("aupr_out", "uni", attacked): float(average_precision_score(truth[attacked], scores)),
            ("aupr_in", "uni", attacked): float(average_precision_score(1 - truth[attacked], -scores)),
            ("fpr_at_95_tpr", "uni", attacked): float(fpr[np.argmax(tpr >= 0.95)]),
            ("mmc", "uni", attacked): float(confidence.mean()),
        }
        inside = of("test", "l2 0.125: lowest confidence" if attacked else "clean", "confidence")
        for name, threshold in (("tpr95", 0.5), ("tpr99", 0.3)):
            expected["kept_at_" + name, "test", attacked] = float((inside >= threshold).mean())
            expected["let_through_at_" + name, "uni", attacked] = float((confidence >= threshold).mean())
    expected["accuracy", "test", False] = float(of("test", "clean", "verdict").mean())
    both = "l2 0.125: APGD-CE 3 steps + APGD-T 3 steps x 2 target(s)"
    expected["robust_accuracy", "test", True] = float(of("test", both, "verdict").mean())
    rows = {(row.name, row.dataset, row.ball is not None): row.value for row in found.report.measurements}
    assert {key: rows[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 6) for value in expected.values()}) > 8, "too alike to tell them apart"


def test_an_interrupted_evaluation_ends_with_the_same_report(
    small_package: Path, labelled: str, plain: tuple[Evaluation, list[dict[str, Any]]], tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    seen: list[str] = []

    def stop_after_four(event: dict[str, Any]) -> None:
        seen.append(event["event"])
        if seen.count("batch") % 4 == 0 and seen[-1] == "batch":
            raise StopError

    with pytest.raises(StopError):
        evaluated(small_package, labelled, out=tmp_path, callback=stop_after_four)
    filed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".result-cache").glob("*.npz")}
    assert len(filed) == 4
    (tmp_path / ".result-cache").rename(tmp_path / ".journal")  # its name in version 0.2
    again = evaluated(small_package, labelled, out=tmp_path)
    assert timeless(again) == timeless(plain[0])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / ".result-cache").glob("*.npz")}
    assert len(files) > 4
    assert {path.name: at for path, at in files.items() if path.name in filed} == filed
    assert not (tmp_path / ".journal").exists()

    evaluated(small_package, labelled, out=tmp_path, resume=True)  # takes everything from the finished run
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(StopError):  # nothing fits another seed
        evaluated(small_package, labelled, out=tmp_path, resume=True, seed=1, callback=stop_after_four)
    assert len(list((tmp_path / ".result-cache").glob("*.npz"))) > len(files)


def test_measurements_go_into_the_package_without_changing_its_digest(
    small_package: Path, labelled: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_package, copy)
    before = package.read(copy)
    report = evaluated(copy, labelled, write=True).models[0].report
    after = package.read(copy)
    assert after.digest == before.digest == report.package_digest
    filed = after.config["ratio"]["metrics"]
    names = {row["name"] for row in filed["measurements"]}
    assert {"accuracy", "robust_accuracy", "kept_at_tpr95", "let_through_at_tpr95"} <= names
    assert filed["warnings"] == list(report.warnings)
    assert {entry["name"] for entry in filed["data"]} == {"test", "uni"}
    assert str(tmp_path) not in json.dumps(filed), "no paths of ours in a package"
    assert after.card is not None
    assert "| robust accuracy |" in after.card
    assert "l2 0.125 (APGD-CE 3 steps + APGD-T 3 steps x 2 target(s))" in after.card.replace("\\", "")


def test_what_cannot_be_filed_loses_no_report(
    small_package: Path, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_package, copy)
    done: list[Evaluation] = []

    def recalibrated_meanwhile(event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            package.update(package.read(copy), config_changes={"ratio": {"temperature": 0.3}})

    with pytest.raises(PackageError, match="was changed while it was evaluated"):
        evaluated(copy, labelled, write=True, callback=recalibrated_meanwhile, finish=done.append)
    assert len(done) == 1
    assert "metrics" not in package.read(copy).config["ratio"]
    events: list[Any] = []
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="cannot be written, and --write stores the measurements in it"):
        evaluated(copy, labelled, write=True, callback=events.append)
    assert not events, "said before anything is computed"


def test_a_bundled_model_is_not_written(labelled: str) -> None:
    config = (package.find("cifar10-ratio") / "config.json").read_bytes()
    with pytest.raises(OutputError, match="is a bundled model, which is read-only"):
        run(["cifar10-ratio"], data=labelled, suite=TINY, write=True, device="cpu")
    assert (package.find("cifar10-ratio") / "config.json").read_bytes() == config


def test_several_models_get_different_names_and_one_table(small_package: Path, labelled: str) -> None:
    found = run(
        [small_package, small_package],
        data=labelled,
        suite=TINY,
        ood={"uni": "noise:uniform"},
        limit=9,
        device="cpu",
        precision="fp32",
    )
    assert [model.name for model in found.models] == ["small", "small-2"]
    table = evaluation_tables.tables(found)[0]
    assert table.header == ("per cent", "small", "small-2", "n")
    assert {row[0]: row[3] for row in table.rows}["Accuracy"] == "9"
    assert table.marked == frozenset()
    assert all(row[1] == row[2] for row in table.rows)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"suite": "explanations", "write": True}, UsageError, "no effect in the suite explanations"),
        ({"suite": "explanations", "backend": "own"}, UsageError, "--backend: has no effect"),
        (
            {"suite": "explanations", "save_adversarial": True},
            UsageError,
            "--save-adversarial: has no effect",
        ),
        ({"suite": "clean", "backend": "own"}, UsageError, "no effect in the suite clean"),
        ({"judge": "cifar10-ratio"}, UsageError, "--judge: has no effect in the suite tiny"),
        ({"suite": "slow"}, UsageError, "quick, paper, full"),
        ({"ood": ["svhn"]}, UsageError, "NAME=SOURCE"),
        ({"ood": ["a=noise:uniform", "a=noise:smooth"]}, UsageError, "twice"),
        ({"ood": ["mean=noise:uniform"]}, UsageError, "average"),
        ({"ood": ["test=noise:uniform"]}, UsageError, "name of the ID images"),
        ({"limit": 0}, UsageError, "positive"),
        ({"ood": ["a=noise:blue"]}, SourceError, 'has no "blue"'),
    ],
)
def test_wrong_usage_says_what_is_right(
    small_package: Path, labelled: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        evaluated(small_package, labelled, **options)


def test_the_verb_returns_reports(
    small_package: Path, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "quick", TINY)
    (report,) = ratioctl.evaluate(small_package, data=labelled, limit=9, device="cpu", out=tmp_path)
    assert {row.dataset for row in report.measurements} >= {"uniform noise", "smooth noise", "mean"}
    assert (tmp_path / "report.html").is_file()


def test_examples_name_the_files(small_package: Path, labelled: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    found = evaluated(small_package, labelled, suite="clean", limit=None)
    evaluation_files.write(found, tmp_path)
    rows = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    labels = ("cat", "dog", "red panda", "air/plane")
    inside = [row for row in rows if row["dataset"] == "test"]
    files = sorted(path.relative_to(labelled).as_posix() for path in Path(labelled).rglob("*.png"))
    assert sorted(row["path"] for row in inside) == files
    assert all(row["path"].split("/")[0] == labels[row["label"]] for row in inside)
    assert {row["path"] for row in rows if row["dataset"] == "uni"} == {None}
