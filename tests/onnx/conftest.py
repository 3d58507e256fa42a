"""A small package that can be exported, and exports of it that are traced once."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ratioctl import metrics, package
from ratioctl.models import build
from ratioctl.models.predict import predictor
from ratioctl.onnx import export, parity

LABELS = ["cat", "dog", "frog"]


def write(folder: Path) -> package.ModelPackage:
    """A package of a narrow network whose confidences lie on both sides of its threshold."""
    torch.manual_seed(0)
    network = build("resnet18", num_classes=3, width=2, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as if it had seen something
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator,union-attr]
            module.running_var.uniform_(0.05, 0.3)  # type: ignore[operator,union-attr]
    state = {name: value.numpy() for name, value in network.network.state_dict().items()}
    config = {
        "architecture": "resnet18",
        "architecture_options": {"width": 2},
        "label_names": LABELS,
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
        "ratio": {"name": "tiny pets", "temperature": 0.4, "thresholds": {"tpr95": 0.5}},
    }
    weights = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    plain = package.write(folder, config=config, weights=weights)
    confidences = metrics.confidence(predictor(plain).predict(parity.sample_images(plain)), 0.4)
    thresholds = {
        "tpr95": float(np.quantile(confidences, 0.4)),
        "tpr99": float(np.quantile(confidences, 0.1)),
    }
    return package.update(plain, config_changes={"ratio": {"thresholds": thresholds}})


@pytest.fixture(scope="session")
def traced() -> Callable[..., bytes]:
    """`export.graph`, each kind of file made once: tracing a network takes seconds."""
    original = export.graph

    @functools.cache
    def graph(digest: str, folder: Path, *options: Any) -> bytes:
        names = ("threshold", "input_type", "opset", "weights", "threshold_input")
        return original(package.read(folder), **dict(zip(names, options, strict=True)))

    return lambda pkg, **options: graph(pkg.digest, pkg.path, *options.values())


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> package.ModelPackage:
    return write(tmp_path_factory.mktemp("export") / "pets")


@pytest.fixture
def pets(
    once: package.ModelPackage,
    traced: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> package.ModelPackage:
    """A copy to write to; exporting it traces the network only where nothing like it was traced before."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        export,
        "graph",
        lambda pkg, *, threshold, input_type="float", opset=export.OPSET, **more: traced(
            dataclasses.replace(once, config=pkg.config),
            threshold=threshold,
            input_type=input_type,
            opset=opset,
            weights=more.get("weights", "fp32"),
            threshold_input=more.get("threshold_input", False),
        ),
    )
    monkeypatch.setattr(export, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    shutil.copytree(once.path, tmp_path / "pets")
    return package.read(tmp_path / "pets")
