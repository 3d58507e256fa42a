"""`ratioctl ood-score`: formats, streams, summary and exit codes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ratioctl
from ratioctl.cli import main
from ratioctl.cli._progress import rate
from ratioctl.errors import OutputError
from ratioctl.utils.atomic_files import partial, streaming, write_file

SURE = math.exp(2) / (math.exp(2) + 2)
HEADER = ["path", "label", "confidence", "ood_score", "is_ood", "error"]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"


def program(*line: str, before: str = WITHOUT_TORCH) -> list[str]:
    code = f"{before}import sys; sys.argv = ['ratioctl', 'ood-score', *{list(line)!r}]\n"
    return [sys.executable, "-c", code + "from ratioctl.cli import main\nsys.exit(main())"]


def run(*line: str | Path) -> int:
    return main(["ood-score", *map(str, line)])


def test_csv_to_the_letter(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (colors / "empty.png").touch()
    assert run(colors, "--model", tiny_onnx, "--format", "csv", "--threshold", "tpr99") == 3
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == ",".join(HEADER)
    red = lines[5].split(",")
    assert red[:2] == [f"{colors}/red.png", "red"]
    assert re.fullmatch(r"0\.\d{1,9}", red[2])
    assert float(red[2]) == pytest.approx(SURE, abs=1e-6)
    assert float(red[2]) + float(red[3]) == pytest.approx(1, abs=2e-9)
    assert red[4:] == ["false", ""]
    assert lines[4].split(",")[4] == "true"
    assert lines[3] == f"{colors}/empty.png,,,,,is empty (0 bytes)"
    assert len(lines) == 6
    summary = captured.err.splitlines()[-1]
    assert summary.startswith("5 images in ")
    assert "1 out of distribution (confidence below 0.7, tpr99), 1 could not be read." in summary


def test_jsonl_has_nulls_and_the_probabilities(
    tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (colors / "empty.png").touch()
    assert run(colors, "--model", tiny_onnx, "--format", "jsonl", "--probabilities", "-q") == 3
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert all(list(row) == [*HEADER, "p:red", "p:green", "p:blue"] for row in rows)
    assert rows[2] == {
        **dict.fromkeys(rows[2]),
        "path": f"{colors}/empty.png",
        "error": "is empty (0 bytes)",
    }
    assert rows[0]["is_ood"] is True
    assert rows[0]["error"] is None
    assert rows[0]["p:blue"] == rows[0]["confidence"]
    assert sum(rows[0][f"p:{name}"] for name in ("red", "green", "blue")) == pytest.approx(1, abs=2e-9)


def test_parquet_in_row_groups(
    tiny_onnx: Path, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    from ratioctl.cli import _rows

    monkeypatch.setattr(_rows, "PARQUET_ROWS", 2)
    monkeypatch.setattr("ratioctl.scoring.pipeline.MAX_BATCH", 2)
    (colors / "empty.png").touch()
    file = tmp_path / "rows.parquet"
    line = [colors, "--model", tiny_onnx, "--format", "parquet", "--output", file, "--skip-errors"]
    assert run(*line, "--probabilities") == 0
    read = parquet.ParquetFile(file)
    assert read.num_row_groups > 1
    table = read.read()
    assert table.column_names == [*HEADER, "p:red", "p:green", "p:blue"]
    assert [str(kind) for kind in table.schema.types] == [
        *("string", "string", "double", "double", "bool", "string", "double", "double", "double")
    ]
    rows = table.to_pylist()
    assert [Path(row["path"]).name for row in rows] == [
        *("blue.png", "green.png", "empty.png", "grey.png", "red.png")
    ]
    assert rows[2]["confidence"] is None
    assert rows[2]["is_ood"] is None
    assert rows[4]["p:red"] == pytest.approx(SURE, abs=1e-6)


def test_the_name_of_the_output_chooses_its_format(tiny_onnx: Path, colors: Path, tmp_path: Path) -> None:
    line = (colors, "--model", tiny_onnx, "-q", "--output")
    for name in ("rows.csv", "rows.JSONL", "rows.parquet", "rows.txt"):
        assert run(*line, tmp_path / name) == 0
    assert run(*line, tmp_path / "asked.csv", "--format", "jsonl") == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert next(csv.reader(file)) == HEADER
    for name in ("rows.JSONL", "asked.csv"):
        assert list(json.loads((tmp_path / name).read_text().splitlines()[0])) == HEADER
    assert (tmp_path / "rows.parquet").read_bytes()[:4] == b"PAR1"
    assert (tmp_path / "rows.txt").read_text().split()[:6] == HEADER


def test_an_unknown_ending_of_the_output_is_refused(
    tiny_onnx: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rows.xlsx", "rows.json", "rows.csv.gz"):
        assert run(colors, "--model", tiny_onnx, "--output", tmp_path / name) == 2
        said = (
            f"rows{name[4:]}: unknown ending {Path(name).suffix}. Use .txt, .csv, .jsonl, .ndjson, .parquet"
        )
        assert said in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert run(colors, "--model", tiny_onnx, "--output", tmp_path / "rows.data", "--format", "csv") == 0
    assert (tmp_path / "rows.data").read_text().startswith("path,label")


def test_a_slow_pace_is_no_nought() -> None:
    assert [rate(pace) for pace in (0.115, 2.94, 1234.5)] == ["0.12", "2.9", "1,234"]


def test_the_table_is_for_people(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (colors / "line\nbreak\x1b[2J.png").write_bytes((colors / "red.png").read_bytes())
    assert run(colors / "red.png", colors, "--model", tiny_onnx) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == HEADER
    assert lines[1].split()[:2] == [f"{colors}/red.png", "red"]
    assert "\\n" in lines[5]
    assert "\\x1b[2J" in lines[5]
    assert len(lines) == 7
    assert [float(cell) for cell in lines[1].split()[2:4]] == pytest.approx([SURE, 1 - SURE], abs=1e-7)
    assert all(re.fullmatch(r"0\.\d{9,10}", cell) for cell in lines[1].split()[2:4]), "9 significant digits"


def test_one_image_is_one(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(colors / "red.png", "--model", tiny_onnx) == 0
    assert capsys.readouterr().err.startswith("1 image in ")


def test_a_file_with_another_threshold_says_so(
    tmp_path: Path, tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    model = onnx.load(tiny_onnx)
    entry = model.metadata_props.add()
    entry.key, entry.value = "ratioctl.export", '{"threshold": 0.25}'
    onnx.save(model, tmp_path / "own.onnx")
    line = [colors / "red.png", "--model", tmp_path / "own.onnx"]
    assert run(*line) == 0
    said = f"the output is_ood of {tmp_path / 'own.onnx'} compares with 0.25; these rows compare with 0.9"
    assert said in capsys.readouterr().err
    assert run(*line, "--threshold", "0.25") == 0
    assert "the output is_ood" not in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "own.onnx")]) == 0
    assert "confidence below 0.25" in capsys.readouterr().out


def test_names_survive_csv(tiny_onnx: Path, tmp_path: Path, colors: Path) -> None:
    data = (colors / "red.png").read_bytes()
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["a,b.png", 'quo"te.png', "line\nbreak.png", "käse 猫.png", "=1+1.png"]
    for name in names:
        (folder / name).write_bytes(data)
    with open(os.fsencode(folder) + b"/bad-\xff.png", "wb") as stream:
        stream.write(data)
    file = tmp_path / "rows.csv"
    assert run(folder, "--model", tiny_onnx, "--format", "csv", "--output", file) == 0
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))
    assert sorted(row["path"] for row in rows) == sorted(f"{folder}/{n}" for n in [*names, "bad-\\xff.png"])
    assert {row["label"] for row in rows} == {"red"}


def test_csv_on_stdout_cannot_command_a_terminal(
    tiny_onnx: Path, tmp_path: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a\x1b[2Jb\n.png").write_bytes((colors / "red.png").read_bytes())
    assert run(folder, "--model", tiny_onnx, "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{folder}/a\\x1b[2Jb\\n.png,red,")
    assert len(lines) == 2


def test_csv_safe_disarms_formulas_and_nothing_else(
    tiny_onnx: Path, tmp_path: Path, colors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+1.png", "-1.png", "@sum.png", "a=b.png"]
    for name in names:
        Path(name).write_bytes((colors / "red.png").read_bytes())
    line = ["--model", tiny_onnx, "--output", "rows.csv", "-q", "--", *names]
    assert run("--csv-safe", *line) == 0
    with open("rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["'=1+1.png", "'+1.png", "'-1.png", "'@sum.png", "a=b.png"]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert run(*line) == 0
    with open("rows.csv", newline="", encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


def test_a_long_label_does_not_widen_a_table(
    tmp_path: Path,
    tiny_onnx: Path,
    tiny_graph: Callable[..., bytes],
    colors: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnx

    config = json.loads(onnx.load(tiny_onnx).metadata_props[0].value)
    config["label_names"] = ["red" * 30_000, "green", "blue"]
    (tmp_path / "long.onnx").write_bytes(tiny_graph(config))
    assert run(colors, "--model", tmp_path / "long.onnx", "--probabilities") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 250 + len(str(colors))
    assert ("red" * 13)[:37] + "..." in lines[4]
    assert run(colors, "--model", tmp_path / "long.onnx", "--format", "jsonl") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[3])["label"] == "red" * 30_000


def test_limit_takes_the_first(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(colors, "--model", tiny_onnx, "--limit", "2", "--format", "jsonl") == 0
    captured = capsys.readouterr()
    names = [Path(json.loads(line)["path"]).name for line in captured.out.splitlines()]
    assert names == ["blue.png", "green.png"]
    assert captured.err.startswith("2 images in ")
    assert run(colors, "--model", tiny_onnx, "--limit", "0") == 2


def test_out_is_another_word_for_output(tiny_onnx: Path, colors: Path, tmp_path: Path) -> None:
    assert run(colors, "--model", tiny_onnx, "--out", tmp_path / "rows.csv") == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5


def test_json_is_the_summary_alone(
    tiny_onnx: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (colors / "empty.png").touch()
    file = tmp_path / "rows.csv"
    line = [colors, "--model", tiny_onnx, "--json", "--format", "csv", "--output", file]
    assert run(*line, "--threshold", "tpr99") == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["out_of_distribution"], summary["errors"]) == (5, 1, 1)
    assert summary["threshold"] == {"name": "tpr99", "confidence": 0.7}
    assert summary["backend"] == summary["road"] == "onnx"
    assert summary["images_per_second"] == pytest.approx(5 / summary["seconds"])
    assert len(file.read_text().splitlines()) == 6
    assert run(colors / "red.png", "--model", tiny_onnx, "--json", "--threshold", "0.5") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["threshold"] == {"name": None, "confidence": 0.5}


def test_exit_codes(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, grey, empty = colors / "red.png", colors / "grey.png", colors / "empty.png"
    empty.touch()
    common = ["--model", tiny_onnx, "--threshold", "tpr99"]
    assert run(red, *common, "--fail-on-ood") == 0
    assert run(red, grey, *common) == 0
    assert run(red, grey, *common, "--fail-on-ood") == 4
    assert run(red, empty, *common) == 3
    assert run(empty, *common) == 3
    assert run(empty, *common, "--fail-on-ood") == 3
    assert run(empty, *common, "--skip-errors") == 0
    assert run(grey, empty, *common, "--fail-on-ood") == 4
    assert run(grey, empty, *common, "--fail-on-ood", "--skip-errors") == 4
    assert run(red, "missing.png", *common) == 3
    assert run("missing.png", *common) == 2
    assert run(red, "--model", tiny_onnx, "--threshold", "1.5") == 2
    assert run(red, "--model", tiny_onnx, "--threshold", "tpr97") == 2
    assert run(red, "--model", tiny_onnx, "--worst-case", "0.5") == 2
    assert run(red, "--model", "no-such-model") == 5
    assert run(red, "--model", "no-such.onnx") == 5
    assert run(red, *common, "--output", colors / "no" / "such" / "folder.csv") == 2
    assert run(red, *common, "--format", "excel") == 2
    capsys.readouterr()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_takes_no_files(
    tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("/proc/rows.csv", "/proc/self/mem"):
        assert run(colors, "--model", tiny_onnx, "--output", file, "--format", "csv") == 2
        said = f"Error: {file}: cannot be written: its folder accepts no new files"
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("csv", "jsonl", "parquet", "table"):
        assert run(colors, "--model", tiny_onnx, "--format", kind, "--output", "/dev/full") == 6
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "/dev/full: cannot be written: no space left on device" in captured.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(tiny_onnx: Path, colors: Path) -> None:
    with open("/dev/full", "wb") as full:
        line = program(str(colors), "--model", str(tiny_onnx), "--format", "csv")
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 6
    assert b"no space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_onnx_files_that_cannot_be_used(
    tiny_onnx: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    foreign = onnx.load(tiny_onnx)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:200])
    (tmp_path / "empty.onnx").touch()
    parts = tmp_path / "parts.onnx"
    onnx.save(
        onnx.load(tiny_onnx), parts, save_as_external_data=True, location="parts.data", size_threshold=0
    )
    (tmp_path / "parts.data").unlink()
    for name, said in (
        ("foreign", 'was not exported by ratioctl: its metadata has no "ratioctl" entry'),
        ("cut", "is damaged or not an ONNX file"),
        ("empty", "is empty"),
        ("parts", "keeps its weights in another file"),
    ):
        assert run(colors, "--model", tmp_path / f"{name}.onnx") == 5
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"{name}.onnx" in captured.err
        assert said in captured.err


def test_files_that_are_no_files_or_may_not_be_read(
    tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(colors / "a-fifo.png")
    (colors / "b-device.png").symlink_to("/dev/zero")
    locked = colors / "c-locked.png"
    locked.write_bytes((colors / "red.png").read_bytes())
    locked.chmod(0)
    assert run(colors, "--model", tiny_onnx, "--format", "jsonl") == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["error"] for row in rows[:2]] == ["is a FIFO, not a file", "is a device, not a file"]
    refused = os.geteuid() != 0  # root may read everything
    assert rows[3]["error"] == ("may not be read: no permission" if refused else None)
    assert [row["error"] for row in rows[4:]] == [None] * 3
    assert rows[-1]["label"] == "red"


def test_a_file_that_vanishes_and_one_that_grows_meanwhile(
    tiny_onnx: Path, colors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the listing of the folder and the reading of the file."""
    from ratioctl import images

    walk = images.walk

    def meddling(*arguments: object, **options: object) -> object:
        items = list(walk(*arguments, **options))  # type: ignore[arg-type]
        (colors / "blue.png").unlink()
        (colors / "grey.png").write_bytes((colors / "grey.png").read_bytes()[:30])
        return iter(items)

    monkeypatch.setattr(images, "walk", meddling)
    assert run(colors, "--model", tiny_onnx, "--format", "jsonl") == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == [None, "green", None, "red"]
    assert rows[0]["error"] == "does not exist"
    assert "PNG" in rows[2]["error"]


def test_a_present_output_survives_a_wrong_command(
    tiny_onnx: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("precious")
    assert run(colors, "--model", "no-such.onnx", "--output", file) == 5
    assert run("missing", "--model", tiny_onnx, "--output", file) == 2
    assert run(colors, "--model", tiny_onnx, "--output", file, "--threshold", "x") == 2
    assert file.read_text() == "precious"
    capsys.readouterr()


def test_an_output_is_nobody_elses(
    tiny_onnx: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link planted where the rows grow is not followed, and of two writers the first is told."""
    file, mine = tmp_path / "rows.csv", tmp_path / "mine.txt"
    mine.write_text("precious")
    partial(file).symlink_to(mine)
    line = [colors, "--model", tiny_onnx, "--format", "csv", "--output", file]
    assert run(*line) == 0
    assert mine.read_text() == "precious"
    rows = file.read_text()
    assert len(rows.splitlines()) == 5
    first = contextlib.ExitStack()
    slow = first.enter_context(streaming(file))
    slow.write(b"half")
    with streaming(file) as second:
        second.write(b"whole")
        slow.write(b" a row")
        slow.flush()
    with pytest.raises(OutputError, match="taken over by another process"):
        first.close()
    assert file.read_text() == "whole"
    assert not partial(file).exists()
    capsys.readouterr()


def test_leftovers_of_odd_names_hinder_no_write(tmp_path: Path) -> None:
    for number in ("\u00b2", "\u0663", "", "-1", "9" * 40):
        (tmp_path / f".x.{number}.tmp~").touch()
    write_file(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_the_head_of_a_table_stands_over_its_columns(
    tiny_onnx: Path,
    colors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    deep = Path("a-folder-with-a-long-name") / "another-one-that-is-as-long"
    deep.mkdir(parents=True)
    (deep / "red.png").write_bytes((colors / "red.png").read_bytes())
    assert run(deep / "red.png", colors.relative_to(tmp_path) / "red.png", "--model", tiny_onnx) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert {row.index("  red  ") + 2 for row in rows} == {head.index("label")}
    assert {row.index("  0.") + 2 for row in rows} == {head.index("confidence")}


def test_an_empty_list_is_no_clean_bill(tiny_package: Path, colors: Path, tmp_path: Path) -> None:
    """A pipe whose first command failed must not end as if everything had been in distribution."""
    for listed in (b"", b"\n\n", b"\0"):
        done = subprocess.run(
            program("-", "--model", str(tiny_package), "--format", "csv", "--fail-on-ood"),
            input=listed,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert b"Error: -: the list of paths on standard input is empty" in done.stderr
        assert done.stdout == b"", "no head without rows"
    file = tmp_path / "rows.csv"
    file.write_text("precious")
    done = subprocess.run(
        program("-", str(colors / "red.png"), "--model", str(tiny_package), "--format", "jsonl"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["path"], row["label"], row["error"]) for row in rows] == [
        ("-", None, "the list of paths on standard input is empty"),
        (str(colors / "red.png"), "red", None),
    ]
    done = subprocess.run(
        program("-", "--model", str(tiny_package), "--output", str(file)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert file.read_text() == "precious"


def test_a_process_needs_no_torch_and_reads_a_list(tiny_package: Path, colors: Path) -> None:
    listed = "\n".join(str(colors / f"{name}.png") for name in ("red", "blue", "missing")).encode()
    done = subprocess.run(
        program("-", "--model", str(tiny_package), "--format", "jsonl"),
        input=listed,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["red", "blue", None]
    assert b"torch" not in done.stderr


def test_a_closed_pipe_ends_cleanly_while_the_list_is_open(tiny_onnx: Path, colors: Path) -> None:
    with subprocess.Popen(
        program("-", "--model", str(tiny_onnx), "--format", "csv"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(f"{colors}/red.png\n".encode())
        child.stdin.flush()
        assert child.stdout.readline().startswith(b"path,label")
        assert child.stdout.readline().startswith(f"{colors}/red.png,red,".encode())
        child.stdout.close()
        child.stdin.write(f"{colors}/red.png\n".encode())
        child.stdin.flush()
        assert child.wait(60) == 0  # the list on stdin is still open
        assert child.stderr.read() == b""


def test_bit_depth(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grey of 2048 of 12 bits: 8 of 255 where all 16 bits count, 128 otherwise; and a note says so."""
    import numpy as np
    from PIL import Image

    image = tmp_path / "scan.png"
    Image.fromarray(np.full((4, 4), 2048, np.uint16)).save(image)
    line = (image, "--model", tiny_onnx, "--probabilities", "--format", "jsonl")
    assert run(*line) == 0
    dark, said = capsys.readouterr()
    assert "its pixels fill only 12 of 16 bits" in said
    assert run(*line, "--bit-depth", "12") == 0
    _, said = capsys.readouterr()
    assert "fill only" not in said
    (row,) = ratioctl.ood_score([image], model=tiny_onnx, bit_depth=12)
    assert row.confidence == pytest.approx(json.loads(dark)["confidence"])  # grey: all logits are equal
    assert run(*line, "--bit-depth", "17") == 2
