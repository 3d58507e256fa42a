"""Weights stored in fp16: half the bytes, computed in fp32, equal results of a package and its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file

import ratioctl
from ratioctl import images, metrics, package
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.onnx import explainer, parity, runtime
from ratioctl.onnx import export as exporting


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(5)
    for label in ("cat", "dog", "red panda"):
        (folder / label).mkdir()
        for k in range(8):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                folder / label / f"{k}.png"
            )
    return folder


@pytest.fixture(scope="module")
def halved(
    small_package: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> package.ModelPackage:
    out = tmp_path_factory.mktemp("halved") / "half"
    return ratioctl.calibrate(small_package, data=str(labelled), weights="fp16", out=out).package


def test_a_package_with_fp16_weights(
    halved: package.ModelPackage, small_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = package.read(small_package)
    before, stored = package.read_weights(whole), load_file(halved.weights_path)
    assert {value.dtype.name for value in stored.values()} == {"float16", "float32"}
    for name, value in before.items():
        assert stored[name].dtype == (np.float16 if value.ndim > 1 else np.float32)
        assert np.abs(stored[name] - value).max() <= 2**-11 * np.abs(value).max()
    assert halved.weights_path.stat().st_size < 0.6 * whole.weights_path.stat().st_size
    assert halved.digest != whole.digest
    assert halved.calibrated
    network = ratioctl.load_model(halved.path)
    assert {value.dtype.itemsize for value in network.parameters()} == {4}
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert np.array_equal(value.numpy(), stored[name.removeprefix("network.")].astype(np.float32))
    for model, said in ((halved.path, "fp16, computed in fp32"), (whole.path, "fp32")):
        assert main(["inspect", str(model)]) == 0
        assert said in capsys.readouterr().out
    assert main(["inspect", str(halved.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "fp16"


def test_its_export_holds_fp16_weights_and_agrees(
    halved: package.ModelPackage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporting, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    folder = Path(shutil.copytree(halved.path, tmp_path / "half"))
    done = ratioctl.export(folder)  # as the package stores them, and so into the package
    assert (done.weights, done.path.parent) == ("fp16", folder)
    assert done.parity is not None
    assert (done.parity.labels, done.parity.flags) == (0, 0)
    assert done.parity.difference < 1e-4
    graph = onnx.load(done.path).graph
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += int(np.prod(tensor.dims))
    kernels = sum(value.size for value in package.read_weights(halved).values() if value.ndim > 1)
    assert sizes[onnx.TensorProto.FLOAT16] == kernels
    assert sizes[onnx.TensorProto.FLOAT] < 0.2 * kernels
    loaded = runtime.load(done.path)
    assert loaded.weights == "fp16"
    sample = parity.sample_images(halved)
    assert np.abs(loaded.predict(sample) - predictor(halved).predict(sample)).max() < 1e-4
    assert main(["inspect", str(done.path)]) == 0
    assert "fp16, computed in fp32" in capsys.readouterr().out
    row, *_ = ratioctl.ood_score(np.ascontiguousarray(sample[:1]), model=done.path, threshold=0.5)
    exact = predictor(halved).predict(images.to_pixels(sample[:1])) / halved.temperature
    assert row.confidence == pytest.approx(float((np.exp(exact) / np.exp(exact).sum()).max()), abs=1e-5)


def test_a_file_that_searches_holds_fp16_weights(
    halved: package.ModelPackage, small_explain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half as large, and its pictures are scored as torch scores them with the rounded weights."""
    done = ratioctl.export(halved.path, explain=True, output=tmp_path / "explain.onnx")
    assert done.weights == "fp16"
    assert done.parity is not None
    assert (done.parity.difference < 1e-4, done.parity.labels, done.parity.flags) == (True, 0, 0)
    model = onnx.load(done.path)
    (body,) = (graph for graph in loops(model.graph) if len(graph.initializer) > 10)
    kernels = {tensor.data_type: 0 for tensor in body.initializer}
    for tensor in body.initializer:
        kernels[tensor.data_type] += int(np.prod(tensor.dims)) if len(tensor.dims) > 1 else 0
    assert kernels[onnx.TensorProto.FLOAT16] == sum(
        value.size for value in package.read_weights(halved).values() if value.ndim > 1
    )
    assert kernels[onnx.TensorProto.FLOAT] < 0.2 * kernels[onnx.TensorProto.FLOAT16]
    smaller = done.path.stat().st_size - small_explain.stat().st_size
    assert smaller < -1.5 * kernels[onnx.TensorProto.FLOAT16]
    loaded = explainer.load(done.path)
    sample = parity.sample_images(halved)[:3]
    found = loaded.search(sample, [0, 1, 2], [0.5] * 3, 5)
    expected = metrics.softmax(predictor(halved).predict(found["counterfactual"]), halved.temperature)
    assert np.abs(found["probabilities"] - expected).max() < 1e-4
    assert main(["inspect", str(done.path)]) == 0
    assert "fp16, computed in fp32" in capsys.readouterr().out


def loops(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a graph, at any depth."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from loops(attribute.g)


def test_what_fp16_cannot_do_is_refused(small_package: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another model"):
        ratioctl.calibrate(small_package, data=str(labelled), weights="fp16")
    with pytest.raises(UsageError, match="cannot be combined with int8"):
        ratioctl.export(small_package, weights="fp16", int8=True, output=tmp_path / "m.onnx")
    weights = {**package.read_weights(package.read(small_package))}
    weights["linear.weight"] = np.full_like(weights["linear.weight"], 1e5)
    with pytest.raises(PackageError, match="that fp16 lacks"):
        package.to_half(weights, "here")
