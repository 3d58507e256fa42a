"""`ood-score --shard` and `ratioctl merge`: the joined rows are those of the unsharded run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl.cli import main
from ratioctl.utils.sharding import Shard


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """31 random pictures in two folders, every third equal to the one before, and one file of text."""
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for k in range(31):
        below = folder / f"f{k % 2}"
        below.mkdir(parents=True, exist_ok=True)
        if k % 3 != 2:
            pixels = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(below / f"{k // 2:02}.png")
    (folder / "f1" / "03-broken.png").write_text("no image")
    return folder


@pytest.fixture
def score(pictures: Path, tiny_onnx: Path) -> Callable[..., int]:
    def run(*more: str | Path, skip: bool = True) -> int:
        line = [str(pictures), "--model", str(tiny_onnx), "-q", *map(str, more)]
        return main(["ood-score", *line, *(["--skip-errors"] if skip else [])])

    return run


def shards(
    score: Callable[..., int], folder: Path, count: int, *more: str, ending: str = "csv"
) -> list[Path]:
    files = [folder / f"part-{k}.{ending}" for k in range(1, count + 1)]
    for k, file in enumerate(files, 1):
        assert score("--shard", f"{k}/{count}", "--output", file, *more) == 0
    return files


def merge(*parts: Path, output: Path, more: tuple[str, ...] = ("-q",)) -> int:
    return main(["merge", *map(str, parts), "--output", str(output), *more])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_joined_rows_are_those_of_the_unsharded_run(
    score: Callable[..., int], tmp_path: Path, ending: str
) -> None:
    options = ("--probabilities", "--checks", "--explain")
    whole, joined = tmp_path / f"whole.{ending}", tmp_path / f"joined.{ending}"
    assert score("--output", whole, *options) == 0
    parts = shards(score, tmp_path, 3, *options, ending=ending)
    assert merge(*reversed(parts), output=joined) == 0
    assert joined.read_bytes() == whole.read_bytes()


def test_formats_may_differ_and_the_summary_counts(
    score: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, joined = tmp_path / "whole.jsonl", tmp_path / "joined.jsonl"
    score("--output", whole, "--checks")
    parts = [
        *shards(score, tmp_path, 2, "--checks"),
        *shards(score, tmp_path, 2, "--checks", ending="parquet"),
    ]
    capsys.readouterr()
    assert merge(parts[0], parts[3], output=joined, more=("--json",)) == 0
    assert joined.read_bytes() == whole.read_bytes()
    summary = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert summary == {
        "parts": 2,
        "images": 32,
        "out_of_distribution": sum(row["is_ood"] is True for row in rows),
        "errors": 1,
        "output": str(joined),
    }


def test_every_image_is_in_one_shard_which_its_path_alone_chooses(pictures: Path, tiny_onnx: Path) -> None:
    found = [list(ratioctl.ood_score(pictures, model=tiny_onnx, shard=f"{k}/4")) for k in range(1, 5)]
    assert all(found)
    indices = sorted(row.index for rows in found for row in rows if row.index is not None)
    assert indices == list(range(32))
    alone = [row.path for row in ratioctl.ood_score(pictures / "f1", model=tiny_onnx, shard="2/4")]
    assert alone == [row.path for row in found[1] if "/f1/" in row.path]
    assert all(Shard(index=2, count=4).owns(path) for path in alone)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_missing_doubled_and_foreign_shards_are_refused(
    score: Callable[..., int], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, joined = shards(score, tmp_path, 3), tmp_path / "joined.csv"

    def refused(*given: Path) -> str:
        assert merge(*given, output=joined) == 2
        assert not list(tmp_path.glob("joined*"))
        return said(capsys)

    assert "shard 2/3 is missing" in refused(parts[0], parts[2])
    assert f"{parts[0]}: is shard 1/3, as {parts[0]} is" in refused(*parts, parts[0])
    assert "does not exist" in refused(*parts[:2], tmp_path / "nothing.csv")

    score("--shard", "3/3", "--output", parts[2], "--threshold", "tpr99")
    assert f"{parts[2]}: was scored with threshold 0.7, but {parts[0]} with 0.9" in refused(*parts)
    score("--shard", "3/4", "--output", parts[2])
    assert f"is shard 3/4, but {parts[0]} is shard 1/3" in refused(*parts)

    (pictures / "new.png").write_bytes((pictures / "f0" / "00.png").read_bytes())
    score("--shard", "3/3", "--output", parts[2])
    assert f"listed another collection than the others (33 images, {parts[0]} 32)" in refused(*parts)
    (pictures / "new.png").unlink()

    score("--shard", "3/3", "--output", parts[2])
    lines = parts[2].read_bytes().splitlines(keepends=True)
    for damaged, reason in (
        (lines[:-1], "rows, but"),
        ([*lines, lines[-1]], "is out of order"),
        ([lines[0], *reversed(lines[1:])], "the shards: lack image"),
        (lines[:1], "holds 0 rows, but"),
        ([lines[0].replace(b",index", b",place"), *lines[1:]], "has no column index as its last"),
        ([lines[0], b"x,,,,,\n"], "cannot be read"),
    ):
        parts[2].write_bytes(b"".join(damaged))
        assert reason in refused(*parts)
    parts[2].write_bytes(b"".join(lines))
    assert merge(*parts, output=joined) == 0


def test_a_row_that_two_shards_hold_is_refused(
    score: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = shards(score, tmp_path, 2, ending="jsonl")
    record = tmp_path / "part-2.jsonl.shard.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "rows": document["rows"] + 1}))
    lines = [*parts[1].read_text().splitlines(), parts[0].read_text().splitlines()[1]]
    parts[1].write_text("\n".join(sorted(lines, key=lambda line: json.loads(line)["index"])) + "\n")
    assert merge(*parts, output=tmp_path / "joined.csv") == 2
    assert "a second time" in said(capsys)
    assert not list(tmp_path.glob("joined*"))


def test_an_unfinished_shard_is_named(
    score: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = shards(score, tmp_path, 2)

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ratioctl.cli.ood_score._Tally.add", stop)
    assert score("--shard", "2/2", "--output", parts[1]) == 130
    capsys.readouterr()
    assert merge(*parts, output=tmp_path / "joined.csv") == 2
    assert "is not a finished shard: part-2.csv.shard.json is missing beside it" in said(capsys)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "a/b", "-1/3", "1/1000000"])
def test_bad_shards_are_refused(
    score: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert score(f"--shard={text}", "--output", tmp_path / "part.csv") == 2
    assert f"--shard {text}: is no" in said(capsys)
    assert list(tmp_path.glob("part*")) == []


def test_a_shard_needs_a_file_that_merge_can_read(
    score: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), ("--output", tmp_path / "part.txt")):
        assert score("--shard", "1/2", *more) == 2
        assert "--shard: needs --output, which `ratioctl merge` joins" in said(capsys)
    parts = shards(score, tmp_path, 2)
    assert merge(*parts, output=parts[0]) == 2
    assert "is one of the parts" in said(capsys)
    assert merge(*parts, output=tmp_path / "joined.txt") == 2
    foreign = tmp_path / "notes.csv"
    foreign.write_text("mine\n")
    assert merge(*parts, output=foreign) == 2
    assert foreign.read_text() == "mine\n"
