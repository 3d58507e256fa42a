"""`ratioctl.package_checkpoint`: what the command does, with values instead of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ratioctl
from ratioctl import package
from ratioctl.cli import main
from ratioctl.errors import OutputError, UsageError
from ratioctl.models import build

NAMES = ["cat", "dog", "frog"]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    torch.manual_seed(0)
    network = build("resnet18", num_classes=3, width=2, mean=[0.0] * 3, std=[1.0] * 3).network
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_it_writes_what_the_command_writes(weights: Path, tmp_path: Path) -> None:
    made = ratioctl.package_checkpoint(
        weights, arch="resnet18", labels=NAMES, mean=(0.5,) * 3, std=0.25, input_size=8, out=tmp_path / "a"
    )
    line = ["--arch", "resnet18", "--labels", "cat,dog,frog", "--mean", "0.5,0.5,0.5", "--std", "0.25"]
    command = ["package", str(weights), *line, "--input-size", "8", "--out", str(tmp_path / "b"), "-q"]
    assert main(command) == 0
    assert made.package.digest == package.read(tmp_path / "b").digest
    assert (made.package.path, made.prefix, made.checked, made.warnings) == (
        tmp_path / "a",
        "module.",
        None,
        (),
    )
    assert any('removed the prefix "module."' in note for note in made.notes)
    clf = ratioctl.Classifier.from_pretrained(made.package)
    assert clf.labels == tuple(NAMES)
    assert clf.predict(np.zeros((8, 8, 3), np.uint8)).is_ood is None, "it is not calibrated"


def test_images_are_checked(weights: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (90, 120, 150)).save(tmp_path / "data" / name / "a.png")
    made = ratioctl.package_checkpoint(
        *(str(weights),),
        arch="resnet18",
        labels="cat,dog,frog",
        mean=0.1,
        std=0.05,
        input_size=8,
        data=str(tmp_path / "data"),
        out=str(tmp_path / "a"),
    )
    assert made.checked is not None
    assert (made.checked.n, made.checked.accuracy) == (3, 1 / 3)
    assert any("where about 0 and 1 are usual" in text for text in made.warnings)


def test_what_is_refused_is_told_in_terms_of_python(weights: Path, tmp_path: Path) -> None:
    good = {"arch": "resnet18", "labels": NAMES, "mean": 0.0, "std": 1.0, "out": tmp_path / "a"}
    for change, said in (
        ({"labels": ["cat"]}, "labels: names fewer than two classes"),
        ({"labels": ["cat", "cat", "dog"]}, 'labels: names "cat" twice'),
        ({"labels": 3}, "labels: cannot be a value of type int"),
        ({"mean": "0.5"}, "mean: cannot be a value of type str"),
        ({"mean": None}, "mean: is given without|std: is given without mean"),
        ({"std": 0.0}, "std: is 0; pixels are divided by it"),
        ({"arch": "timm:resnet18"}, "input_size: is needed"),
        ({"arch_options": ["depth=3"]}, "resnet18: has no depth option"),
    ):
        with pytest.raises(UsageError, match=said):
            ratioctl.package_checkpoint(weights, **{**good, **change})
    assert not (tmp_path / "a").exists()
    ratioctl.package_checkpoint(weights, **good)
    with pytest.raises(OutputError, match=r"holds a package\. .* replace it with force"):
        ratioctl.package_checkpoint(weights, **good)
    assert ratioctl.package_checkpoint(weights, **good, force=True).package.path == tmp_path / "a"
