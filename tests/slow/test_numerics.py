"""The backends of the bundled model against each other: torch in fp32, torch in bf16, onnxruntime.

Beyond the stated margins no decision differs. The images are the samples, their mirror images, noise, and
flat ones. A decision's margin: how far the two highest probabilities, or confidence and threshold, are apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ratioctl
from ratioctl import images as decoding
from ratioctl import metrics, package
from ratioctl.models.device import select_device
from ratioctl.onnx import runtime
from ratioctl.onnx.graph import graph
from ratioctl.utils import resources

pytestmark = pytest.mark.slow

FP32_MARGIN = 1e-5  # in probability: onnxruntime against torch
BF16_MARGIN = 0.1  # the same: bf16 autocast against fp32


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8 (N, 32, 32, 3)."""
    files = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    found = [decoding.decode(path, 32).pixels for path in files]
    noise = np.random.default_rng(2).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    board = np.where(np.indices((32, 32)).sum(0) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    extremes = [np.zeros_like(board), np.full_like(board, 255), board]
    return np.stack([*found, *(picture[:, ::-1] for picture in found), *noise, *extremes])


@pytest.fixture(scope="module")
def model() -> package.ModelPackage:
    return package.read(package.find())


def compared(p: np.ndarray, q: np.ndarray, threshold: float, margin: float) -> tuple[float, int, int]:
    """(largest difference, decisions beyond the margin that differ, decisions within it) of (N, K) each."""
    top = np.sort(p, axis=1)
    clear = top[:, -1] - top[:, -2] > 2 * margin
    decided = np.abs(p.max(1) - threshold) > margin
    differ = ((p.argmax(1) != q.argmax(1)) & clear) | (
        ((p.max(1) < threshold) != (q.max(1) < threshold)) & decided
    )
    return float(np.abs(p - q).max()), int(differ.sum()), int((~clear).sum() + (~decided).sum())


def test_no_backend_decides_otherwise_beyond_its_margin(
    pictures: np.ndarray, model: package.ModelPackage, tmp_path: Path
) -> None:
    network = ratioctl.load_model(str(model.path))
    x = torch.from_numpy(decoding.to_pixels(pictures))
    threshold = package.threshold(model)
    with torch.inference_mode():
        logits = network(x)
        ones = torch.cat([network(x[k : k + 1]) for k in range(len(x))])
        with torch.autocast("cpu", torch.bfloat16):
            halves = network(x).float()
    (tmp_path / "m.onnx").write_bytes(graph(model, threshold=threshold))
    exported = runtime.load(tmp_path / "m.onnx", threads=1)
    backends = {
        "onnxruntime": (exported.predict(pictures), FP32_MARGIN),
        "batches of one": (ones.numpy(), FP32_MARGIN),
        "bf16": (halves.numpy(), BF16_MARGIN),
    }
    reference = metrics.softmax(logits.numpy(), model.temperature)
    for name, (found, margin) in backends.items():
        p = metrics.softmax(found, model.temperature)
        difference, differ, close = compared(reference, p, threshold, margin)
        assert difference <= margin, f"{name}: {difference}"
        assert differ == 0, name
        assert close < len(pictures) or margin > 0.01, f"{name}: the margin decides nothing"
    assert select_device("cpu", "auto").device.type == "cpu"
    # The graph's own outputs follow from its logits, and what is no image is out of distribution.
    outputs = exported.run(decoding.to_pixels(pictures))
    assert np.abs(outputs["probabilities"] - reference).max() <= FP32_MARGIN
    spoiled = decoding.to_pixels(pictures[:2])
    spoiled[1, 0, 5, 5] = np.nan
    flags = exported.run(spoiled)
    assert np.isnan(flags["confidence"][1])
    assert flags["is_ood"][1]
    assert flags["is_ood"][0] == outputs["is_ood"][0]
    assert abs(flags["confidence"][0] - outputs["confidence"][0]) < 1e-6


def test_a_folder_gives_the_same_rows_twice(model: package.ModelPackage, tmp_path: Path) -> None:
    samples = resources.folder("assets") / "samples"
    first, second = (list(ratioctl.ood_score(samples, model=model, probabilities=True)) for _ in range(2))
    assert len(first) == 13
    assert all(row.error is None for row in first)
    assert [(row.path, row.label, row.is_ood) for row in first] == [
        (row.path, row.label, row.is_ood) for row in second
    ]
    once, again = (np.array([row.probabilities for row in rows]) for rows in (first, second))
    assert np.abs(once - again).max() < 1e-6
