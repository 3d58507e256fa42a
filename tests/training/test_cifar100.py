"""The recipes of CIFAR-100, whose 100 classes of 32x32 pixels are generated here: training, calibration,
evaluation, export and scoring. Only the network and the schedule are smaller.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratioctl import package as packages
from ratioctl.cli import main
from ratioctl.models.predict import predictor
from ratioctl.onnx import runtime

CLASSES = [f"class-{k:03}" for k in range(100)]
SMALL = (
    *("model.architecture=wideresnet-10-1", "optim.epochs=0.4", "optim.batch_size=40"),
    *("optim.batch_size_out=8", "optim.milestones=[0.1, 0.2, 0.3]", "optim.validate_every=0.2"),
    *("data.validation=100", "data.test=", "data.outside=noise:smooth", "objective.inside.attack.steps=2"),
    *("objective.outside.attack.steps=2", "objective.outside.more_steps_per_drop=0"),
    "objective.outside.max_steps=",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder train/ of three images a class and test/ of two; each class has its own colors."""
    folder = tmp_path_factory.mktemp("cifar-100-like")
    generator = np.random.default_rng(0)
    for label in CLASSES:
        colors = generator.integers(0, 256, (2, 2, 3))
        for split, count in (("train", 3), ("test", 2)):
            (folder / split / label).mkdir(parents=True)
            for k in range(count):
                pixels = colors.repeat(16, 0).repeat(16, 1) + generator.integers(-30, 31, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    folder / split / label / f"{k}.png"
                )
    return folder


def test_from_recipe_to_onnx_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    test, run = str(data / "test"), tmp_path / "run"
    line = ["train", "cifar100-ratio-0.25", "--out", str(run), "--device", "cpu"]
    for setting in (*SMALL, f"data.train={data / 'train'}"):
        line += ["--set", setting]
    assert main(line) == 0
    package = str(run / "package")
    trained = packages.read(package)
    assert trained.label_names == tuple(CLASSES)
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(text)["updates"] for text in metrics] == [2, 2]
    assert main(["calibrate", package, "--data", test, "--device", "cpu"]) == 0
    report = tmp_path / "report"
    line = ["evaluate", package, "--data", test, "--ood", "noise=noise:uniform", "--suite", "clean"]
    assert main([*line, "--limit", "100", "--out", str(report), "--device", "cpu"]) == 0
    file = tmp_path / "hundred.onnx"
    assert main(["export", package, "--output", str(file)]) == 0
    rows = json.loads((report / "report.json").read_text(encoding="utf-8"))["models"][0]["measurements"]
    evaluated = {row["name"]: row["n"] for row in rows if row["dataset"].endswith("test")}
    assert evaluated["accuracy"] == 100
    session = runtime.load(file)
    assert session.spec.label_names == tuple(CLASSES)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert session.predict(images).shape == (3, 100)
    expected = predictor(packages.read(package)).predict(images)
    assert session.predict(images) == pytest.approx(expected, abs=1e-4)
    capsys.readouterr()
    picture = data / "test" / CLASSES[7] / "0.png"
    line = ["ood-score", str(picture), "--model", str(file), "--format", "jsonl"]
    assert main([*line, "--probabilities"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [name for name in row if name.startswith("p:")] == [f"p:{label}" for label in CLASSES]
    assert sum(row[f"p:{label}"] for label in CLASSES) == pytest.approx(1, abs=1e-6)
    assert row["label"] in CLASSES
