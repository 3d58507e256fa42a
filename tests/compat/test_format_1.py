"""A package of format 1 stays readable for good: the one in `package-format-1/` is never written again.

What it answered when it was made is in `format-1.json`; see `README.md`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Callable[..., tuple[int, str]]

EXPECTED = json.loads((Path(__file__).parent / "format-1.json").read_text(encoding="utf-8"))
ROAD_TOLERANCE = 1e-5
FILES = ("README.md", "config.json", "model.onnx", "model.safetensors", "recipe.toml")


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def pixels(digits: Path) -> np.ndarray:
    """(N, 8, 8) uint8."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(digits.iterdir())])


def check(rows: list[tuple[str, float, bool]]) -> None:
    """Rows (label, confidence, is_ood) of all digits against what was recorded."""
    expected = EXPECTED["images"]
    assert [row[0] for row in rows] == [one["label"] for one in expected]
    assert [row[1] for row in rows] == pytest.approx(
        [one["confidence"] for one in expected], rel=0, abs=ROAD_TOLERANCE
    )
    assert [row[2] for row in rows] == [one["is_ood"] for one in expected]


@pytest.fixture(autouse=True)
def _nothing_is_written(format_1: Path) -> Iterator[None]:
    yield
    assert sums(format_1) == EXPECTED["sha256"]


@pytest.fixture
def scored(ratioctl: Run, digits: Path) -> Callable[[Path], list[tuple[str, float, bool]]]:
    def rows(model: Path) -> list[tuple[str, float, bool]]:
        line = ("ood-score", digits, "--model", model, "--format", "csv", "--device", "cpu", "-q")
        code, shown = ratioctl(*line)
        assert code == 0
        read = list(csv.DictReader(shown.splitlines()))
        assert [row["path"] for row in read] == [f"{digits}/{one['file']}" for one in EXPECTED["images"]]
        return [(row["label"], float(row["confidence"]), row["is_ood"] == "true") for row in read]

    return rows


def test_it_is_small_and_complete(format_1: Path) -> None:
    assert tuple(sums(format_1)) == FILES
    assert sum(path.stat().st_size for path in format_1.iterdir()) < 200_000
    for path in format_1.iterdir():
        assert b"/home/" not in path.read_bytes()
        assert b"/tmp/" not in path.read_bytes()


def test_the_recorded_answers_tell_something() -> None:
    """Several classes, flagged and not, far from the threshold by more than the tolerance."""
    images = EXPECTED["images"]
    assert len({one["label"] for one in images}) > 5
    assert {one["is_ood"] for one in images} == {False, True}
    threshold = EXPECTED["thresholds"]["tpr95"]
    assert min(abs(one["confidence"] - threshold) for one in images) > 100 * ROAD_TOLERANCE


def test_verify(ratioctl: Run, format_1: Path) -> None:
    code, shown = ratioctl("verify", format_1, "--json")
    assert code == 0
    files = [{"file": name, "ok": True, "fault": None} for name in sorted(FILES)]
    files.sort(key=lambda one: one["file"] != "config.json")
    assert json.loads(shown) == {"path": str(format_1), "ok": True, "files": files}


@pytest.mark.parametrize("name", FILES)
def test_verify_notices_a_changed_file(ratioctl: Run, format_1: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(format_1, tmp_path / "copy")) / name
    data = path.read_bytes()
    if name == "config.json":
        path.write_bytes(data.replace(b'"temperature": 0.2', b'"temperature": 0.3'))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, shown = ratioctl("verify", path.parent, "--json")
    assert code == 5
    assert {one["file"]: one["ok"] for one in json.loads(shown)["files"]} == {
        one: one != name for one in FILES
    }


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_other_formats_are_refused(ratioctl: Run, format_1: Path, tmp_path: Path, version: object) -> None:
    copy = Path(shutil.copytree(format_1, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["ratio"]["format"] = version
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ratioctl("inspect", copy)[0] == 5


def test_inspect(ratioctl: Run, format_1: Path) -> None:
    code, shown = ratioctl("inspect", format_1, "--json")
    assert code == 0
    document = json.loads(shown)
    config = json.loads((format_1 / "config.json").read_text(encoding="utf-8"))
    about = {"path": str(format_1), "kind": "package", "digest": EXPECTED["digest"], "weights": "fp32"}
    assert document == {**config, "name": "format-1", **about, "calibrated": True}
    assert config["ratio"]["temperature"] == EXPECTED["temperature"]
    assert config["ratio"]["thresholds"] == EXPECTED["thresholds"]


def test_inspect_of_its_export(ratioctl: Run, format_1: Path) -> None:
    """The config in the file's metadata is the package's, less `files`."""
    path = format_1 / "model.onnx"
    code, shown = ratioctl("inspect", path, "--json")
    assert code == 0
    document = json.loads(shown)
    config = json.loads((format_1 / "config.json").read_text(encoding="utf-8"))
    del config["ratio"]["files"]
    assert document["is_ood"] == f"confidence below {EXPECTED['thresholds']['tpr95']:.4g}"
    for key in ("name", "path", "kind", "input", "is_ood", "calibrated", "weights"):
        document.pop(key)
    assert document == config


def test_inspect_for_people(ratioctl: Run, format_1: Path) -> None:
    code, shown = ratioctl("inspect", format_1)
    assert code == 0
    assert EXPECTED["digest"] in shown
    assert "resnet18 (width 2)" in shown


def test_the_digest_is_worked_out_as_the_format_says(format_1: Path) -> None:
    """The SHA-256 of the JSON of what decides the answers."""
    config = json.loads((format_1 / "config.json").read_text(encoding="utf-8"))
    pixels, ratio = config["pretrained_cfg"], config["ratio"]
    decisive = {
        **{key: config[key] for key in ("architecture", "architecture_options", "label_names")},
        **{key: pixels[key] for key in ("input_size", "mean", "std", "interpolation")},
        **{key: ratio[key] for key in ("temperature", "thresholds")},
        "weights": hashlib.sha256((format_1 / "model.safetensors").read_bytes()).hexdigest(),
    }
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == EXPECTED["digest"] == ratio["digest"]


def test_scores_of_the_package(
    scored: Callable[[Path], list[tuple[str, float, bool]]], format_1: Path
) -> None:
    check(scored(format_1))


def test_scores_of_its_export(
    scored: Callable[[Path], list[tuple[str, float, bool]]], format_1: Path
) -> None:
    check(scored(format_1 / "model.onnx"))


def test_scores_of_its_export_without_ratioctl(format_1: Path, digits: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(format_1 / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "label", "confidence", "ood_score", "is_ood"]
    x = (pixels(digits)[:, None] / 255).astype(np.float32)
    found = dict(zip(names, session.run(None, {"image": x}), strict=True))
    labels = [str(k) for k in found["label"]]  # the classes are called by their numbers
    check(list(zip(labels, found["confidence"].tolist(), found["is_ood"].tolist(), strict=True)))
    assert found["ood_score"] == pytest.approx(1 - found["confidence"], abs=1e-6)
    assert found["probabilities"].sum(1) == pytest.approx(np.ones(len(x)), abs=1e-6)


def test_scores_by_torch(format_1: Path, digits: Path) -> None:
    import torch

    import ratioctl

    model = ratioctl.load_model(format_1)
    assert not model.training
    assert model.config == json.loads((format_1 / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels(digits)[:, None].astype(np.float32) / 255))
    confidence, label = torch.softmax(logits / EXPECTED["temperature"], 1).max(1)
    is_ood = confidence < EXPECTED["thresholds"]["tpr95"]
    labels = [str(k) for k in label.tolist()]
    check(list(zip(labels, confidence.tolist(), is_ood.tolist(), strict=True)))


def test_scores_in_python(format_1: Path, digits: Path) -> None:
    import ratioctl

    rows = list(ratioctl.ood_score(digits, model=format_1))
    check([(row.label, row.confidence, row.is_ood) for row in rows])
    assert {row.error for row in rows} == {None}


def test_calibrating_into_another_folder(
    ratioctl: Run, scored: Callable[[Path], list[tuple[str, float, bool]]], format_1: Path, tmp_path: Path
) -> None:
    """On the split that its recipe held out, so the answers are the recorded ones."""
    out = tmp_path / "calibrated"
    code, shown = ratioctl("calibrate", format_1, "--out", out, "--device", "cpu", "--json")
    assert code == 0
    document: dict[str, Any] = json.loads(shown)
    assert document["calibration"]["n"] == 216
    assert document["temperature"] == pytest.approx(EXPECTED["temperature"], rel=1e-9)
    assert document["thresholds"] == pytest.approx(EXPECTED["thresholds"], rel=0, abs=ROAD_TOLERANCE)
    assert ratioctl("verify", out)[0] == 0
    written, kept = sums(out), EXPECTED["sha256"]
    for name in ("model.safetensors", "recipe.toml"):
        assert written[name] == kept[name]
    check(scored(out))
