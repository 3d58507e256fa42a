"""`ood-score` and `merge` with URLs, in fsspec's memory file system."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl.cli import _remote_rows, main
from ratioctl.errors import SourceError
from ratioctl.images import load_source
from ratioctl.utils import remote

BUCKET = "memory://bucket"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """14 pictures in two folders, one file that is not an image and a hidden one; also in the bucket."""
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for k in range(14):
        below = folder / ("red" if k % 2 else "green")
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).save(below / f"{k:02}.png")
    (folder / "red" / "05-broken.png").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    for path in folder.rglob("*.png"):
        remote.write(f"{BUCKET}/pictures/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return folder


@pytest.fixture
def score(tiny_onnx: Path) -> Callable[..., int]:
    def run(*line: str | Path) -> int:
        return main(["ood-score", *map(str, line), "--model", str(tiny_onnx), "-q", "--skip-errors"])

    return run


def test_rows_of_a_url_are_those_of_the_folder(
    score: Callable[..., int], pictures: Path, tmp_path: Path
) -> None:
    for ending in ("csv", "jsonl"):
        local, output = tmp_path / f"rows.{ending}", f"{BUCKET}/out/rows.{ending}"
        score(pictures, "--output", local, "--checks")
        assert score(f"{BUCKET}/pictures", "--output", output, "--checks") == 0
        expected = local.read_text().replace(str(pictures), f"{BUCKET}/pictures")
        assert remote.read(output).decode() == expected
        assert [entry.name for entry in remote.listing(f"{BUCKET}/out")][-1:] == [f"rows.{ending}"]
    score(f"{BUCKET}/pictures", "--output", f"{BUCKET}/rows.parquet")
    score(f"{BUCKET}/pictures", "--output", tmp_path / "rows.parquet")
    assert remote.read(f"{BUCKET}/rows.parquet") == (tmp_path / "rows.parquet").read_bytes()
    one = f"{BUCKET}/pictures/red/01.png"
    (row,) = ratioctl.ood_score(one, model=tmp_path / "tiny.onnx")
    assert (row.path, row.error) == (one, None)


def test_archives_and_labelled_sources_at_urls(pictures: Path, tmp_path: Path, tiny_onnx: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in sorted(pictures.rglob("*/*.png")):
            file.write(path, path.relative_to(pictures).as_posix())
    for mode in ("", ":gz", ":xz", ":bz2"):
        with tarfile.open(tmp_path / f"a.tar{mode.replace(':', '.')}", "w" + mode) as tar:
            tar.add(pictures, "set", filter=lambda info: None if ".hidden" in info.name else info)
    for name in ("a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"):
        remote.write(f"{BUCKET}/{name}", (tmp_path / name).read_bytes())
        rows = list(ratioctl.ood_score(f"{BUCKET}/{name}", model=tiny_onnx))
        local = list(ratioctl.ood_score(tmp_path / name, model=tiny_onnx))
        assert [(row.path.replace(BUCKET, str(tmp_path)), row.confidence, row.error) for row in rows] == [
            (row.path, row.confidence, row.error) for row in local
        ]
        assert load_source(f"{BUCKET}/{name}", 4).fingerprint == load_source(str(pictures), 4).fingerprint
    assert load_source(f"{BUCKET}/pictures", 4).label_names == ("green", "red")
    assert load_source(f"{BUCKET}/pictures:red", 4).labels is None
    remote.write(f"{BUCKET}/t.csv", b"path,label\npictures/red/01.png,red\npictures/green/00.png,green\n")
    assert load_source(f"{BUCKET}/t.csv", 4).label_names == ("green", "red")
    with pytest.raises(SourceError, match="does not exist"):
        load_source(f"{BUCKET}/nothing", 4)


def test_an_object_that_vanishes_or_is_truncated_is_a_row_with_an_error(
    score: Callable[..., int], pictures: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_read = type(memory).cat_file

    def cat_file(self: Any, path: str, **options: Any) -> bytes:
        if path.endswith("01.png"):
            raise FileNotFoundError(path)
        data: bytes = true_read(self, path, **options)
        return data[:-5] if path.endswith("02.png") else data

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    output = f"{BUCKET}/rows.jsonl"
    score(f"{BUCKET}/pictures", "--output", output)
    monkeypatch.undo()
    errors = {
        row["path"].rpartition("/")[2]: row["error"]
        for row in map(json.loads, remote.read(output).decode().splitlines())
        if row["error"]
    }
    assert errors.keys() == {"01.png", "02.png", "05-broken.png"}
    assert errors["01.png"] == "does not exist"
    assert "bytes arrived" in errors["02.png"]


def interrupted(
    score: Callable[..., int], monkeypatch: pytest.MonkeyPatch, output: str, after: int, *more: str
) -> None:
    from ratioctl.cli import ood_score

    true_add = ood_score._Tally.add
    seen = 0

    def add(self: Any, rows: Any) -> None:
        nonlocal seen
        true_add(self, rows)
        seen += len(rows)
        if seen >= after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ood_score._Tally, "add", add)
        assert score(f"{BUCKET}/pictures", "--output", output, *more) == 130


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remote_rows, "PART_ROWS", 3)
    monkeypatch.setattr("ratioctl.scoring.pipeline.MAX_BATCH", 2)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_continues_behind_its_last_part(
    score: Callable[..., int],
    pictures: Path,
    tmp_path: Path,
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = f"{BUCKET}/rows.csv"
    score(f"{BUCKET}/pictures", "--output", f"{BUCKET}/whole.csv")
    interrupted(score, monkeypatch, output, 9)
    assert "Finished parts are kept" in " ".join(capsys.readouterr().err.split())
    assert remote.info(output) is None, "nothing under the final name"
    parts = [entry.name for entry in remote.listing(f"{output}.partial")]
    assert parts == ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet", "settings.json"]
    read: list[str] = []
    true_read = type(memory).cat_file

    def cat_file(self: Any, path: str, **options: Any) -> bytes:
        read.append(path)
        return true_read(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", cat_file)
        assert score(f"{BUCKET}/pictures", "--output", output, "--json") == 0
    assert sum(path.endswith(".png") for path in read) == 15 - 9
    assert remote.read(output) == remote.read(f"{BUCKET}/whole.csv")
    assert remote.info(f"{output}.partial") is None
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["errors"]) == (15, 1)


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_collection_or_other_settings_are_not_used(
    score: Callable[..., int], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = f"{BUCKET}/rows.csv", f"{BUCKET}/whole.csv"
    interrupted(score, monkeypatch, output, 9)
    remote.write(f"{BUCKET}/pictures/green/09.png", (pictures / "red" / "01.png").read_bytes())
    score(f"{BUCKET}/pictures", "--output", output)
    score(f"{BUCKET}/pictures", "--output", whole)
    assert remote.read(output) == remote.read(whole)
    assert len(remote.read(whole).splitlines()) == 1 + 16
    for more in (("--threshold", "tpr99"), ("--probabilities",), ("--limit", "14"), ("--shard", "1/1")):
        interrupted(score, monkeypatch, output, 9)
        score(f"{BUCKET}/pictures", "--output", output, *more)
        score(f"{BUCKET}/pictures", "--output", whole, *more)
        assert remote.read(output) == remote.read(whole)


def test_shards_at_urls_are_merged(score: Callable[..., int], pictures: Path, tmp_path: Path) -> None:
    whole, joined = f"{BUCKET}/whole.parquet", f"{BUCKET}/joined.parquet"
    score(f"{BUCKET}/pictures", "--output", whole)
    parts = [f"{BUCKET}/part-{k}.csv" for k in (1, 2)]
    for k, part in enumerate(parts, 1):
        score(f"{BUCKET}/pictures", "--output", part, "--shard", f"{k}/2")
    assert main(["merge", *parts, "--output", joined, "-q"]) == 0
    assert remote.read(joined) == remote.read(whole)
    assert main(["merge", *parts, "--output", str(tmp_path / "joined.parquet"), "-q"]) == 0
    remote.delete(parts[1] + ".shard.json")
    assert main(["merge", *parts, "--output", f"{BUCKET}/again.csv", "-q"]) == 2
    assert remote.info(f"{BUCKET}/again.csv") is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((f"{BUCKET}/nothing",), "memory://bucket/nothing: does not exist"),
        (("nonsense://x",), "nonsense://x: is no URL that fsspec knows"),
        ((f"{BUCKET}/pictures", "--output", f"{BUCKET}/notes.csv"), "exists and holds no rows of ood-score"),
        ((f"{BUCKET}/pictures", "--output", f"{BUCKET}/rows.txt"), "is not a format of rows"),
        ((f"{BUCKET}/empty",), "holds no images"),
    ],
)
def test_bad_urls_are_named(
    score: Callable[..., int], pictures: Path, capsys: pytest.CaptureFixture[str], line: Any, said: str
) -> None:
    remote.write(f"{BUCKET}/notes.csv", b"mine")
    remote.write(f"{BUCKET}/empty/notes.txt", b"mine")
    assert score(*line) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert remote.read(f"{BUCKET}/notes.csv") == b"mine"
    assert remote.info(f"{BUCKET}/notes.csv.partial") is None


def test_a_list_on_stdin_may_name_urls(pictures: Path, tiny_onnx: Path) -> None:
    from ratioctl.scoring.backends import open_model
    from ratioctl.scoring.pipeline import ood_score

    paths = f"{BUCKET}/pictures/red/01.png\n{BUCKET}/gone.png\n{pictures}/red/03.png\n"
    rows = list(ood_score("-", open_model(tiny_onnx, None), stdin=io.BytesIO(paths.encode())))
    assert [row.error for row in rows] == [None, "does not exist", None]


def test_sources_of_an_evaluation_may_be_urls(small_package: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for k in range(12):
        stream = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(stream, "PNG")
        name = f"{('cat', 'dog')[k % 2]}/{k}.png"
        remote.write(f"{BUCKET}/test/{name}", stream.getvalue())
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
    options: dict[str, Any] = {"suite": "clean", "ood": ["uni=noise:uniform"], "limit": 12, "device": "cpu"}
    (at_url,) = ratioctl.evaluate(small_package, data=f"{BUCKET}/test", **options)
    (local,) = ratioctl.evaluate(small_package, data=str(tmp_path / "test"), **options)
    timeless = [
        [(row.name, row.value, row.interval, row.dataset) for row in report.measurements]
        for report in (at_url, local)
    ]
    assert timeless[0] == timeless[1]
    with pytest.raises(SourceError, match="does not exist"):
        ratioctl.evaluate(small_package, data=f"{BUCKET}/nothing", **options)


def test_hf_urls_are_no_sources_called_hf() -> None:
    from ratioctl.data import registry

    assert registry.find("hf:folder") is not None
    assert registry.find("hf://datasets/some/set.parquet") is None


@pytest.mark.filterwarnings("default")  # of aiohttp, about sessions that end with the process
def test_a_web_server_without_ranges(pictures: Path, tmp_path: Path, tiny_onnx: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            pass

    with zipfile.ZipFile(pictures / "a.zip", "w") as file:
        file.write(pictures / "red" / "01.png", "01.png")
    handler = functools.partial(Quiet, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        paths = [f"{url}/red/", f"{url}/green/00.png", f"{url}/a.zip", f"{url}/gone.png"]
        rows = list(ratioctl.ood_score(paths, model=tiny_onnx))
        server.shutdown()
    local = [pictures / "red", pictures / "green" / "00.png", pictures / "a.zip"]
    expected = list(ratioctl.ood_score(local, model=tiny_onnx))
    assert [row.path for row in rows[:-1]] == [row.path.replace(str(pictures), url) for row in expected]
    assert [row.confidence for row in rows[:-1]] == [row.confidence for row in expected]
    assert rows[-1].error == "does not exist"
