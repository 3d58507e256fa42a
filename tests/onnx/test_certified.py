"""Exports of packages with a certified head: the guarantee as an output and in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.errors import UsageError
from ratioctl.models import from_package
from ratioctl.models.predict import predictor
from ratioctl.onnx import export, layouts, runtime
from ratioctl.onnx.graph import graph
from ratioctl.package import ModelPackage


@pytest.fixture
def package(certified_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelPackage:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(export, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    monkeypatch.chdir(tmp_path)
    return packages.read(certified_package)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_the_guarantee_is_an_output_and_stated_in_the_metadata(
    package: ModelPackage, tmp_path: Path, weights: packages.Stored
) -> None:
    done = export.export(package, output=tmp_path / "head.onnx", weights=weights, input_type="uint8")
    model = onnx.load(done.path)
    assert [output.name for output in model.graph.output] == [*runtime.OUTPUTS, "guaranteed_confidence"]
    stated = json.loads(next(e.value for e in model.metadata_props if e.key == "ratioctl"))["ratio"]
    assert stated["certified"] == package.config["ratio"]["certified"]
    loaded = runtime.load(done.path)
    assert loaded.spec.certified == 0.02
    network = predictor(from_package(package, weights_as=weights))
    x = torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255
    expected = 1 / (1 + np.exp(-network.guaranteed_log_odds(x, 0.02, package.temperature)))
    found = loaded.guaranteed(pixels())
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)
    corners = np.clip(x.numpy() + 0.02 * np.sign(np.random.default_rng(1).normal(size=x.shape)), 0, 1)
    reached = metrics.confidence(network.predict(corners.astype(np.float32)), package.temperature)
    assert (reached <= found).all()
    assert (loaded.run(pixels(), ("confidence",))["confidence"] <= found).all()


def test_other_files_guarantee_nothing(small_graph: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(small_graph)
    with pytest.raises(UsageError, match="has no certified head"):
        runtime.load(path).guaranteed(pixels())


def test_quantization_is_refused_and_servers_know_the_output(package: ModelPackage) -> None:
    with pytest.raises(UsageError, match="--int8: would break what the certified head"):
        export.export(package, int8=True, data="noise:uniform")
    assert '{ name: "guaranteed_confidence" data_type: TYPE_FP32 dims: [ 1 ]' in layouts.triton_config(
        "a", package, "float"
    )


def test_counterfactuals_are_searched_through_the_head(package: ModelPackage, tmp_path: Path) -> None:
    """The export checks the gradient of the graph, head included, against torch's."""
    done = export.export(package, output=tmp_path / "explain.onnx", explain=True)
    assert done.parity is not None
    assert done.parity.difference < 1e-4
    plain = graph(package, threshold=0.4, guarantee=False)
    assert [output.name for output in onnx.load_from_string(plain).graph.output] == list(runtime.OUTPUTS)
