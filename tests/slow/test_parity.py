"""Flags of many images with `ood-score`, torch and the exported graph, also of a saturated model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ratioctl
from ratioctl import package
from ratioctl.data import out_distribution
from ratioctl.models.predict import predictor
from ratioctl.onnx import compare, export, runtime
from ratioctl.onnx.parity import agreement

pytestmark = pytest.mark.slow

IMAGES = 2000


@pytest.mark.parametrize("temperature", [None, 0.01], ids=["default", "saturated"])
def test_no_flag_differs(tmp_path: Path, temperature: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `IMAGES` crops of photographs and noise."""
    monkeypatch.setattr(export, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    found = package.read(package.find("cifar10-ratio-small"))
    images = out_distribution.load(out_distribution.GENERATED, 32, 3, count=IMAGES // 4).pixels
    logits = predictor(found).predict(images)
    changes: dict[str, object] = {} if temperature is None else {"temperature": temperature}
    # In the widest gap near one third of the images: none lies on the threshold.
    odds = np.sort(found.ood_score.acceptance(logits, temperature or found.temperature))[: IMAGES // 2]
    k = IMAGES // 3 + int(np.argmax(np.diff(odds)[IMAGES // 3 : IMAGES // 3 + 50]))
    limit = float(1 / (1 + np.exp(-(odds[k] + odds[k + 1]) / 2)))
    changes["thresholds"] = {"tpr95": limit}
    config = package.portable_config(found)
    model = package.write(
        tmp_path / "model",
        config={**config, "ratio": {**config["ratio"], **changes}},
        weights=found.weights_path.read_bytes(),
    )
    file = export.export(model, output=tmp_path / "m.onnx").path
    loaded = runtime.load(file)
    same = agreement(images, lambda pixels: logits, loaded, model, limit)
    assert (same.n, same.changed_labels, same.changed_flags) == (IMAGES, 0, 0)
    flags = found.ood_score.is_ood(logits, model.temperature, limit)
    assert flags.sum() == k + 1
    for source in (file, model):
        rows = ratioctl.ood_score(images[:1000], model=source)
        assert [row.is_ood for row in rows] == flags[:1000].tolist()


def test_a_certificate_of_a_bundled_model(tmp_path: Path) -> None:
    model = package.read(package.find("cifar10-ratio-small"))
    file = export.export(model, output=tmp_path / "m.onnx", threshold=0.5).path
    document = compare.certify(model, [file], data="photos:flower", limit=100)
    assert document["ok"], document["results"]
    assert {(row["threads"], row["batch"]) for row in document["timing"]} >= {(1, 1), (1, 32)}
