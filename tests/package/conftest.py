"""A small package of two classes, without waiting for the disk."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import package

CONFIG: dict[str, Any] = {
    "architecture": "resnet18",
    "architecture_options": {"width": 16},
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.25],
        "interpolation": "bicubic",
    },
    "ratio": {
        "temperature": 0.5,
        "thresholds": {"tpr95": 0.4, "tpr99": 0.3},
        "ladders": {"2": [1, 0.5]},
        "provenance": {"seed": 7},
    },
}
TENSORS = {
    "conv.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bn.num_batches_tracked": np.array(12),
}


@pytest.fixture
def package_config() -> dict[str, Any]:
    return copy.deepcopy(CONFIG)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return dict(TENSORS)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def pkg(tmp_path: Path) -> package.ModelPackage:
    return package.write(
        tmp_path / "cat-dog", config=CONFIG, weights=TENSORS, recipe_text="name = 'x'\n", onnx=b"graph"
    )
