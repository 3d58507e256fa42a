"""Export: the graph's contract, agreement with torch, what is written where, and servers' layouts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import ratioctl
import ratioctl.utils.resources
from ratioctl import images, metrics, package
from ratioctl.errors import OutputError, RatioctlError, SourceError, UncalibratedError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.onnx import export, layouts, parity, quantize, runtime
from tests.onnx.conftest import LABELS

OUTPUTS = ["logits", "probabilities", "label", "confidence", "ood_score", "is_ood"]


def test_the_graph_is_the_contracts(pets: package.ModelPackage, tmp_path: Path) -> None:
    done = export.export(pets, output=tmp_path / "float.onnx")
    model = onnx.load(done.path)
    onnx.checker.check_model(model, full_check=True)

    def shapes(values: Any) -> dict[str, tuple[int, list[Any]]]:
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    kind = onnx.TensorProto
    assert shapes(model.graph.input) == {"image": (kind.FLOAT, ["N", 3, 8, 8])}
    assert list(shapes(model.graph.output)) == OUTPUTS
    assert shapes(model.graph.output) == {
        "logits": (kind.FLOAT, ["N", 3]),
        "probabilities": (kind.FLOAT, ["N", 3]),
        "label": (kind.INT64, ["N"]),
        "confidence": (kind.FLOAT, ["N"]),
        "ood_score": (kind.FLOAT, ["N"]),
        "is_ood": (kind.BOOL, ["N"]),
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    expected = json.loads((pets.path / "config.json").read_text())
    del expected["ratio"]["files"]
    assert metadata == {
        "ratioctl": expected,
        "ratioctl.export": {"threshold": pets.thresholds["tpr95"]},
    }
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert os.path.dirname(export.__file__).encode() not in done.path.read_bytes(), "tells where it was made"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "pets"]
    assert done.files == (done.path,)
    assert done.bytes == done.path.stat().st_size


@pytest.mark.parametrize("input_type", ["float", "uint8"])
def test_outputs_follow_from_torchs_logits(
    pets: package.ModelPackage, tmp_path: Path, input_type: Any
) -> None:
    done = export.export(pets, output=tmp_path / "m.onnx", input_type=input_type)
    assert done.parity is not None
    assert (done.parity.labels, done.parity.flags) == (0, 0)
    assert done.parity.difference < 1e-4
    assert done.parity.n == 256
    loaded = runtime.load(done.path)
    assert loaded.input_type == input_type
    images = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    found = loaded.run(images)
    logits = predictor(pets).predict(images)
    p = metrics.softmax(logits, pets.temperature)
    assert np.abs(found["logits"] - logits).max() < 1e-4
    assert np.abs(found["probabilities"] - p).max() < 1e-5
    assert (found["label"] == logits.argmax(1)).all()
    assert np.abs(found["confidence"] - p.max(1)).max() < 1e-5
    assert np.abs(found["ood_score"] - (1 - p.max(1))).max() < 1e-5
    assert (found["is_ood"] == (p.max(1) < pets.thresholds["tpr95"])).all()
    assert 0 < found["is_ood"].sum() < 37, "both answers occur, or the test proves nothing"


def test_without_a_name_it_goes_into_the_package(pets: package.ModelPackage, tmp_path: Path) -> None:
    done = ratioctl.export(str(pets.path))
    assert done.path == pets.path / "model.onnx"
    assert done.package is not None
    assert done.package.digest == pets.digest
    read = package.read(pets.path)
    assert read.onnx_path == done.path
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    assert np.abs(runtime.load(read).predict(images) - predictor(read).predict(images)).max() < 1e-5


def test_every_backend_gives_the_same_numbers(pets: package.ModelPackage, tmp_path: Path) -> None:
    """Package with torch, package with ONNX, both kinds of ONNX file, Python, counterfactuals.json."""
    samples = ratioctl.utils.resources.folder("assets") / "samples"
    eager = list(ratioctl.ood_score([samples], model=pets, probabilities=True))
    answers = tmp_path / "answers"
    ratioctl.counterfactual([samples], target="cat", eps=0.5, steps=1, model=pets.path, out=answers)
    document = json.loads((answers / "counterfactuals.json").read_text())
    floats = export.export(pets, output=tmp_path / "float.onnx").path
    bytes_ = export.export(pets, output=tmp_path / "uint8.onnx", input_type="uint8").path
    inside = export.export(pets).package
    assert inside is not None
    clear = [abs((row.confidence or 0) - pets.thresholds["tpr95"]) > 1e-6 for row in eager]

    def decided(flags: list[bool | None]) -> list[bool | None]:
        """Those of images whose confidence is not the threshold itself, to within float32's rounding."""
        return list(itertools.compress(flags, clear))

    found = {}
    for model in (floats, bytes_, inside, inside.path):
        rows = list(ratioctl.ood_score([samples], model=model, probabilities=True))
        assert [(r.path, r.label) for r in rows] == [(r.path, r.label) for r in eager]
        assert decided([row.is_ood for row in rows]) == decided([row.is_ood for row in eager])
        found[str(model)] = [row.probabilities for row in rows]
    with torch.no_grad():
        pixels = [images.decode(row.path, 8).pixels for row in eager]
        logits = ratioctl.load_model(pets.path)(torch.from_numpy(images.to_pixels(np.stack(pixels))))
        found["Python"] = torch.softmax(logits / pets.temperature, 1).tolist()
    originals = [(image["path"], image["original"]) for image in document["images"]]
    assert [path for path, _ in originals] == [row.path for row in eager]
    flags = [original["is_ood"] for _, original in originals]
    assert decided(flags) == decided([row.is_ood for row in eager])
    found["counterfactuals.json"] = [original["probabilities"] for _, original in originals]
    for name, probabilities in found.items():
        assert np.abs(np.array(probabilities) - [row.probabilities for row in eager]).max() < 1e-4, name
    saved_pngs = [answers / image["targets"][0]["budgets"][0]["png"] for image in document["images"]]
    shown = [image["targets"][0]["budgets"][0]["probabilities"] for image in document["images"]]
    rows = list(ratioctl.ood_score(saved_pngs, model=bytes_, probabilities=True))
    assert np.abs(np.array([row.probabilities for row in rows]) - shown).max() < 1e-4
    assert {row.is_ood for row in eager} == {True, False}, "both answers occur, or the test proves nothing"
    assert sum(clear) > 10


def test_what_departs_from_the_package_goes_beside_it(
    pets: package.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export.export(pets, threshold="tpr99")
    assert (done.path, done.package) == (Path("tiny-pets.onnx"), None)
    assert done.threshold == pets.thresholds["tpr99"]
    assert export.export(pets, output="model.bin").path == Path("model.bin")
    assert package.read(pets.path).onnx_path is None
    monkeypatch.setattr("ratioctl.utils.resources.folder", lambda name: tmp_path)
    assert export.export(pets, input_type="uint8").path == Path("tiny-pets.onnx"), "bundled"
    assert package.read(pets.path).onnx_path is None


def test_the_threshold_is_the_graphs(pets: package.ModelPackage, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    middle = float(np.median(metrics.confidence(predictor(pets).predict(images), pets.temperature)))
    for asked, limit in (("tpr99", pets.thresholds["tpr99"]), (middle, middle)):
        loaded = runtime.load(export.export(pets, threshold=asked).path)
        assert (loaded.threshold, loaded.spec.thresholds) == (limit, pets.thresholds)
        found = loaded.run(images)
        assert (found["is_ood"] == pets.ood_score.is_ood(found["logits"], pets.temperature, limit)).all()
    assert 0 < found["is_ood"].sum() < 37, "both answers occur, or the test proves nothing"
    with pytest.raises(UsageError):
        export.export(pets, threshold="1.1")
    bare = package.update(pets, config_changes={"ratio": {"thresholds": {}}})
    with pytest.raises(UncalibratedError, match="ratioctl calibrate"):
        export.export(bare)


@pytest.mark.parametrize("temperature", [0.02, 0.005])
def test_flags_are_those_of_ood_score_where_confidences_are_1_in_float32(
    once: package.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """At 0.005 most confidences are 1 even in double precision, and so is the threshold."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(export, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    ascending = np.sort(metrics.confidence(predictor(once).predict(images), temperature))
    sharp = package.write(
        tmp_path / "sharp",
        config={
            **package.portable_config(once),
            "ratio": {"temperature": temperature, "thresholds": {"tpr95": float(ascending[20])}},
        },
        weights=package.read_weights(once),
    )
    done = export.export(sharp, output=tmp_path / "sharp.onnx")
    assert done.parity is not None
    assert (done.parity.n, done.parity.flags, done.parity.labels) == (256, 0, 0)
    found = runtime.load(done.path).run(images)
    assert (found["confidence"] == 1).sum() > 40
    for k in range(64):
        Image.fromarray(images[k]).save(tmp_path / f"{k:02d}.png")
    pictures = sorted(tmp_path.glob("*.png"))
    expected = int((ascending < ascending[20]).sum())
    for model in (done.path, sharp):
        flags = [row.is_ood for row in ratioctl.ood_score(pictures, model=model)]
        assert flags == found["is_ood"].tolist()
        assert sum(flags) == expected
    assert expected == (20 if temperature == 0.02 else 0)
    assert onnx.load(done.path).ir_version == 8


def test_a_graph_that_contradicts_its_own_logits_is_refused(pets: package.ModelPackage) -> None:
    class Wrong:
        def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            logits = predictor(pets).predict(pixels)
            no = np.zeros(len(pixels), bool)
            found = {
                "logits": logits,
                "label": logits.argmax(1),
                "probabilities": metrics.softmax(logits, 0.4),
            }
            return {**dict.fromkeys(OUTPUTS, no), **found}

    images = parity.sample_images(pets)
    reference = predictor(pets).predict
    found = parity.agreement(images, reference, Wrong(), pets, pets.thresholds["tpr95"])  # type: ignore[arg-type]
    assert found.flags > 50
    assert found.labels == 0
    with pytest.raises(RatioctlError, match=f"0 labels and {found.flags} flags differ"):
        parity.check_parity(found, reference(images))


def test_an_image_on_the_threshold_counts_with_the_graphs_own_logits(pets: package.ModelPackage) -> None:
    logits = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]], np.float32)
    off = logits + np.array([[0, 0, 0], [0, 1e-6, 0]], np.float32)
    threshold = float(metrics.confidence(logits, pets.temperature)[1]) * (1 + 1e-8)

    class Graph:
        def __init__(self, label: list[int], flags: list[bool]) -> None:
            self.outputs = {"logits": off, "label": np.array(label), "is_ood": np.array(flags)}
            self.outputs["probabilities"] = metrics.softmax(off, pets.temperature)

        def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            rows = slice(0, 1) if pixels[0].max() == 0 else slice(1, 2)
            return {name: self.outputs.get(name, off[:, 0])[rows] for name in OUTPUTS}

    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 1)])
    for label, flags, expected in (
        ([0, 1], [False, False], (0, 0)),  # what follows from its own logits
        ([0, 0], [False, False], (1, 0)),
        ([0, 1], [False, True], (0, 1)),
        ([0, 1], [True, False], (0, 1)),
    ):
        found = parity.agreement(images, lambda x: logits, Graph(label, flags), pets, threshold)  # type: ignore[arg-type]
        assert (found.labels, found.flags) == expected
    far = parity.between([logits, logits[::-1]], pets, threshold + 0.01)
    assert (far.n, far.labels, far.flags) == (2, 0, 2)


def test_a_file_that_disagrees_never_appears(
    pets: package.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = package.update(pets, config_changes={"ratio": {"temperature": 0.5}})
    with pytest.raises(RatioctlError, match="does not agree with torch on 256 images") as caught:
        export.export(other, output=tmp_path / "wrong.onnx")  # the graph is that of the old temperature
    assert caught.value.exit_code == 1
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize(
    ("difference", "scale", "passes"), [(0.9e-4, 1, True), (1.1e-4, 20, False), (1.1e-4, 64, True)]
)
def test_how_much_logits_may_differ(difference: float, scale: float, passes: bool) -> None:
    found = parity.Agreement(n=1, difference=difference, labels=0, flags=0)
    if passes:
        parity.check_parity(found, np.array([[scale, 0.0]]))
        return
    with pytest.raises(RatioctlError):
        parity.check_parity(found, np.array([[scale, 0.0]]))


@pytest.mark.parametrize("field", ["labels", "flags"])
def test_no_decision_may_differ(field: str) -> None:
    found = dataclasses.replace(parity.Agreement(n=1, difference=0.0, labels=0, flags=0), **{field: 1})
    with pytest.raises(RatioctlError, match=f"1 {field}"):
        parity.check_parity(found, np.zeros((1, 2)))


def test_places_that_cannot_be_written_are_refused_before_tracing(
    pets: package.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> bytes:
        raise AssertionError("traced")

    monkeypatch.setattr(export, "graph", never)
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path, tmp_path / "no" / "such" / "m.onnx", tmp_path / "pipe"):
        with pytest.raises(OutputError):
            export.export(pets, output=output)
    with pytest.raises(UsageError, match="makes a folder"):
        export.export(pets, output="m.onnx", layout="triton")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        export.export(pets, output=tmp_path / "file", layout="kserve")


@pytest.mark.parametrize("input_type", ["float", "uint8"])
def test_triton_and_kserve(pets: package.ModelPackage, tmp_path: Path, input_type: Any) -> None:
    done = export.export(pets, output=tmp_path / "repository", layout="kserve", input_type=input_type)
    root = tmp_path / "repository"
    assert [str(path.relative_to(root)) for path in done.files] == [
        *("tiny-pets/1/model.onnx", "tiny-pets/labels.txt", "tiny-pets/config.pbtxt", "inferenceservice.yaml")
    ]
    assert (root / "tiny-pets" / "labels.txt").read_text() == "cat\ndog\nfrog\n"
    text = (root / "tiny-pets" / "config.pbtxt").read_text()
    image = "TYPE_UINT8 dims: [8, 8, 3]" if input_type == "uint8" else "TYPE_FP32 dims: [3, 8, 8]"
    assert f'{{ name: "image" data_type: {image} }}' in text
    assert re.findall(r'name: "(\w+)" data_type: (\w+)', text)[1:] == [
        ("logits", "TYPE_FP32"),
        ("probabilities", "TYPE_FP32"),
        ("label", "TYPE_INT64"),
        ("confidence", "TYPE_FP32"),
        ("ood_score", "TYPE_FP32"),
        ("is_ood", "TYPE_BOOL"),
    ]
    assert text.startswith('name: "tiny-pets"\nbackend: "onnxruntime"\n')
    manifest = (root / "inferenceservice.yaml").read_text()
    assert "kind: InferenceService" in manifest
    assert "protocolVersion: v2" in manifest


@pytest.mark.parametrize("input_type", ["float", "uint8"])
def test_tritons_own_definition_agrees_with_the_model(
    pets: package.ModelPackage, tmp_path: Path, input_type: Any
) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    done = export.export(pets, output=tmp_path, layout="triton", input_type=input_type)
    text = (tmp_path / "tiny-pets" / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parsed.name == "tiny-pets"
    assert parsed.max_batch_size == layouts.MAX_BATCH
    session = runtime.load(done.path).session
    kinds = {"FP32": "float", "UINT8": "uint8", "INT64": "int64", "BOOL": "bool"}

    def declared(part: Any) -> tuple[str, str, list[int]]:
        kind = model_config_pb2.DataType.Name(part.data_type).removeprefix("TYPE_")
        dims = list(part.reshape.shape) if part.HasField("reshape") else list(part.dims)
        return part.name, f"tensor({kinds[kind]})", dims

    for ours, theirs in ((parsed.input, session.get_inputs()), (parsed.output, session.get_outputs())):
        assert [declared(part) for part in ours] == [(v.name, v.type, v.shape[1:]) for v in theirs]
    assert [output.name for output in parsed.output] == OUTPUTS
    assert {output.label_filename for output in parsed.output[:2]} == {"labels.txt"}


@pytest.mark.parametrize(
    ("name", "safe"), [("a b/c", "a-b-c"), ("..", "model"), ("käse", "k-se"), ("x.1_y", "x.1_y")]
)
def test_names_are_made_safe(name: str, safe: str) -> None:
    assert layouts.safe_name(name) == safe


def saved(folder: Path, pixels: np.ndarray, labels: np.ndarray | None) -> Path:
    """The images as PNGs, in class folders where there are labels."""
    for k, image in enumerate(pixels):
        place = folder if labels is None else folder / LABELS[labels[k]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{k:03d}.png")
    return folder


def test_int8_is_measured_on_images_it_was_not_fitted_to(pets: package.ModelPackage, tmp_path: Path) -> None:
    images = parity.sample_images(pets)
    data = saved(tmp_path / "data", images, predictor(pets).predict(images).argmax(1))
    done = export.export(pets, output=tmp_path / "int8.onnx", int8=True, data=str(data))
    loaded = runtime.load(done.path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {
        node.op_type for node in onnx.load(done.path).graph.node
    }
    assert loaded.spec.thresholds == pets.thresholds
    assert loaded.threshold == pets.thresholds["tpr95"]
    assert done.parity is None
    assert done.cost is not None
    assert done.cost.source == str(data)
    assert done.cost.accuracy is not None
    assert done.cost.accuracy[0] == 1.0
    assert 0.7 < done.cost.accuracy[1] <= 1.0
    assert done.cost.auroc is not None
    assert (done.cost.agreement.n, done.cost.outside_agreement.n) == (128, 512)
    assert 0 < done.cost.agreement.difference < 1
    assert list(done.latency_ms) == ["torch", "onnxruntime", "onnxruntime int8"]
    assert package.read(pets.path).onnx_path is None


def test_int8_without_labels_and_what_is_said_beside_it(pets: package.ModelPackage, tmp_path: Path) -> None:
    data = saved(tmp_path / "data", parity.sample_images(pets)[:40], None)
    (data / "broken.png").touch()
    held = quantize.held_out(pets, str(data), False)
    assert (len(held), held.labels) == (40, None)
    faster = {"onnxruntime": {1: 1.0, 32: 2.0}, "onnxruntime int8": {1: 1.0, 32: 1.0}}
    slower = {**faster, "onnxruntime int8": {1: 1.0, 32: 3.0}}
    said = quantize.int8_warnings(held, faster)
    assert [text.split(str(data))[0] for text in said] == ["1 of the images of ", ""]
    assert said[1].endswith("accuracy and AUROC are not measured")
    assert "batch 32 takes 3.00 ms instead of 2.00 ms" in quantize.int8_warnings(held, slower)[-1]
    assert quantize.int8_warnings(None, faster) == ()


def test_int8_needs_images_and_names_the_option(
    pets: package.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"has no recipe.*--data SOURCE") as caught:
        export.export(pets, int8=True)
    assert caught.value.exit_code == 2
    recipe = package.read(package.find()).recipe_text
    with pytest.raises(SourceError, match=r"calibration data of its recipe cannot be read.*--data SOURCE"):
        export.export(dataclasses.replace(pets, recipe_text=recipe), int8=True)
    few = saved(tmp_path / "few", parity.sample_images(pets)[:3], None)
    with pytest.raises(SourceError, match=r"3 image.*32 are needed"):
        export.export(pets, int8=True, data=str(few))
    with pytest.raises(UsageError, match="is for --int8"):
        export.export(pets, data=str(few))
    other = tmp_path / "other" / "horse"
    shutil.copytree(few, other)
    with pytest.raises(SourceError, match="horse"):
        quantize.held_out(pets, str(other.parent), False)


def test_an_opset_that_cannot_be_had(once: package.ModelPackage) -> None:
    for opset in (3, 17):
        with pytest.raises(UsageError, match=f"--opset {opset}: cannot be written"):
            export.graph(once, threshold=0.5, opset=opset)
