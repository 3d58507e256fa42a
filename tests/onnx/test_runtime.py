"""ONNX files: predictions, the config they carry, and files that are not ours or damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ratioctl import package
from ratioctl.errors import PackageError
from ratioctl.onnx import runtime

SIZE = 4
WEIGHTS = np.random.default_rng(0).normal(size=(3 * SIZE * SIZE, 3)).astype(np.float32)
CONFIG: dict[str, Any] = {
    "architecture": "linear",
    "label_names": ["cat", "dog", "frog"],
    "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": [0, 0, 0], "std": [1, 1, 1]},
    "ratio": {"format": 1, "name": "linear", "temperature": 0.5, "thresholds": {"tpr95": 0.6}},
}


def graph(*, kind: str = "float", drop: tuple[str, ...] = (), config: object = CONFIG) -> onnx.ModelProto:
    """A linear classifier with the outputs of `ratioctl export`."""
    shape = ["N", 3, SIZE, SIZE] if kind == "float" else ["N", SIZE, SIZE, 3]
    nodes = []
    if kind == "uint8":
        nodes = [
            helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Div", ["planes", "full"], ["pixels"]),
        ]
    nodes += [
        helper.make_node("Flatten", ["pixels" if nodes else "image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Div", ["logits", "temperature"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["probabilities"], axis=1),
        helper.make_node("ReduceMax", ["probabilities", "axis"], ["confidence"], keepdims=0),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        helper.make_node("Sub", ["one", "confidence"], ["ood_score"]),
        helper.make_node("Less", ["confidence", "threshold"], ["is_ood"]),
    ]
    kinds = {"label": TensorProto.INT64, "is_ood": TensorProto.BOOL}
    outputs = [
        helper.make_tensor_value_info(
            name,
            kinds.get(name, TensorProto.FLOAT),
            ["N", 3] if name in ("logits", "probabilities") else ["N"],
        )
        for name in runtime.OUTPUTS
        if name not in drop
    ]
    constants = {
        "weight": WEIGHTS,
        "temperature": np.float32(0.5),
        "threshold": np.float32(0.6),
        "one": np.float32(1),
        "full": np.float32(255),
        "axis": np.array([1]),
    }
    element = TensorProto.FLOAT if kind == "float" else TensorProto.UINT8
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", element, shape)],
            outputs,
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        helper.set_model_props(model, {"ratioctl": text})
    return model


def save(path: Path, **options: Any) -> Path:
    path.write_bytes(graph(**options).SerializeToString())
    return path


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_predict_takes_both_kinds_of_images(tmp_path: Path, images: np.ndarray, kind: str) -> None:
    loaded = runtime.load(save(tmp_path / "m.onnx", kind=kind), threads=1)
    assert (loaded.input_type, loaded.spec.label_names) == (kind, ("cat", "dog", "frog"))
    planes = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    expected = planes.reshape(5, -1) @ WEIGHTS
    for given in (images, planes):
        logits = loaded.predict(given)
        assert (logits.shape, logits.dtype) == ((5, 3), np.float32)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    exponentials = np.exp((expected - expected.max(1, keepdims=True)) / 0.5)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(loaded.probabilities(images), probabilities, atol=1e-5)
    everything = loaded.run(images)
    assert list(everything) == list(runtime.OUTPUTS)
    np.testing.assert_array_equal(everything["label"], expected.argmax(1))
    np.testing.assert_array_equal(everything["is_ood"], everything["confidence"] < 0.6)


def test_predict_refuses_other_shapes(tmp_path: Path, images: np.ndarray) -> None:
    loaded = runtime.load(save(tmp_path / "m.onnx"), threads=1)
    for bad in (images[0], images[:, :2], images.astype(np.float32), images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="of shape"):
            loaded.predict(bad)


def test_a_package_with_an_export_can_be_loaded(tmp_path: Path, images: np.ndarray) -> None:
    made = package.write(tmp_path / "p", config=CONFIG, weights={"w": WEIGHTS})
    with pytest.raises(PackageError, match=r"contains no model.onnx"):
        runtime.load(made)
    made = package.update(made, onnx=save(tmp_path / "m.onnx"))
    for model in (made, made.path, str(tmp_path / "m.onnx")):
        assert runtime.load(model, threads=1).predict(images).shape == (5, 3)


def test_a_package_with_the_export_of_another_model_is_refused(tmp_path: Path) -> None:
    other = {**CONFIG, "label_names": ["dog", "cat", "frog"]}
    data = graph(config=other).SerializeToString()
    mixed = package.write(tmp_path / "m", config=CONFIG, weights={"w": WEIGHTS}, onnx=data)
    with pytest.raises(PackageError, match="has other classes or another input than its package"):
        runtime.load(mixed)


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx")
    os.truncate(path, 2**40)
    with pytest.raises(PackageError, match="is larger than 2 GiB"):
        runtime.load(path)


@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ('"x": NaN', "NaN is not a finite number"),
        ('"x": ' + "[" * 200 + "]" * 200, "nested too deeply"),
        ('"label_names": ["a", "b", "c"]', "occurs twice"),
    ],
)
def test_metadata_are_read_as_strictly_as_a_package(tmp_path: Path, addition: str, said: str) -> None:
    text = f"{json.dumps(CONFIG)[:-1]}, {addition}}}"
    with pytest.raises(PackageError, match=said):
        runtime.load(save(tmp_path / "m.onnx", config=text))


def test_metadata_that_are_no_text(tmp_path: Path) -> None:
    whole = graph().SerializeToString()
    for old, new in ((b"frog", b"f\xff\xfeg"), (b"ratioctl", b"ratio\xff\xfel")):
        assert old in whole
        (tmp_path / "m.onnx").write_bytes(whole.replace(old, new))
        with pytest.raises(PackageError, match="not UTF-8 text"):
            runtime.load(tmp_path / "m.onnx")


def test_a_threshold_in_the_metadata_that_is_none(tmp_path: Path) -> None:
    model = graph()
    entry = model.metadata_props.add()
    entry.key = runtime.ABOUT
    for text, threshold in (
        ('{"threshold": 0.25}', 0.25),
        ("[]", None),
        ('{"threshold": 1' + "0" * 400 + "}", None),
    ):
        entry.value = text
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        assert runtime.load(tmp_path / "m.onnx").threshold == threshold


def test_files_that_are_no_export_of_ours(tmp_path: Path) -> None:
    whole = graph().SerializeToString()
    cases: list[tuple[bytes, str]] = [
        (b"", "is empty"),
        (b"this is no graph at all", "damaged or not an ONNX file"),
        (whole[: len(whole) // 2], "damaged or not an ONNX file"),
        (graph(config=None).SerializeToString(), 'no "ratioctl" entry'),
        (graph(config="{").SerializeToString(), "not valid JSON"),
        (graph(config="[" * 50_000).SerializeToString(), "not valid JSON"),
        (graph(config={**CONFIG, "ratio": {"format": 9}}).SerializeToString(), "format 9"),
        (graph(drop=("is_ood", "label")).SerializeToString(), "no output label, is_ood"),
        (
            graph(config={**CONFIG, "label_names": ["a", "b"]}).SerializeToString(),
            "another number of classes",
        ),
        (
            graph(
                config={**CONFIG, "pretrained_cfg": {**CONFIG["pretrained_cfg"], "input_size": [3, 8, 8]}}
            ).SerializeToString(),
            "another input",
        ),
    ]
    path = tmp_path / "m.onnx"
    for data, said in cases:
        path.write_bytes(data)
        with pytest.raises(PackageError, match=said) as caught:
            runtime.load(path, threads=1)
        assert caught.value.exit_code == 5
    with pytest.raises(PackageError, match="no such file"):
        runtime.load(tmp_path / "none.onnx")


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    onnx.save_model(
        graph(), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(PackageError, match="keeps its weights in another file"):
        runtime.load(tmp_path / "m.onnx", threads=1)


def test_predicting_loads_no_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx")
    program = (
        "import sys, numpy\nfrom ratioctl.onnx import runtime\n"
        f"runtime.load({str(path)!r}).predict(numpy.zeros((1, 3, {SIZE}, {SIZE}), numpy.float32))\n"
        "assert not {'torch', 'onnx', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
