"""`ratioctl thresholds`, and `ood-score` with `--explain`, `--checks` and `--save-flagged`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import metrics, package
from ratioctl.cli import main
from ratioctl.package.records import acceptances, records
from ratioctl.report import thresholds as report
from tests.conftest import TINY_TEMPERATURE, tiny_config

FINGERPRINT = "ab" * 32


def config_with_records() -> dict[str, object]:
    """The tiny model's config as `calibrate` would leave it: two OOD sets' worth of rates and quantiles."""
    config = tiny_config()
    origin = {"n": 200, "fingerprint": FINGERPRINT, "ball": None}
    attacked = {**origin, "ball": {"p": "2", "eps": 0.5}, "attack": "APGD"}

    def rate(count: int, **of: object) -> dict[str, object]:
        interval = list(metrics.clopper_pearson_interval(count, 200))
        return {**origin, **of, "accepted": count, "rate": count / 200, "interval": interval}

    config["ratio"]["threshold_records"] = [
        {
            "name": name,
            "rule": rule,
            "score": "max-softmax",
            "threshold": config["ratio"]["thresholds"][name],
            "id": rate(kept, set="colors"),
            "ood": [rate(passed, set="<grey>"), rate(worst, **{**attacked, "set": "<grey>"})],
        }
        for name, rule, kept, passed, worst in (
            ("tpr95", "keep:0.95", 190, 10, 50),
            ("tpr99", "keep:0.99", 198, 40, 90),
        )
    ]
    levels = np.linspace(0, 1, 101)
    config["ratio"]["acceptance"] = {
        "score": "max-softmax",
        "unit": "log-odds",
        "id": {**origin, "set": "colors", "quantiles": (4 * levels).tolist()},
        "ood": [
            {**origin, "set": "<grey>", "quantiles": (2 * levels - 2).tolist()},
            {**attacked, "set": "<grey>", "quantiles": (2 * levels).tolist()},
        ],
    }
    return config


@pytest.fixture
def recorded(tiny_package: Path) -> Path:
    package.update(package.read(tiny_package), config_changes={"ratio": config_with_records()["ratio"]})
    return tiny_package


def test_the_table_and_the_document(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", str(recorded)]) == 0
    shown = capsys.readouterr().out
    line = next(text for text in shown.splitlines() if "tpr95" in text)
    low, high = metrics.clopper_pearson_interval(190, 200)
    for part in ("keep:0.95", "0.9", "colors (ID)", "95.0", f"{100 * low:.1f} to {100 * high:.1f}", "200"):
        assert part in line
    assert "<grey>, attacked in l2 0.5 (OOD)" in shown
    assert main(["thresholds", str(recorded), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ratioctl/thresholds/1"
    assert [row["name"] for row in document["thresholds"]] == ["tpr95", "tpr99"]
    assert document["thresholds"][0]["ood"][1]["rate"] == 0.25
    clean, attacked = document["curves"]
    assert (clean["ball"], attacked["ball"]) == (None, {"p": "2", "eps": 0.5})
    for curve in (clean, attacked):
        assert (curve["id"][0], curve["ood"][0], curve["id"][-1], curve["ood"][-1]) == (1, 1, 0, 0)
        assert np.all(np.diff(curve["id"]) <= 0)
    # ID acceptances are uniform on [0, 4], the attacked ones on [0, 2]: at 1, 75 % and 50 %.
    at = attacked["ood"].index(0.5)
    assert attacked["id"][at] == pytest.approx(0.75)


def test_an_exported_file_carries_them_too(
    tmp_path: Path, tiny_graph: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_bytes(tiny_graph(config_with_records()))  # type: ignore[operator]
    assert main(["thresholds", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["thresholds"][1]["id"]["accepted"] == 198


def test_the_page(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["thresholds", str(recorded), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("<circle") == 4
    assert "&lt;grey&gt;" in page
    assert "<grey>" not in page
    assert "<script" not in page
    assert page.count("<figure>") == 1
    assert main(["thresholds", str(recorded), "--out", str(out)]) == 0, "its own page is replaced"
    (tmp_path / "mine.html").write_text("mine")
    capsys.readouterr()
    for name, says in (("mine.html", "was not written by ratioctl thresholds"), ("a.svg", "ends in .html")):
        assert main(["thresholds", str(recorded), "--out", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_the_card_names_rules_and_rates(recorded: Path) -> None:
    card = (recorded / "README.md").read_text()
    assert "- tpr95, rule keep:0.95: accepts 95.0% of 200 ID images (colors; " in card
    assert "of 200 OOD images (&lt;grey&gt;, attacked in l2 0.5; " in card
    damaged = package.update(
        package.read(recorded), config_changes={"ratio": {"threshold_records": [{"name": "a"}, 3]}}
    )
    assert "Acceptance rates" not in str(damaged.card)


def test_models_without_records_or_thresholds(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["thresholds", str(tiny_package), "--out", str(tmp_path / "p.html")]) == 0
    captured = capsys.readouterr()
    assert "tpr99" in captured.out
    assert "before acceptance rates were stored" in captured.out
    assert "has no plot" in captured.err
    rate = {"value": 0.25, "n": 40, "interval": [0.1, 0.4], "dataset": "svhn"}
    rows = [
        {"name": "let_through_at_tpr99", **rate, "ball": None},
        {"name": "let_through_at_tpr99", **rate, "ball": {"p": "2", "eps": 1.0}},
        {"name": "let_through_at_tpr99", "dataset": "damaged"},
    ]
    package.update(package.read(tiny_package), config_changes={"ratio": {"metrics": {"measurements": rows}}})
    assert main(["thresholds", str(tiny_package)]) == 0
    shown = capsys.readouterr().out
    assert "svhn (OOD)" in shown
    assert "svhn, attacked in l2 1 (OOD)" in shown
    assert "10.0 to 40.0" in shown
    assert "damaged" not in shown
    bare = package.update(package.read(tiny_package), config_changes={"ratio": {"thresholds": {}}})
    assert main(["thresholds", str(bare.path)]) == 5
    assert "ratioctl calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("threshold_records", {}, "must be a list"),
        ("threshold_records", [{"name": "a"}], "ratio.threshold_records.rule"),
        ("acceptance", {"score": "max-softmax"}, "ratio.acceptance.unit"),
        ("acceptance", 3, "ratio.acceptance"),
    ],
)
def test_damaged_records_are_named(
    recorded: Path, key: str, value: object, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    package.update(package.read(recorded), config_changes={"ratio": {key: value}})
    assert main(["thresholds", str(recorded), "--json"]) == 5
    assert says in capsys.readouterr().err


def test_quantiles_and_records_are_checked(recorded: Path) -> None:
    spec = package.read(recorded)
    found = acceptances(spec)
    assert found is not None
    assert found.id.share_below(1.0) == pytest.approx(0.25)
    assert found.id.share_below(-5) == 0
    assert acceptances(spec, "energy") is None
    assert records(spec, "energy") == ()
    config = config_with_records()
    config["ratio"]["acceptance"]["id"]["quantiles"][0] = 3.0  # type: ignore[index]
    with pytest.raises(ratioctl.PackageError, match="quantiles must ascend"):
        acceptances(package.parse_config(config, "c", name="x"))
    assert report.document(spec)["temperature"] == TINY_TEMPERATURE


# --- rows --------------------------------------------------------------------------------------------------


def test_explained_rows(recorded: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ood-score", str(colors), "--model", str(recorded), "--format", "jsonl", "--explain", "-q"]
    assert main([*line, "--threshold", "0.7"]) == 0
    blue, _, grey, red = map(json.loads, capsys.readouterr().out.splitlines())
    sure = 2 - math.log(2)  # log-odds of the plain colors: e^2 against two e^0
    assert red["margin"] == pytest.approx(sure - math.log(0.7 / 0.3), abs=1e-6)
    assert (red["runner_up"], red["reason"]) == ("green", None)
    assert red["percentile"] == pytest.approx(100 * sure / 4, abs=0.01)
    assert blue["runner_up"] == "red"
    assert grey["margin"] == pytest.approx(math.log(1 / 2) - math.log(0.7 / 0.3), abs=1e-5)
    assert grey["reason"] == (
        f"confidence 0.3333 in {grey['label']} is below 0.7; the next is {grey['runner_up']} (0.33); "
        "0.0 % of the calibration images score lower"
    )
    assert main([*line, "--threshold", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["margin"] is None


def test_rows_of_thresholds_per_class(recorded: Path, colors: Path) -> None:
    """A threshold per class flags red, and only red, although the common one accepts it."""
    changes = {"class_thresholds": {"max-softmax": {"tpr99": {"red": 0.99}}}}
    model = package.update(package.read(recorded), config_changes={"ratio": changes})
    for score in ("msp",):
        limit = package.threshold(model, "tpr99", score)
        assert (float(limit), limit.classes) == (0.7, (0.99, 0.7, 0.7))  # type: ignore[attr-defined]


def test_checks_of_the_input(tiny_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(1, 255, (4, 4, 3), dtype=np.uint8)
    for name, pixels in (
        ("a", noise),
        ("b", noise),
        ("c", np.full((4, 4, 3), 120, np.uint8)),
        ("e", np.where(noise > 128, 255, 0).astype(np.uint8)),
        ("f", rng.integers(1, 255, (10, 20, 3), dtype=np.uint8)),
    ):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"broken")
    shutil.copy(folder / "c.png", folder / "d2.png")
    rows = {Path(row.path).stem: row for row in ratioctl.ood_score(str(folder), model=tiny_onnx, checks=True)}
    found = {name: (row.blank, row.saturated, row.duplicate) for name, row in rows.items()}
    assert found == {
        "a": (False, False, False),
        "b": (False, False, True),
        "c": (True, False, False),
        "d": (None, None, None),
        "d2": (True, False, True),  # of the last image that could be read
        "e": (False, True, False),
        "f": (False, False, False),
    }
    assert (rows["f"].width, rows["f"].height) == (20, 10)
    assert rows["f"].notes == "cut to the center square of 20x10; resized from 10x10 to 4x4"
    assert rows["a"].pixels_sha256 == rows["b"].pixels_sha256


def test_duplicates_across_batches(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratioctl.scoring.pipeline.MAX_BATCH", 2)
    images = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 2, 2, 3, 3, 1)]
    rows = ratioctl.ood_score(images, model=tiny_onnx, checks=True)
    assert [row.duplicate for row in rows] == [False, False, True, True, False, True, False]


def test_every_format_holds_the_columns(recorded: Path, colors: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    (colors / "empty.png").touch()
    line = [
        "ood-score",
        str(colors),
        "--model",
        str(recorded),
        "--explain",
        "--checks",
        "--skip-errors",
        "-q",
    ]
    for suffix in ("csv", "txt", "parquet"):
        assert main([*line, "--output", str(tmp_path / f"rows.{suffix}")]) == 0
    table = parquet.read_table(tmp_path / "rows.parquet")
    kinds = {name: str(table.schema.field(name).type) for name in table.column_names[6:]}
    assert kinds == {
        "margin": "double",
        "runner_up": "string",
        "percentile": "double",
        "reason": "string",
        "width": "int64",
        "height": "int64",
        "blank": "bool",
        "saturated": "bool",
        "duplicate": "bool",
        "notes": "string",
        "pixels_sha256": "string",
    }
    head, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert head.endswith(
        ",margin,runner_up,percentile,reason,width,height,blank,saturated,duplicate,notes,pixels_sha256"
    )
    assert len(rows) == 5
    assert (tmp_path / "rows.txt").read_text().splitlines()[0].split()[-2:] == ["notes", "pixels_sha256"]


def test_flagged_images_get_counterfactuals(
    small_package: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ratioctl import counterfactuals

    original = counterfactuals.prepare
    monkeypatch.setattr(
        counterfactuals,
        "prepare",
        lambda images, **options: original(images, **{**options, "steps": 1, "eps": 0.5}),
    )
    rows = list(ratioctl.ood_score(str(photographs), model=small_package, threshold=0.5))
    limit = sorted(row.confidence or 0 for row in rows)[1]
    out = tmp_path / "flagged"
    line = ["ood-score", str(photographs), "--model", str(small_package), "--threshold", repr(limit)]
    assert main([*line, "--save-flagged", str(out), "--json", "-q", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["out_of_distribution"] == 1
    document = json.loads((out / "counterfactuals.json").read_text())
    flagged = next(row for row in rows if (row.confidence or 0) < limit)
    (image,) = document["images"]
    assert document["models"][0]["threshold"] == limit, "the threshold of the run, not the model's"
    assert image["original"]["is_ood"] is True
    assert (image["path"], image["targets"][0]["target"]) == (flagged.path, flagged.label)
    assert (out / "index.html").is_file()


def test_flagged_images_are_not_saved_over_other_files(
    small_package: Path,
    tiny_onnx: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "index.html").write_text("mine")
    line = ["ood-score", str(photographs), "--save-flagged", str(tmp_path), "--model"]
    assert main([*line, str(small_package)]) == 2
    assert "was not written by ratioctl" in capsys.readouterr().err
    assert main([*line, str(tiny_onnx)]) == 2
    assert "an ONNX file has no gradients" in capsys.readouterr().err
