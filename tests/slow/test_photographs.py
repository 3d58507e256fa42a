"""From a folder of photographs to an exported model and its report, as a newcomer does it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ratioctl.cli import main
from tests.photographs import photographs

pytestmark = pytest.mark.slow


def test_photographs_to_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))
    photographs(tmp_path / "scenes", 24)
    assert main(["init", "scenes", "--outside", "patches:scenes", "--outside", "noise:smooth"]) == 0
    line = re.search(r"Next: ratioctl (.*)", capsys.readouterr().out)
    assert line is not None
    few = [
        "--set",
        "optim.epochs=3",
        "--set",
        "optim.head_epochs=1",
        "--set",
        "objective.inside.ramp_epochs=1",
    ]
    few += ["--set", "objective.outside.ramp_epochs=1", "--set", "optim.validate_every=3"]
    assert main([*line[1].split(), *few]) == 0
    model = "runs/scenes/package"
    package = json.loads(Path(model, "config.json").read_text())
    assert package["label_names"] == ["flower", "roof", "sky"]
    assert package["ratio"]["provenance"]["init"] == {
        **package["ratio"]["provenance"]["init"],
        "name": "restricted64-ratio",
        "head": "new",
    }
    assert package["pretrained_cfg"]["mean"] == [0.4753, 0.4418, 0.3707], "the start's"
    image = "scenes/sky/000.jpg"
    cf = ["counterfactual", image, "--target", "flower", "--model", model, "--steps", "10", "--eps", "1"]
    assert main([*cf, "--out", "cf"]) == 0
    assert main(["ood-score", "scenes", "--model", model, "--output", "rows.jsonl"]) == 0
    rows = [json.loads(row) for row in Path("rows.jsonl").read_text().splitlines()]
    right = sum(row["label"] in row["path"] for row in rows)
    assert right >= 0.7 * len(rows), "the three regions are easy to tell apart"
    assert main(["export", model, "--output", "scenes.onnx"]) == 0
    assert main(["ood-score", image, "--model", "scenes.onnx", "--json", "--output", "again.jsonl"]) == 0
    assert json.loads(Path("again.jsonl").read_text())["label"] == next(
        row["label"] for row in rows if row["path"] == image
    )
    report = ["report", model, "--data", "split:test:scenes", "--limit", "9", "--out", "page"]
    assert main(report) == 0
    page = Path("page/report.html").read_text()
    for title in ("Confusion matrix", "Classes", "Most outlying ID images", "not a diagnosis", "Start"):
        assert title in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_train_takes_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))
    photographs(tmp_path / "scenes", 8)
    few = [
        "--set",
        "optim.epochs=0.2",
        "--set",
        "optim.head_epochs=0.1",
        "--set",
        'data.outside="noise:smooth"',
    ]
    assert main(["train", "scenes", *few]) == 0
    assert Path("runs/scenes/recipe.toml").is_file()
    assert "the head is new" in capsys.readouterr().err
    assert main(["train", "scenes", *few]) == 2, "a second run is refused"
    assert main(["train", "scenes", *few, "--resume"]) == 0, "it is done already"
