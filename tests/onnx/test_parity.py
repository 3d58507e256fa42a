"""`ratioctl parity` and its certificate, and thresholds as an input of the graph."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ratioctl import package, scores
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.onnx import certificate, compare, export, parity, runtime
from ratioctl.onnx.graph import Flagging
from tests.onnx.test_export import saved

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
    verdict({"schema": "other"}, "is not a certificate")
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
    assert "is not a certificate" in capsys.readouterr().err


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


def test_thresholds_per_class_are_the_default_of_an_optional_input(
    once: package.ModelPackage, tmp_path: Path
) -> None:
    limit = scores.Threshold(0.5, (0.35, 0.8, 0.999))
    (tmp_path / "m.onnx").write_bytes(export.graph(once, threshold=limit, threshold_input=True))
    model = onnx.load(tmp_path / "m.onnx")
    assert [value.name for value in model.graph.input] == ["image", "threshold"]
    assert model.ir_version == 8
    loaded = runtime.load(tmp_path / "m.onnx")
    assert loaded.threshold == limit != 0.5
    images = parity.sample_images(once)
    found = parity.agreement(images, predictor(once).predict, loaded, once, loaded.threshold)
    assert (found.n, found.labels, found.flags) == (256, 0, 0)
    logits, kind = loaded.predict(images), once.ood_score
    assert not np.array_equal(loaded.run(images)["is_ood"], kind.is_ood(logits, 0.4, 0.5))
    for values in ((0.0, 0.34, 1.0), (0.4, 0.4, 0.4), (0.999999999999, 0.5, 0.7)):
        given = {"image": loaded.prepare(images), "threshold": np.array(values)}
        (flags,) = loaded.session.run(["is_ood"], given)
        assert np.array_equal(flags, kind.is_ood(logits, 0.4, scores.Threshold(0.5, values)))


@pytest.mark.parametrize("name", scores.names())
def test_a_threshold_that_clients_give_means_what_a_stored_one_does(name: str) -> None:
    """In torch, whose operators the graph holds: for every score, and for numbers next to a threshold."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(200, 3)).astype(np.float32) * 8)
    kind = scores.by_name(name)
    limits = kind.threshold_of(logits.numpy().astype(np.float64), 0.4)[:6].tolist()
    for limit in [*limits, *([0.0, 1.0] if name == "msp" else [])]:
        module = Flagging(torch.nn.Identity(), 0.4, limits[-1], "float", kind)
        flags = module(logits, torch.tensor([limit], dtype=torch.float64))[-1]
        assert np.array_equal(flags.numpy(), kind.is_ood(logits.double().numpy(), 0.4, limit))


def test_the_option_is_refused_where_it_has_no_effect(pets: package.ModelPackage, tmp_path: Path) -> None:
    for options in ({"layout": "triton"}, {"int8": True}):
        with pytest.raises(UsageError, match="--threshold-input: cannot be combined"):
            export.export(pets, output=tmp_path / "x", threshold_input=True, **options)
