"""`config.json`: its checks, the digest, and thresholds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import package
from ratioctl.errors import PackageError, UncalibratedError, UsageError
from ratioctl.package import store


def edit(pkg: package.ModelPackage, change: Callable[[dict[str, Any]], object]) -> None:
    path = pkg.path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"ratio": {"metrics": [{"name": "accuracy", "value": 0.9}]}}, True),
        ({"ratio": {"provenance": {"seed": 8}}}, True),
        ({"ratio": {"temperature": 0.5}}, True),
        ({"ratio": {"temperature": 0.6}}, False),
        ({"ratio": {"thresholds": {"tpr95": 0.41, "tpr99": 0.3}}}, False),
        ({"label_names": ["cat", "dogs"]}, False),
        ({"architecture": "resnet34"}, False),
        ({"architecture_options": {"width": 32}}, False),
        ({"pretrained_cfg": {"mean": [0.5, 0.4, 0.31]}}, False),
        ({"pretrained_cfg": {"std": [0.2, 0.2, 0.26]}}, False),
    ],
)
def test_digest_covers_what_decides_and_nothing_else(
    pkg: package.ModelPackage, change: dict[str, Any], same: bool
) -> None:
    assert (package.update(pkg, config_changes=change).digest == pkg.digest) is same


def test_digest_covers_the_weights_and_not_the_place(
    pkg: package.ModelPackage, tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    same = package.write(tmp_path / "b", config=package_config, weights=tensors, card="Other words.")
    assert same.digest == pkg.digest
    changed = {**tensors, "conv.weight": tensors["conv.weight"] + np.float16(1)}
    assert package.write(tmp_path / "c", config=package_config, weights=changed).digest != pkg.digest


BAD_CONFIGS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.pop("ratio"), 'no "ratio" part'),
    (lambda c: c["ratio"].update(format=2), r"format 2; this ratioctl reads format 1. Update ratioctl"),
    (lambda c: c["ratio"].update(format=True), "format True"),
    (lambda c: c["ratio"].pop("format"), "format None"),
    (lambda c: c.update(label_names=["cat"]), "two or more names"),
    (lambda c: c.update(label_names=["cat", 3]), "two or more names"),
    (lambda c: c.update(label_names=["cat", "cat"]), '"cat" twice'),
    (lambda c: c.update(label_names=["cat", "\ud800"]), "not valid Unicode"),
    (lambda c: c.update(num_classes=3), "is 3, but there are 2 label names"),
    (lambda c: c.update(architecture=["resnet18"]), '"architecture" must be a name'),
    (lambda c: c.update(architecture_options=3), '"architecture_options"'),
    (lambda c: c.pop("pretrained_cfg"), '"pretrained_cfg" is missing'),
    (lambda c: c["pretrained_cfg"].update(input_size=[3, 32]), r"\[channels, height, width\]"),
    (lambda c: c["pretrained_cfg"].update(input_size=[3, 32, 10**9]), "sides at most"),
    (lambda c: c["pretrained_cfg"].update(input_size=[2, 32, 32]), "channels are 1 or 3"),
    (lambda c: c["pretrained_cfg"].update(mean=[0.5]), r"mean\" must be 3 number"),
    (lambda c: c["pretrained_cfg"].update(mean=[0, 0, 10**400]), r"mean\" must be 3 number"),
    (lambda c: c["pretrained_cfg"].update(std=[0.2, 0.2, 0]), r"std\" must be 3 number.* from 1e-06 to"),
    (lambda c: c["ratio"].update(score="knn"), "this ratioctl knows"),
    (lambda c: c["ratio"].update(temperature=0), "temperature"),
    (lambda c: c["ratio"].update(temperature="1"), "temperature"),
    (lambda c: c["ratio"].update(temperature=float("nan")), "NaN is not a finite number"),
    (lambda c: c["ratio"].update(temperature=float("inf")), "Infinity is not a finite number"),
    (lambda c: c["ratio"].update(thresholds={"tpr95": 1.5}), r"thresholds\" must be confidences"),
    (lambda c: c["ratio"].update(thresholds=[0.5]), r"thresholds\" must be a table"),
    (lambda c: c["ratio"].update(ladders={"3": [1]}), "ladders"),
    (lambda c: c["ratio"].update(ladders={"2": [0]}), "ladders"),
    (lambda c: c["ratio"].pop("files"), r"files\" is missing"),
    (lambda c: c["ratio"]["files"].update({"../../etc/passwd": "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"/etc/passwd": "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"..": "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"a\0b": "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"config.json": "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"x" * 300: "0" * 64}), "not a file name"),
    (lambda c: c["ratio"]["files"].update({"recipe.toml": "abc"}), "no SHA-256 for recipe.toml"),
    (lambda c: c["ratio"]["files"].pop("model.safetensors"), "does not name model.safetensors"),
    (
        lambda c: c["ratio"]["files"].update({"model-0123abcd.safetensors": "0" * 64}),
        "two files for the same role",
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD_CONFIGS)
def test_every_impossible_value_has_its_message(
    pkg: package.ModelPackage, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(pkg, change)
    with pytest.raises(PackageError, match=said):
        package.read(pkg.path)
    assert package.check(pkg.path)[0][1] is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 200 + b"]" * 200, "nested too deeply"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"ratio": {}, "ratio": {}}', '"ratio" occurs twice'),
        (b'{"ratio": 1e999}', "not a finite number"),
        (b'{"ratio": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[]", 'no "ratio" part'),
        (b"null", 'no "ratio" part'),
    ],
)
def test_a_hostile_config(pkg: package.ModelPackage, text: bytes, said: str) -> None:
    (pkg.path / "config.json").write_bytes(text)
    with pytest.raises(PackageError, match=said):
        package.read(pkg.path)


def test_a_huge_config_is_refused_by_its_size(
    pkg: package.ModelPackage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "MAX_CONFIG_BYTES", 100)
    with pytest.raises(PackageError, match="is larger than"):
        package.read(pkg.path)


def test_threshold(pkg: package.ModelPackage) -> None:
    assert package.threshold(pkg) == 0.4
    assert package.threshold(pkg, "tpr99") == 0.3
    assert package.threshold(pkg, "0.25") == package.threshold(pkg, 0.25) == 0.25
    for bad, said in (
        ("nan", r"\[0,1\]"),
        ("1.5", r"\[0,1\]"),
        (-1, r"\[0,1\]"),
        ("high", "neither a name nor a number"),
        ("", "neither a name nor a number"),
    ):
        with pytest.raises(UsageError, match=said):
            package.threshold(pkg, bad)
    with pytest.raises(UsageError, match=r"has no such threshold\. cat-dog has tpr95, tpr99"):
        package.threshold(pkg, "tpr90")
    plain = package.update(pkg, config_changes={"ratio": {"thresholds": {}}})
    assert not plain.calibrated
    with pytest.raises(UncalibratedError, match="ratioctl calibrate"):
        package.threshold(plain)
    assert package.threshold(plain, 0.5) == 0.5


def test_portable_config_is_the_config_without_files(pkg: package.ModelPackage) -> None:
    portable = package.portable_config(pkg)
    assert "files" not in portable["ratio"]
    assert portable["ratio"]["name"] == "cat-dog"
    spec = package.parse_config(portable, "x.onnx", name="x")
    assert (spec.name, spec.label_names, spec.temperature) == ("cat-dog", ("cat", "dog"), 0.5)


def test_absurd_sizes_are_refused(pkg: package.ModelPackage) -> None:
    for change, said in (
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 4096, 4096]), "sides at most 2048"),
        (
            lambda c: c["ratio"]["ladders"].update({"2": [k + 1 for k in range(101)]}),
            "holds 101 radii; 100 are",
        ),
    ):
        config = copy.deepcopy(package.portable_config(pkg))
        change(config)
        with pytest.raises(PackageError, match=said):
            package.parse_config(config, "x", name="x")
    config = package.portable_config(pkg)
    config["ratio"]["ladders"]["2"] = [1, 0.5, 1] * 50
    assert package.parse_config(config, "x", name="x").ladders["2"] == (0.5, 1.0)
