"""A model whose input is no square and whose images are padded, from training to every use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import recipe as recipes
from ratioctl.calibration.calibrate import calibrate
from ratioctl.cli import main
from ratioctl.package import ModelPackage
from ratioctl.training.loop import fit
from tests.photographs import photographs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPackage, Path]:
    folder = tmp_path_factory.mktemp("wide")
    photos = photographs(folder / "photos", 8)
    recipe = recipes.parse(
        {
            "name": "wide",
            "data": {
                "train": str(photos),
                "size": [12, 20],
                "resize": "pad",
                "validation": 6,
                "outside": ["noise:smooth", "noise:uniform"],
            },
            "model": {"width": 2},
            "objective": {
                "inside": {"robust": 1.0, "attack": {"ball": {"eps": 0.2}, "steps": 1}},
                "outside": {"clean": 1.0},
            },
            "optim": {"epochs": 1, "batch_size": 8, "batch_size_out": 4},
        }
    )
    return calibrate(fit(recipe, folder / "run")).package, photos


def test_every_use_takes_the_frame_of_the_package(wide: tuple[ModelPackage, Path], tmp_path: Path) -> None:
    package, photos = wide
    assert package.input_size == (3, 12, 20)
    assert package.config["pretrained_cfg"]["crop_mode"] == "border"
    assert package.frame.pad
    image = next((photos / "flower").iterdir())
    (row,) = ratioctl.ood_score(str(image), model=package, probabilities=True)
    exported = ratioctl.export(package, output=tmp_path / "m.onnx")
    (again,) = ratioctl.ood_score(str(image), model=exported.path, probabilities=True)
    np.testing.assert_allclose(again.probabilities, row.probabilities, atol=1e-5)
    (explained,) = ratioctl.counterfactual(
        str(image), target="sky", model=package.path, eps=0.5, steps=2, out=tmp_path / "cf"
    )
    assert explained.input.shape == (12, 20, 3)
    np.testing.assert_allclose(explained.original.probabilities, row.probabilities, atol=1e-5)
    assert any("padded" in note for note in explained.notes)
    document = json.loads((tmp_path / "cf/counterfactuals.json").read_text())
    with Image.open(tmp_path / "cf" / document["images"][0]["targets"][0]["budgets"][0]["png"]) as saved:
        assert saved.size == (20, 12)
    report = ratioctl.evaluate(package, data=str(photos), suite="clean", limit=6)[0]
    assert report.measurements


def test_the_bits_of_training_are_those_of_every_use(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("low", "high"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 4096, (12, 12)).astype(np.uint16)
            Image.fromarray(pixels // (8 if name == "low" else 1)).save(
                tmp_path / "scans" / name / f"{k}.png"
            )
    recipe = recipes.parse(
        {
            "name": "scans",
            "data": {
                "train": str(tmp_path / "scans"),
                "size": 12,
                "channels": 1,
                "bit_depth": 12,
                "validation": 2,
            },
            "model": {"width": 2},
            "objective": {"inside": {"clean": 1.0}},
            "optim": {"epochs": 0.5, "batch_size": 4},
        }
    )
    package = calibrate(fit(recipe, tmp_path / "run")).package
    assert package.config["ratio"]["bit_depth"] == 12
    image = str(tmp_path / "scans/high/0.png")
    (row,) = ratioctl.ood_score(image, model=package, probabilities=True)
    with Image.open(image) as scan:
        eight = np.rint(np.asarray(scan) * (255 / 4095)).astype(np.uint8)
    (same,) = ratioctl.ood_score(eight[..., None], model=package, probabilities=True)
    (other,) = ratioctl.ood_score(image, model=package, probabilities=True, bit_depth=16)
    np.testing.assert_allclose(row.probabilities, same.probabilities, atol=1e-6)
    assert row.probabilities != other.probabilities
    exported = ratioctl.export(package, output=tmp_path / "m.onnx")
    (again,) = ratioctl.ood_score(image, model=exported.path, probabilities=True)
    np.testing.assert_allclose(row.probabilities, again.probabilities, atol=1e-5)


def test_a_region_counts_in_the_frame(wide: tuple[ModelPackage, Path], tmp_path: Path) -> None:
    package, photos = wide
    image = next((photos / "roof").iterdir())
    (found,) = ratioctl.counterfactual(
        str(image), target="sky", model=package.path, eps=1.0, steps=2, region="15,0,5,4"
    )
    changed = (found.targets[0].budgets[0].image != found.input).any(axis=2)
    assert not changed[4:].any()
    assert not changed[:, :15].any()
    line = ["counterfactual", str(image), "--target", "sky", "--model", str(package.path), "--steps", "1"]
    assert main([*line, "--region", "0,0,5,13", "--out", str(tmp_path / "o")]) == 2


def test_package_takes_a_height_and_a_width(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ratioctl import models, package

    network = models.build_network("resnet18", num_classes=2, channels=3, width=2)
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, weights := tmp_path / "w.safetensors"
    )
    line = ["package", str(weights), "--arch", "resnet18", "--labels", "a,b", "--mean", "0", "--std", "1"]
    assert main([*line, "--input-size", "24x16", "--resize", "pad", "--out", str(tmp_path / "p")]) == 0
    made = package.read(tmp_path / "p")
    assert (made.input_size, made.frame.pad) == ((3, 24, 16), True)
    for wrong in ("24x", "0", "4096", "24x16x3"):
        assert main([*line, "--input-size", wrong, "--out", str(tmp_path / "q")]) == 2
