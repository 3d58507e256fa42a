"""A score other than the maximum softmax probability through calibrate, ood-score, export and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import ratioctl
from ratioctl import package as packages
from ratioctl import scores
from ratioctl.cli import main
from ratioctl.errors import UncalibratedError
from ratioctl.images import decode, walk

SCORES = [name for name in scores.names() if name != scores.DEFAULT]


def _calibrated(score: str, model: Path, data: Path, out: Path) -> packages.ModelPackage:
    assert main(["calibrate", str(model), "--data", str(data), "--score", score, "--out", str(out)]) == 0
    return packages.read(out)


def test_a_package_without_thresholds_of_the_score_names_the_command(
    small_package: Path, photographs: Path
) -> None:
    with pytest.raises(UncalibratedError, match=r"calibrate.* with score energy"):
        ratioctl.ood_score([photographs], model=small_package, score="energy")


@pytest.mark.parametrize("score", SCORES)
def test_rows_flags_and_graph_follow_the_score(
    score: str,
    small_package: Path,
    cats_and_dogs: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ratioctl.onnx.export.latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    package = _calibrated(score, small_package, cats_and_dogs, tmp_path / "calibrated")
    assert package.score == score
    threshold = package.thresholds_of(score)["tpr95"]
    assert package.digest != packages.read(small_package).digest

    rows = list(ratioctl.ood_score([cats_and_dogs, photographs], model=package))
    items = list(walk([cats_and_dogs, photographs]))
    pixels = np.stack(
        [decode(item.read(), package.input_size[1], 3, name=item.path).pixels for item in items]
    )
    network = ratioctl.load_model(package.path)
    import torch

    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).numpy()
    expected = scores.by_name(score).from_logits(logits, package.temperature)
    np.testing.assert_allclose([row.ood_score for row in rows], expected, atol=1e-4)
    assert [row.is_ood for row in rows] == [row.ood_score > threshold + 1e-12 for row in rows]
    kept = [row for row in rows if row.path.startswith(str(cats_and_dogs))]
    assert np.mean([not row.is_ood for row in kept]) >= 0.95

    exported = ratioctl.export(package, output=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    image = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    *_, graph_score, graph_flag = session.run(None, {"image": image})
    np.testing.assert_allclose(graph_score, expected, atol=1e-4)
    clear = np.abs(expected - threshold) > 1e-4
    np.testing.assert_array_equal(graph_flag[clear], expected[clear] > threshold)
    from_file = list(ratioctl.ood_score([cats_and_dogs, photographs], model=tmp_path / "model.onnx"))
    assert [row.is_ood for row, far in zip(from_file, clear, strict=True) if far] == [
        row.is_ood for row, far in zip(rows, clear, strict=True) if far
    ]


def test_plain_calibration_returns_to_the_digest_of_an_msp_package(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path
) -> None:
    plain = _calibrated("msp", small_package, cats_and_dogs, tmp_path / "plain")
    energy = _calibrated("energy", small_package, cats_and_dogs, tmp_path / "energy")
    back = _calibrated("msp", energy.path, cats_and_dogs, tmp_path / "back")
    assert energy.thresholds == plain.thresholds
    assert energy.digest != plain.digest
    assert (back.score, back.score_thresholds, back.digest) == ("msp", {}, plain.digest)
    assert _calibrated("energy", energy.path, cats_and_dogs, tmp_path / "again").digest == energy.digest


def test_the_worst_case_of_a_score_is_at_least_as_accepted_as_the_image(
    small_package: Path, cats_and_dogs: Path, photographs: Path, tmp_path: Path
) -> None:
    package = _calibrated("energy", small_package, cats_and_dogs, tmp_path / "energy")
    rows = list(ratioctl.ood_score([photographs], model=package, worst_case=1.0, device="cpu"))
    assert rows
    assert all(row.is_ood or not row.worst_case_is_ood for row in rows)
    assert all(row.worst_case_confidence >= row.confidence for row in rows)


def test_evaluate_measures_further_scores_clean_and_attacked(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(small_package), "--data", str(cats_and_dogs), "--ood", "u=noise:uniform"]
    arguments += [
        "--limit",
        "12",
        "--score",
        "energy",
        "--score",
        "max_logit",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--json", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["models"][0]["measurements"]
    for score in ("energy", "max_logit"):
        clean, worst = (
            next(
                row["value"]
                for row in rows
                if row["name"] == f"auroc_{score}"
                and row["dataset"] == "u"
                and (row["ball"] is not None) is on
            )
            for on in (False, True)
        )
        assert 0 <= worst <= clean <= 1
    assert main([*arguments, "--device", "cpu", "--resume"]) == 0
    table = capsys.readouterr().out
    assert "OOD scores" in table
    assert "max_logit" in table
    assert main([*arguments, "--suite", "explanations"]) == 2
