"""From a folder of photographs to an exported model and its report, as a newcomer does it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ratioctl import recipe as recipes
from ratioctl.cli import main
from ratioctl.data import in_distribution, loader
from tests.photographs import MORE, photographs

pytestmark = pytest.mark.slow


def test_photographs_to_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))
    photographs(tmp_path / "scenes", 24, MORE)
    assert main(["init", "scenes", "--outside", "patches:scenes", "--outside", "noise:smooth"]) == 0
    line = re.search(r"Next: ratioctl (.*)", capsys.readouterr().out)
    assert line is not None
    few = [
        "--set",
        "optim.epochs=12",
        "--set",
        "optim.head_epochs=3",
        "--set",
        "objective.inside.ramp_epochs=3",
    ]
    few += ["--set", "objective.outside.ramp_epochs=3", "--set", "optim.validate_every=6"]
    assert main([*line[1].split(), *few, "--max-time", "4m"]) == 0
    report_line = re.search(r"Report: ratioctl (.*)", capsys.readouterr().out)
    assert report_line is not None
    model = "runs/scenes/package"
    package = json.loads(Path(model, "config.json").read_text())
    assert package["label_names"] == sorted(MORE)
    assert package["ratio"]["provenance"]["init"] == {
        **package["ratio"]["provenance"]["init"],
        "name": "cifar10-ratio-small",
        "head": "new",
    }
    assert package["pretrained_cfg"]["mean"] == [0.4914, 0.4822, 0.4464], "the start's"
    image = "scenes/sky/000.jpg"
    cf = ["counterfactual", image, "--target", "flower", "--model", model, "--steps", "10", "--eps", "1"]
    assert main([*cf, "--out", "cf"]) == 0
    assert main(["ood-score", "scenes", "--model", model, "--output", "rows.jsonl"]) == 0
    rows = [json.loads(row) for row in Path("rows.jsonl").read_text().splitlines()]
    right = sum(row["label"] in row["path"] for row in rows)
    assert right >= 0.7 * len(rows), "the regions are easy to tell apart"
    assert main(["export", model, "--output", "scenes.onnx"]) == 0
    assert main(["ood-score", image, "--model", "scenes.onnx", "--json", "--output", "again.jsonl"]) == 0
    assert json.loads(Path("again.jsonl").read_text())["label"] == next(
        row["label"] for row in rows if row["path"] == image
    )
    assert report_line[1].split()[:4] == ["report", model, "--data", "split:test:scenes"]
    assert main([*report_line[1].split(), "--limit", "10", "--out", "page"]) == 0
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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of a Linux process")
def test_images_of_224_pixels_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))
    (first,) = photographs(tmp_path / "one", 1, ("roof",)).glob("roof/*.jpg")
    for name in ("a", "b"):
        (tmp_path / "many" / name).mkdir(parents=True)
        for k in range(600):
            os.link(first, tmp_path / "many" / name / f"{k}.jpg")
    recipe = recipes.parse(
        {
            "name": "large",
            "data": {"train": str(tmp_path / "many"), "size": [224, 256]},
            "objective": {"inside": {"clean": 1.0}},
            "optim": {"batch_size": 32},
        }
    )

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", status)[1])  # type: ignore[index]

    loader.to_float(np.zeros((1, 8, 8, 3), np.uint8))
    before = held()
    everything = in_distribution.load_labelled(recipe.data.train, recipe.data.frame, 3)
    assert everything.labels is not None
    keep, _ = in_distribution.hold_out(everything.labels, 0.1, 0)
    part = everything.subset(keep)
    for update in range(20):
        loader.batch_at(update, recipe, part, None, torch.zeros(3, dtype=torch.uint8))
    size = everything.pixels.nbytes
    assert size > 190 * 2**20
    assert held() - before < size / 2, "besides the map of the file there are a batch and what decodes"
