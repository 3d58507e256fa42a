"""Equal results whatever the run, the batch and the backend; and results for degenerate images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ratioctl
from ratioctl import images as decoding
from ratioctl import package
from ratioctl.cli import main
from ratioctl.errors import ImageError, UsageError
from ratioctl.scoring import backends
from ratioctl.scoring import pipeline as score


def flat(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def checkerboard(size: int = 8) -> np.ndarray:
    return np.where(np.indices((size, size)).sum(0) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)


EXTREMES = {"black": flat(0), "white": flat(255), "checkerboard": checkerboard()}


@pytest.fixture(scope="module")
def model(small_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package at a temperature of real models: at its own 0.01 the eighth digit is the sixth."""
    folder = tmp_path_factory.mktemp("numerics") / "model"
    shutil.copytree(small_package, folder)
    package.update(package.read(folder), config_changes={"ratio": {"temperature": 0.5}})
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images: noise, the extremes, and one that cannot be read in the middle."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(11)
    for k in range(66):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"noise-{k:02}.png")
    for name, pixels in EXTREMES.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "noise-30b.png").write_bytes(b"no image")
    return folder


def numbers(rows: list[score.ScoreRow]) -> np.ndarray:
    return np.array([row.probabilities for row in rows if row.error is None])


def test_rows_do_not_depend_on_run_batch_or_workers(
    model: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = backends.open_model(model, "tpr95", device="cpu")

    def rows(workers: int) -> list[score.ScoreRow]:
        return list(score.ood_score(many, opened, probabilities=True, workers=workers))

    first = rows(1)
    assert len(first) == 70
    # Batches are made of what has arrived, so even the same call need not cut them alike.
    for batch in (32, 1, 2, 7, 64):
        monkeypatch.setattr(score, "MAX_BATCH", batch)
        found = rows(2)
        assert [(r.path, r.label, r.error) for r in found] == [(r.path, r.label, r.error) for r in first]
        assert np.abs(numbers(found) - numbers(first)).max() < 1e-6, f"batches of {batch}"


def test_an_image_does_not_depend_on_its_companions(model: Path) -> None:
    """Black among noise, alone, and among others that hold NaN: the same to 1e-6, and only theirs are NaN."""
    network = ratioctl.load_model(model)
    pixels = decoding.to_pixels(np.stack([*EXTREMES.values()]))
    with torch.inference_mode():
        alone = torch.cat([network(torch.from_numpy(pixels[k : k + 1])) for k in range(3)])
        together = network(torch.from_numpy(pixels))
        spoiled = np.concatenate([pixels, np.full_like(pixels[:1], np.nan), pixels[:1]])
        spoiled[3, :, 2:, 2:] = 0.5  # NaN in some of the pixels is enough
        beside = network(torch.from_numpy(spoiled))
    assert torch.isfinite(alone).all()
    assert (alone - together).abs().max() < 1e-6
    assert torch.isnan(beside[3]).all(), "a spoiled image has no logits, rather than wrong ones"
    assert (beside[[0, 1, 2, 4]] - alone[[0, 1, 2, 0]]).abs().max() < 1e-6


@pytest.mark.parametrize("name", EXTREMES)
def test_flat_and_checkered_images_have_answers(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{name}.png"
    Image.fromarray(EXTREMES[name]).save(path)
    line = ["ood-score", str(path), "--model", str(model), "--format", "jsonl", "-q", "--probabilities"]
    assert main(line) == 0
    (row,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert 0.25 <= row["confidence"] <= 1
    assert row["ood_score"] == pytest.approx(1 - row["confidence"], abs=1e-8)
    assert row["is_ood"] is (row["confidence"] < 0.5)
    each = [value for key, value in row.items() if key.startswith("p:")]
    assert sum(each) == pytest.approx(1, abs=1e-7)
    with torch.inference_mode():
        logits = ratioctl.load_model(model)(torch.from_numpy(decoding.to_pixels(EXTREMES[name][None])))
    assert torch.softmax(logits[0] / 0.5, 0).tolist() == pytest.approx(each, abs=1e-4)
    (answer,) = ratioctl.counterfactual(
        path, target="second", eps=[0.5, 1.0], model=model, steps=5, device="cpu"
    )
    (target,) = answer.targets
    before = answer.original.probabilities[package.read(model).label_names.index(target.target)]
    confidences = [before, *(budget.confidence for budget in target.budgets)]
    assert confidences == sorted(confidences)
    assert all(budget.distance["l2"] <= budget.eps for budget in target.budgets)


def tiff(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.float32)).save(path)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -0.1])
def test_files_with_pixels_that_are_no_brightness_are_refused(
    value: float, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.full((8, 8), 0.5)
    values[3, 4] = value
    path = tiff(tmp_path / "measured.tiff", values)
    assert main(["ood-score", str(path), "--model", str(model), "--format", "jsonl", "-q"]) == 3
    (row,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert row["label"] is row["confidence"] is row["is_ood"] is None
    assert "floating-point pixels outside [0, 1]" in row["error"]
    line = ["counterfactual", str(path), "--target", "dog", "--model", str(model), "--eps", "1"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 3
    assert "floating-point pixels outside [0, 1]" in capsys.readouterr().err
    with pytest.raises(ImageError, match="floating-point pixels outside"):
        ratioctl.counterfactual(path, target="dog", eps=1.0, model=model)


def test_arrays_that_are_no_8_bit_images_are_refused(model: Path) -> None:
    """Whether NaN, infinite or in [0,1]: which of them a number means is not ours to guess."""
    for value in (np.nan, np.inf, 0.5):
        with pytest.raises((UsageError, ImageError), match="uint8"):
            ratioctl.counterfactual(
                np.full((8, 8, 3), value, np.float32), target="dog", eps=1.0, model=model, steps=2
            )
    with pytest.raises(ValueError, match="NaN"):
        decoding.to_uint8(np.full((1, 3, 8, 8), np.nan, np.float32))


def test_an_exported_graph_flags_what_is_no_image() -> None:
    """Clients of a server send what they like: NaN and infinity are out of distribution, not within it."""
    from ratioctl.onnx.graph import Flagging

    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3))

    graph = Flagging(Means(), 0.5, 0.4, "float")
    x = torch.rand(4, 3, 8, 8)
    x[1, 0, 0, 0], x[2, 0, 0, 0], x[3] = torch.nan, torch.inf, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    _, _, _, confidence, ood_score, is_ood = graph(x)
    assert torch.isnan(confidence[1:3]).all()
    assert torch.isnan(ood_score[1:3]).all()
    assert is_ood.tolist() == [bool(confidence[0] < 0.4), True, True, False]


def test_a_model_whose_numbers_overflow_says_so(
    model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights whose products are not: no row with a made-up confidence, but exit code 5."""
    folder = Path(shutil.copytree(model, tmp_path / "overflow"))
    there = package.read(folder)
    weights = package.read_weights(there)
    for name in ("bn1.weight", "linear.weight"):
        weights[name] = np.full_like(weights[name], 3e38)
    package.write(folder, config=package.portable_config(there), weights=weights)
    data, out, small = tmp_path / "data", str(tmp_path / "out"), str(many / "noise-00.png")
    for label in there.label_names[:2]:
        (data / label).mkdir(parents=True)
        shutil.copy(small, data / label / "0.png")
    for line in (
        ["ood-score", str(many), "--model", str(folder)],
        ["counterfactual", small, "--target", "dog", "--eps", "1", "--steps", "2", "--model", str(folder)],
        ["evaluate", str(folder), "--data", str(data), "--ood", f"n={many}"],
        ["calibrate", str(folder), "--data", str(data)],
        ["export", str(folder), "--output", f"{out}.onnx"],
    ):
        where = ["--out", out] if line[0] in ("counterfactual", "evaluate", "calibrate") else []
        assert main([*line, *where, "-q"]) == 5, line[0]
        assert "NaN or infinite" in capsys.readouterr().err
