"""`ratioctl export`: what it prints and how it ends; the work is tested in tests/unit/test_export.py."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ratioctl import package
from ratioctl.cli import main
from ratioctl.errors import OutputError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach `ratioctl.onnx.export.export`, which answers at once."""
    from ratioctl.onnx import export as exporting

    calls: list[dict[str, Any]] = []

    def answer(model: Any, **options: Any) -> Any:
        options.pop("on_start")()
        calls.append({"model": model, **options})
        same = exporting.Agreement(n=256, difference=3e-7, labels=0, flags=0)
        cost = exporting.Cost(
            source="held-out images",
            agreement=exporting.Agreement(n=200, difference=0.1, labels=3, flags=5),
            accuracy=(0.9, 0.88),
            auroc=(0.95, 0.94),
            outside="noise:smooth",
            outside_agreement=exporting.Agreement(n=50, difference=0.2, labels=4, flags=1),
        )
        return exporting.Exported(
            path=Path("m.onnx"),
            files=(Path("m.onnx"),),
            package=None,
            input_type=options["input_type"],
            layout=options["layout"],
            opset=18,
            threshold=0.5,
            weights="fp32",
            bytes=2**20,
            parity=None if options["int8"] else same,
            cost=cost if options["int8"] else None,
            latency_ms={
                "torch": {1: 4.0, 32: 60.0},
                "onnxruntime": {1: 2.0, 32: 50.0},
                **({"onnxruntime int8": {1: 1.0, 32: 25.0}} if options["int8"] else {}),
            },
            warnings=("a doubt",) if options["int8"] else (),
        )

    monkeypatch.setattr(exporting, "export", answer)
    return calls


def test_what_people_read(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "some-model"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "Tracing the network; this takes a while.\n"
    assert lines == [
        "m.onnx",
        "1.0 MiB, opset 18, float input, out of distribution below confidence 0.5",
        "Agrees with torch on 256 images: logits differ by at most 3.0e-07, no label and no flag differs",
        "Batch 1: torch 4.00 ms, onnxruntime 2.00 ms (2 times as fast)",
        "Batch 32: torch 60.0 ms, onnxruntime 50.0 ms (1.2 times as fast)",
    ]
    assert asked == [
        {
            "model": "some-model",
            "output": None,
            "input_type": "float",
            "threshold": "tpr95",
            "int8": False,
            "weights": None,
            "layout": "file",
            "opset": None,
            "threshold_input": False,
            "explain": False,
            "norm": "2",
            "data": None,
            "download": False,
        }
    ]


def test_what_int8_costs(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--int8", "--input", "uint8", "--data", "pets.tar:val"]) == 0
    assert asked[0]["data"] == "pets.tar:val"
    captured = capsys.readouterr()
    assert "a doubt" in captured.err
    lines = [line.split() for line in captured.out.splitlines()]
    assert ["labels", "3", "of", "200", "(1.50%),", "4", "of", "50", "(8.00%)"] in lines
    assert ["flags", "5", "of", "200", "(2.50%),", "1", "of", "50", "(2.00%)"] in lines
    assert ["accuracy", "90.00%", "->", "88.00%"] in lines
    times = "torch 60.0 ms, onnxruntime 50.0 ms, onnxruntime int8 25.0 ms (2 times as fast)"
    assert f"Batch 32: {times}" in captured.out
    assert ["AUROC", "95.00%", "->", "94.00%"] in lines


def test_json(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--json", "--layout", "triton", "--opset", "20", "--threshold", "0.3"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == ["m.onnx"]
    assert document["parity"].items() >= {"n": 256, "difference": 3e-7, "labels": 0, "flags": 0}.items()
    assert document["latency_ms"]["torch"] == {"1": 4.0, "32": 60.0}
    assert (asked[0]["layout"], asked[0]["opset"], asked[0]["threshold"]) == ("triton", 20, "0.3")


def test_exit_codes(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--input", "float16"]) == 2
    assert main(["export", "--layout", "folder"]) == 2

    def refuse(model: Any, **options: Any) -> None:
        raise OutputError("x", "cannot be written")

    monkeypatch.setattr(importlib.import_module("ratioctl.onnx.export"), "export", refuse)
    assert main(["export"]) == 2
    monkeypatch.undo()
    assert main(["export", "no-such-model"]) == 5
    capsys.readouterr()


def test_what_is_refused_is_refused_before_the_tracing_is_announced(
    small_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(small_package, raw)
    package.update(package.read(raw), config_changes={"ratio": {"thresholds": {}}})
    assert main(["export", str(raw)]) == 5
    assert capsys.readouterr().err.startswith(f"Error: {package.read(raw).name}: ")
    (tmp_path / "m.onnx").write_bytes(b"x")
    for line in (["export"], ["calibrate"], ["evaluate", "--data", "digits:test"], ["verify"]):
        assert main([*line, str(tmp_path / "m.onnx")]) == 5
        err = capsys.readouterr().err
        assert "m.onnx: is an exported ONNX file" in err
        assert "Name the package it was made from" in err
