"""Calibration: known temperatures are recovered, thresholds are as defined, nothing worsens silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.calibration import calibrate as calibration
from ratioctl.calibration.calibrate import _warnings, calibrate
from ratioctl.calibration.temperature import find_temperature as search
from ratioctl.calibration.temperature import improves_held_out
from ratioctl.cli import main
from ratioctl.data import in_distribution
from ratioctl.data.registry import SourceRequest
from ratioctl.errors import SourceError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Calibration
from ratioctl.training.loop import fit


def drawn(temperature: float, n: int = 5_000, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose true probabilities are softmax(logits / temperature), and labels drawn from them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, classes)) * 2 * temperature
    p = metrics.softmax(logits, temperature)
    labels = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=classes - 1)
    return logits, labels


@pytest.mark.parametrize("objective", ["ece", "nll"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_the_true_temperature_is_found(objective: str, temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = search(logits, labels, Calibration(objective=objective))  # type: ignore[arg-type]
    assert found == pytest.approx(temperature, rel=0.06)


def test_the_grid_is_the_papers() -> None:
    logits, labels = drawn(1.0, n=500)
    grid = np.geomspace(0.05, 2.71, 500)
    found = search(logits, labels, Calibration())
    correct = logits.argmax(1) == labels
    values = [metrics.ece(metrics.confidence(logits, t), correct, 10, 0.2) for t in grid]
    assert values[int(np.argmin(np.abs(grid - found)))] == min(values)


def test_a_temperature_must_improve_held_out_halves() -> None:
    """A wrong temperature is fixed; for logits that are right, a few images offer only noise."""
    for objective in ("ece", "nll"):
        spec = Calibration(objective=objective)  # type: ignore[arg-type]
        for temperature in (0.4, 2.0):
            assert improves_held_out(*drawn(temperature, n=2000), spec)
        assert not improves_held_out(np.eye(2)[[0]], np.array([0]), spec)
    assert not improves_held_out(*drawn(1.0, n=40), Calibration(objective="nll"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    settings = [
        "model.architecture=wideresnet-10-1",
        "model.width=",
        "optim.epochs=1",
        "optim.batch_size=32",
        "optim.batch_size_out=16",
    ]
    settings += ["optim.validate_images=24", "objective.inside.attack.steps=1"]
    settings += ["objective.outside.attack.steps=1", 'data.outside="noise:uniform"']
    return fit(recipes.load("digits-ratio", settings), tmp_path_factory.mktemp("run"))


def copy_of(package: ModelPackage, path: Path) -> ModelPackage:
    data = package.weights_path.read_bytes()
    config = packages.portable_config(package)
    return packages.write(path, config=config, weights=data, recipe_text=package.recipe_text)


def test_calibration_writes_what_it_measured(package: ModelPackage, tmp_path: Path) -> None:
    found = calibrate(copy_of(package, tmp_path / "model"))
    again = packages.read(tmp_path / "model")
    assert again.temperature == found.temperature != 1
    record = again.config["ratio"]["calibration"]
    assert record["n"] == found.n == 216
    assert record["bins"] == 10
    assert record["report_bins"] == 15
    assert record["range"] == [0.1, 1.0]
    assert found.after["ece"] <= found.before["ece"]
    assert packages.read(package.path).temperature == 1, "the original is another folder"


def test_thresholds_keep_their_share_of_the_held_out_images(package: ModelPackage, tmp_path: Path) -> None:
    from ratioctl.data import loader

    found = calibrate(copy_of(package, tmp_path / "model"))
    assert found.package.recipe_text is not None
    images = loader.held_out(recipes.loads(found.package.recipe_text))
    confidences = np.sort(
        metrics.confidence(predictor(found.package).predict(images.pixels), found.temperature)
    )
    for name, percent in (("tpr95", 95), ("tpr99", 99)):
        position = int((100 - percent) * len(confidences) // 100)
        assert found.thresholds[name] == confidences[position]
        assert (confidences >= found.thresholds[name]).mean() >= percent / 100


def test_out_leaves_the_package_alone(package: ModelPackage, tmp_path: Path) -> None:
    model = copy_of(package, tmp_path / "model")
    before = (model.path / "config.json").read_bytes()
    found = calibrate(model, out=tmp_path / "other")
    assert found.package.path == tmp_path / "other"
    assert (model.path / "config.json").read_bytes() == before


def test_measurements_of_another_temperature_do_not_stay(package: ModelPackage, tmp_path: Path) -> None:
    old = packages.update(
        copy_of(package, tmp_path / "model"),
        config_changes={"ratio": {"metrics": {"measurements": [{"name": "ece", "value": 0.5, "n": 10}]}}},
    )
    found = calibrate(old)
    assert found.package.config["ratio"]["metrics"] == {}
    assert any("measurements" in w for w in found.warnings)
    filed = {"ratio": {"metrics": {"measurements": [{"name": "ece", "value": 0.1, "n": 10}]}}}
    again = calibrate(packages.update(found.package, config_changes=filed))
    assert again.temperature == found.temperature
    assert again.package.config["ratio"]["metrics"] == filed["ratio"]["metrics"], "they still hold"


def test_given_data_is_used(package: ModelPackage, tmp_path: Path) -> None:
    found = calibrate(copy_of(package, tmp_path / "model"), data="digits:test")
    assert found.n > 300
    assert found.package.config["ratio"]["calibration"]["source"] == "digits:test"


def test_warnings_are_reported(package: ModelPackage, tmp_path: Path) -> None:
    found = calibrate(copy_of(package, tmp_path / "model"))
    assert any("216 held-out images" in w for w in found.warnings)
    ends = packages.portable_config(package)
    arrays = {k: v * (1e-3 if k == "fc.weight" else 1) for k, v in packages.read_weights(package).items()}
    arrays["fc.bias"] = arrays["fc.bias"] * 1e-3
    flat = packages.write(tmp_path / "flat", config=ends, weights=arrays, recipe_text=package.recipe_text)
    assert any("end of the grid" in w for w in calibrate(flat).warnings)


def test_a_model_at_chance_keeps_temperature_1_and_is_called_so(
    package: ModelPackage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of a random linear layer: accuracy about 10 % of ten classes."""
    arrays = dict(packages.read_weights(package))
    rng = np.random.default_rng(0)
    shape = arrays["fc.weight"].shape
    arrays["fc.weight"] = rng.normal(size=shape).astype(np.float32)[rng.permutation(10)]
    arrays["fc.weight"][:] = arrays["fc.weight"].mean(0)
    arrays["fc.bias"] = np.where(np.arange(10) == 3, 4.0, 0.0).astype(np.float32)
    config = packages.portable_config(package)
    packages.write(tmp_path / "dull", config=config, weights=arrays, recipe_text=package.recipe_text)
    found = calibrate(tmp_path / "dull")
    assert found.collapsed
    assert found.accuracy == pytest.approx(found.chance, abs=0.02)
    assert main(["calibrate", str(tmp_path / "dull"), "-q"]) == 0
    said = capsys.readouterr().err
    assert "WARNING: this model is no better than chance" in said
    assert not calibrate(copy_of(package, tmp_path / "model")).collapsed


def test_labels_in_another_order_are_named(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is always right, with every output under the name of its neighbour."""
    labels = in_distribution.load_labelled("digits:test", 8, 1, package.label_names).labels
    assert labels is not None
    right = SimpleNamespace(predict=lambda pixels: 9.0 * np.eye(10)[(labels + 1) % 10])
    monkeypatch.setattr(calibration, "predictor", lambda package, device: right)
    found = calibrate(copy_of(package, tmp_path / "model"), data="digits:test")
    assert found.warnings[0].startswith(
        "its labels are in another order: accuracy is 0.0% as given and 100.0% with "
        "--labels 9,0,1,2,3,4,5,6,7,8"
    )


def test_a_bundled_model_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: ModelPackage, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = copy_of(package, tmp_path / "assets" / "models" / "cifar10-ratio")
    monkeypatch.setattr("ratioctl.utils.resources.folder", lambda name: tmp_path / name)
    before = (bundled.path / "config.json").read_bytes()
    assert main(["calibrate", "cifar10-ratio", "--data", "digits:test"]) == 2
    assert (
        "is a bundled model, which is read-only. Write a changed copy with --out" in capsys.readouterr().err
    )
    assert main(["calibrate", "cifar10-ratio", "--data", "digits:test", "--out", str(tmp_path / "mine")]) == 0
    assert packages.read(tmp_path / "mine").calibrated
    assert (bundled.path / "config.json").read_bytes() == before


def test_data_that_is_not_there(package: ModelPackage, tmp_path: Path) -> None:
    model = copy_of(package, tmp_path / "model")
    with pytest.raises(SourceError, match=r"nowhere"):
        calibrate(model, data=str(tmp_path / "nowhere"))
    bare = packages.write(
        tmp_path / "bare", config=packages.portable_config(package), weights=package.weights_path.read_bytes()
    )
    with pytest.raises(UsageError, match="--data"):
        calibrate(bare)


def test_an_image_that_cannot_be_read_is_named_and_changes_the_exit_code(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["calibrate", str(small_package), "--data", str(cats_and_dogs), "--out"]
    assert main([*line, str(tmp_path / "whole")]) in (0, None)
    (cats_and_dogs / "dog" / "0.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert main([*line, str(tmp_path / "less")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "images of data that could not be read and are left out: 1 (dog/0.png:" in said
    assert packages.read(tmp_path / "less").calibrated


def test_a_rise_of_ece_is_in_percent() -> None:
    spec = Calibration()
    before, after = {"ece_report": 0.316, "nll": 1.25}, {"ece_report": 0.399, "nll": 1.5}
    pixels, labels = np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1])
    request = SourceRequest(source="x", argument="", size=8, channels=3)
    found = _warnings(spec, 2.0, before, after, request.images(pixels, labels, ("a", "b")))
    assert "ECE (15 bins) rose from 31.60% to 39.90%" in found
    assert "NLL rose from 1.25 to 1.5" in found
