"""`inspect`, `verify` and `models`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ratioctl import package
from ratioctl.cli import main

CONFIG = {
    "architecture": "resnet18",
    "architecture_options": {"width": 16},
    "label_names": ["cat", "dog\x1b[2J"],
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    "ratio": {
        "temperature": 0.5,
        "thresholds": {"tpr95": 0.4},
        "ladders": {"2": [0.5, 1.0]},
        "provenance": {"seed": 3},
        "metrics": [
            {
                "name": "accuracy",
                "value": 0.91234,
                "n": 100,
                "interval": [0.84, 0.96],
                "dataset": "cifar10:test",
                "ball": {"p": "2", "eps": 0.5},
            }
        ],
    },
}


@pytest.fixture
def pkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> package.ModelPackage:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("ratioctl.utils.resources.folder", lambda name: tmp_path / name)
    folder = tmp_path / "assets" / "models" / "cifar10-ratio"
    return package.write(folder, config=CONFIG, weights={"w": np.ones(3, np.float32)})


def test_inspect_shows_what_a_package_is(
    pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (["inspect"], ["inspect", "cifar10-ratio"], ["inspect", str(pkg.path)]):
        assert main(line) == 0
        shown = capsys.readouterr().out
        facts, _, measured = shown.partition("\n\n")
        rows = dict(row.split(maxsplit=1) for row in (*facts.splitlines(), measured.splitlines()[1]))
        assert rows["name"].strip() == "cifar10-ratio"
        assert rows["digest"].strip() == pkg.digest
        assert rows["architecture"].strip() == "resnet18 (width 16)"
        assert rows["temperature"].strip() == "0.5"
        assert rows["threshold"].split() == ["tpr95", "0.4"]
        assert rows["ladder"].split() == ["l2", "0.5,", "1"]
        assert rows["accuracy"].split() == [
            "0.9123",
            "0.84",
            "to",
            "0.96",
            "100",
            "cifar10:test",
            "l2",
            "0.5",
        ]
        assert "dog\\x1b[2J" in shown
        assert "\x1b" not in shown


def test_inspect_json_is_the_config(pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] == pkg.digest
    assert shown["calibrated"] is True
    assert {key: shown[key] for key in pkg.config} == pkg.config


def test_inspect_warns_of_an_edit(pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    path = pkg.path / "config.json"
    path.write_text(path.read_text().replace('"temperature": 0.5', '"temperature": 0.7'))
    assert main(["inspect"]) == 0
    assert "was edited after packaging" in capsys.readouterr().err


def test_inspect_and_verify_name_damage(
    pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "config.json: ok\nREADME.md: ok\nmodel.safetensors: ok\n"
    data = bytearray(pkg.weights_path.read_bytes())
    data[-1] ^= 1
    pkg.weights_path.write_bytes(data)
    assert main(["inspect"]) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.safetensors: does not match its recorded SHA-256" in captured.err
    assert main(["verify"]) == 5
    captured = capsys.readouterr()
    assert "README.md: ok\nmodel.safetensors: FAULT: does not match" in captured.out
    assert "1 of 3 files" in captured.err
    assert main(["verify", "--json"]) == 5
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is False
    assert [file["file"] for file in shown["files"] if not file["ok"]] == ["model.safetensors"]


def test_a_model_that_is_not_there(pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["inspect", "cifar10-ratoi"], ["verify", "cifar10-ratoi"]):
        assert main(line) == 5
        assert 'Did you mean "cifar10-ratio"?' in capsys.readouterr().err
    assert main(["inspect", "none.onnx"]) == 5
    assert "no such file" in capsys.readouterr().err


def test_models_lists_what_is_bundled(pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("cifar10-ratio", "(default)", "resnet18", "3x32x32", "2", "yes", pkg.digest[:12])
    ]
    assert main(["models", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["default"] == "cifar10-ratio"
    assert [(model["name"], model["digest"]) for model in shown["models"]] == [("cifar10-ratio", pkg.digest)]


def test_models_survives_a_damaged_one(pkg: package.ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    broken = pkg.path.parent / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert main(["models"]) == 0
    captured = capsys.readouterr()
    assert "cifar10-ratio" in captured.out
    assert "broken/config.json: is not valid JSON" in captured.err


def test_inspect_is_readable_at_80_columns(
    pkg: package.ModelPackage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    side = {"clean": 0.0, "robust": 1.0, "attack": {"ball": {"p": "2", "eps": 0.25}, "method": "pgd"}}
    names = ("accuracy", "kept_at_tpr95", "let_through_at_tpr95")
    row = {
        "value": 0.0236416,
        "n": 10000,
        "interval": [0.0236416, 0.037271],
        "dataset": "cifar10.tar.xz:test",
    }
    ratio = {
        "objective": {"inside": side, "outside": side},
        "metrics": [{"name": name, **row, "ball": {"p": "2", "eps": 0.5}} for name in names],
        "provenance": {"validation_score": 0.5, "data": {"train": "ab" * 32}},
    }
    out = package.write(
        pkg.path.parent / "long",
        config={**CONFIG, "ratio": {**CONFIG["ratio"], **ratio}},
        weights={"w": np.ones(3, np.float32)},
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(out.path)]) == 0
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    assert f"digest          {out.digest}" in lines
    assert "ID objective    clean 0, robust 1, attack ball l2 0.25, method pgd" in lines
    assert "OOD acceptance tpr95 0.02364 0.02364 to 0.03727 10000 cifar10.tar.xz:test l2 0.5" in lines
    assert "data             train abababababab" in lines
    assert "{" not in shown
