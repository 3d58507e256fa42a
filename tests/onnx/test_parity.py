"""`ratioctl parity` and its certificate, thresholds inside graphs, and flags of a saturated model."""

# ruff: noqa: F811 - fixtures of test_export

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import ratioctl
from ratioctl import package, scores
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.onnx import certificate, compare, export, parity, runtime
from tests.onnx.test_export import once, pets, saved, traced  # noqa: F401

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


@pytest.fixture
def data(pets: package.ModelPackage, tmp_path: Path) -> str:
    return str(saved(tmp_path / "data", parity.sample_images(pets)[::16], None))


@pytest.fixture
def file(pets: package.ModelPackage, tmp_path: Path) -> Path:
    return export.export(pets, output=tmp_path / "m.onnx").path


def test_a_certificate_counts_every_image(
    pets: package.ModelPackage,
    file: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "parity.json"
    line = ["parity", str(pets.path), str(file), "--data", data, "--no-timing"]
    assert main([*line, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == document
    assert [part["n"] for part in document["sets"]] == [16, 256, 8, 64, 16]
    backends = {row["backend"] for row in document["results"]}
    assert backends >= {"onnxruntime CPU"} | ({"OpenVINO CPU"} if HAS_OPENVINO else set())
    for row in document["results"]:
        assert row["ok"]
        assert row["logits_difference"] < 1e-4
        assert row["unexplained_labels"] == row["unexplained_flags"] == 0
    (about,) = document["files"]
    assert (about["opset"], about["ir_version"], about["same_package"]) == (18, 8, True)
    assert about["threshold"] == pets.thresholds["tpr95"]
    assert document["environment"]["versions"]["onnxruntime"] == onnxruntime.__version__
    assert main(["verify", str(pets.path), "--parity", str(out)]) == 0
    assert (
        main(["parity", str(pets.path), str(file), "--data", data, "--no-timing", "--tolerance", "1e-12"])
        == 4
    )
    assert "FAILED" in capsys.readouterr().out


def test_verify_notices_what_changed(
    pets: package.ModelPackage,
    file: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = compare.certify(pets, [file], data=data, limit=3, timing=False)
    assert document["sets"][0]["n"] == 3

    def verdict(changed: dict[str, Any], says: str) -> None:
        (tmp_path / "c.json").write_text(json.dumps(changed))
        assert main(["verify", str(pets.path), "--parity", str(tmp_path / "c.json")]) == 5
        assert says in capsys.readouterr().err

    rest = {key: value for key, value in document.items() if key != "sha256"}
    verdict({**document, "ok": False}, "was changed after it was written")
    verdict(certificate.sealed({**rest, "ok": False}), "exceeded the tolerance")
    verdict(certificate.sealed({**rest, "model": {"digest": "other"}}), "about another package")
    verdict(certificate.sealed({"schema": certificate.SCHEMA}), "lacks a part")
    verdict({"schema": "other"}, "is no certificate")
    file.write_bytes(file.read_bytes() + b"\0")
    verdict(document, "is another file than the certified one")
    file.unlink()
    verdict(document, "not found")
    (tmp_path / "c.json").write_text("[")
    assert main(["verify", str(pets.path), "--parity", str(tmp_path / "c.json")]) == 5


def test_a_stale_file_is_found(
    pets: package.ModelPackage,
    file: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The package has another temperature since: the flags inside the file follow from the old one."""
    package.update(pets, config_changes={"ratio": {"temperature": 0.04}})
    assert main(["parity", str(pets.path), str(file), "--data", data, "--no-timing", "--json"]) == 4
    captured = capsys.readouterr()
    assert "was exported from another version" in captured.err
    rows = json.loads(captured.out)["results"]
    assert sum(row["unexplained_flags"] for row in rows) > 0
    assert max(row["probability_difference"] for row in rows) > 0.1


def test_other_models_and_files_are_refused(
    pets: package.ModelPackage,
    tiny_onnx: Path,
    file: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PackageError, match="has other classes or another input than tiny pets"):
        compare.certify(pets, [tiny_onnx], data=data, timing=False)
    old = onnx.load(file)
    del old.metadata_props[1:]
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(PackageError, match="does not record the threshold"):
        compare.certify(pets, [tmp_path / "old.onnx"], data=data, timing=False)
    (tmp_path / "mine.json").write_text("{}")
    line = ["parity", str(pets.path), str(tiny_onnx), "--data", data, "--out", str(tmp_path / "mine.json")]
    assert main(line) == 2
    assert "is no certificate" in capsys.readouterr().err


def test_speed_has_every_runtime(
    pets: package.ModelPackage,
    file: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 4.0})
    monkeypatch.setattr("ratioctl.utils.resources.processors", lambda: 2)
    rows = compare.certify(pets, [file], data=data, limit=2)["timing"]
    found = {(row["backend"], row["threads"], row["batch"]): row["images_per_second"] for row in rows}
    names = ["torch", "onnxruntime CPU", *(["OpenVINO CPU"] if HAS_OPENVINO else [])]
    assert set(found) == {(name, threads, batch) for name in names for threads in (1, 2) for batch in (1, 32)}
    assert found["torch", 1, 32] == 8000


# --- thresholds in the graph -------------------------------------------------------------------------------


def test_the_threshold_is_an_optional_input(pets: package.ModelPackage, tmp_path: Path) -> None:
    done = export.export(pets, output=tmp_path / "open.onnx", threshold_input=True)
    model = onnx.load(done.path)
    assert [value.name for value in model.graph.input] == ["image", "threshold"]
    assert model.ir_version == 8
    images = parity.sample_images(pets)
    loaded = runtime.load(done.path)
    logits = predictor(pets).predict(images)
    kind = pets.ood_score
    plain = loaded.run(images)["is_ood"]
    assert np.array_equal(plain, kind.is_ood(loaded.predict(images), 0.4, pets.thresholds["tpr95"]))
    for value in (0.0, 0.34, pets.thresholds["tpr99"], 0.999999999999, 1.0):
        given = {"image": loaded.prepare(images), "threshold": np.array([value])}
        (flags,) = loaded.session.run(["is_ood"], given)
        assert np.array_equal(flags, kind.is_ood(loaded.predict(images), 0.4, value)), value
    assert len(logits) == len(plain)
    for options in ({"layout": "triton"}, {"int8": True}):
        with pytest.raises(UsageError, match="--threshold-input: cannot be combined"):
            export.export(pets, output=tmp_path / "x", threshold_input=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold_input", [False, True])
def test_thresholds_per_class_in_the_graph(
    once: package.ModelPackage,
    tmp_path: Path,
    threshold_input: bool,
) -> None:
    limit = scores.Threshold(0.5, (0.35, 0.8, 0.999))
    data = export.graph(once, threshold=limit, threshold_input=threshold_input)
    (tmp_path / "m.onnx").write_bytes(data)
    loaded = runtime.load(tmp_path / "m.onnx")
    assert loaded.threshold == 0.5
    assert loaded.threshold.classes == limit.classes  # type: ignore[union-attr]
    images = parity.sample_images(once)
    found = parity.agreement(images, predictor(once).predict, loaded, once, loaded.threshold or 0)
    assert (found.n, found.labels, found.flags) == (256, 0, 0)
    flags = loaded.run(images)["is_ood"]
    assert not np.array_equal(flags, once.ood_score.is_ood(loaded.predict(images), 0.4, 0.5))


def test_a_saturated_models_flags_are_the_graphs(pets: package.ModelPackage, tmp_path: Path) -> None:
    """Confidences that round to 1 in float32, thresholds between them; every image is counted."""
    sharp = package.update(pets, config_changes={"ratio": {"temperature": 0.004}})
    images = parity.sample_images(sharp)
    logits = predictor(sharp).predict(images)
    kind = sharp.ood_score
    confidence = kind.threshold_of(logits, sharp.temperature)
    assert (confidence.astype(np.float32) == 1).mean() > 0.5
    middle = float(np.sort(confidence[confidence < 1])[-len(confidence[confidence < 1]) // 4])
    assert np.float32(middle) == 1
    package.update(sharp, config_changes={"ratio": {"thresholds": {"tpr95": middle}}})
    again = package.read(sharp.path)
    data = export_graph(again, middle)
    (tmp_path / "sharp.onnx").write_bytes(data)
    loaded = runtime.load(tmp_path / "sharp.onnx")
    found = parity.agreement(images, lambda pixels: logits, loaded, again, middle)
    assert (found.n, found.labels, found.flags) == (len(images), 0, 0)
    own = loaded.run(images)["is_ood"]
    rows = [row.is_ood for row in ratioctl.ood_score(images, model=tmp_path / "sharp.onnx")]
    assert own.tolist() == rows
    assert 0 < own.sum() < len(own)


def export_graph(pkg: package.ModelPackage, threshold: float) -> bytes:
    from ratioctl.onnx.graph import graph

    return graph(dataclasses.replace(pkg), threshold=threshold)
