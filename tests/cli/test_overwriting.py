"""Files that a command did not write are never replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl import package as packages
from ratioctl.cli import main


@pytest.mark.parametrize("kind", ["csv", "jsonl", "table", "parquet"])
def test_ood_score_replaces_its_own_rows_only(
    kind: str, tiny_onnx: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ood-score", str(photographs), "--model", str(tiny_onnx), "--format", kind, "--output"]
    rows = tmp_path / f"rows.{kind}"
    assert main([*command, str(rows)]) == 0
    first = rows.read_bytes()
    assert main([*command, str(rows), "--limit", "1"]) == 0
    assert len(rows.read_bytes()) < len(first) or kind == "parquet"
    image = photographs / "one.png"
    foreign = tmp_path / "notes.txt"
    foreign.write_text("precious\n")
    for path in (image, foreign):
        before = path.read_bytes()
        assert main([*command, str(path)]) == 2
        assert "exists and holds no rows of ood-score" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_a_parquet_file_of_the_users_is_kept(tiny_onnx: Path, photographs: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    theirs = tmp_path / "theirs.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), theirs)
    before = theirs.read_bytes()
    assert main(["ood-score", str(photographs), "--model", str(tiny_onnx), "--output", str(theirs)]) == 2
    assert theirs.read_bytes() == before


def test_export_replaces_its_own_file_only(
    small_package: Path,
    small_graph: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ratioctl.onnx import export

    monkeypatch.setattr(export, "graph", lambda package, **options: small_graph)
    monkeypatch.setattr(export, "latency_ms", lambda predict, pixels: {1: 1.0, 32: 2.0})
    own, foreign = tmp_path / "own.onnx", tmp_path / "mine.onnx"
    for _ in range(2):
        assert main(["export", str(small_package), "--output", str(own), "--quiet"]) == 0
    foreign.write_text("mine")
    assert main(["export", str(small_package), "--output", str(foreign)]) == 2
    assert "was not exported by ratioctl" in capsys.readouterr().err
    assert foreign.read_text() == "mine"


def test_evaluate_replaces_its_own_report_only(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(small_package), "--data", str(cats_and_dogs), "--suite", "clean", "--out"]
    for _ in range(2):
        assert main([*command, str(tmp_path / "own")]) == 0
    for content in ("mine", '{"schema": "another/1"}'):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "report.html").write_text("mine")
        (folder / "report.json").write_text(content)
        assert main([*command, str(folder)]) == 2
        assert "was not written by ratioctl" in capsys.readouterr().err
        assert (folder / "report.html").read_text() == "mine"
        assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert packages.read(small_package).digest


def test_resuming_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "optim.epochs=0.02",
        "optim.batch_size=16",
        "model.architecture=wideresnet-10-1",
        "model.width=",
        "optim.validate_images=16",
    ]
    line = ["train", "digits-plain", "--out", str(tmp_path / "run"), "--resume"]
    assert main([*line, *(f"--set={setting}" for setting in settings)]) == 0
    assert "no checkpoint, so training starts from the beginning" in capsys.readouterr().err
