"""Scoring a bucket of a real S3 server (moto's), which times out, answers 503 and breaks off bodies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from ratioctl.cli import _remote_rows, main
from ratioctl.utils import remote

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
BUCKET = "s3://photographs"
IMAGES = 60


class Faults:
    """A WSGI application around the server; `plan(method, path, number of the request)` names a fault."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.plan: Callable[[str, str, int], str | None] = lambda method, path, number: None
        self.seen: dict[tuple[str, str], int] = {}
        self.lock = threading.Lock()
        self.injected: dict[str, int] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        key = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self.lock:
            number = self.seen[key] = self.seen.get(key, 0) + 1
            fault = self.plan(*key, number)
            if fault:
                self.injected[fault] = self.injected.get(fault, 0) + 1
        if fault == "503":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"]
        if fault == "timeout":
            time.sleep(2.5)
        if fault == "skewed":
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>RequestTimeTooSkewed</Code><Message>Too large</Message></Error>"]
        body = self.inner(environ, start_response)
        if fault == "truncated":
            whole = b"".join(body)
            return [whole[: len(whole) // 2]]
        return body


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faults]]:
    from werkzeug.serving import make_server

    faults = Faults(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    running = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.port}", faults
    running.shutdown()
    thread.join()


@pytest.fixture
def faults(server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faults]:
    url, found = server
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    config = {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    found.plan, found.seen, found.injected = (lambda method, path, number: None), {}, {}
    fs = fsspec.filesystem("s3")
    if fs.exists("photographs"):
        fs.rm("photographs", recursive=True)
    fs.mkdir("photographs")
    yield found
    found.plan = lambda method, path, number: None
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def pictures(faults: Faults, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for k in range(IMAGES):
        below = folder / f"f{k % 3}"
        below.mkdir(parents=True, exist_ok=True)
        path = below / f"{k:03}.jpg"
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        remote.write(f"{BUCKET}/pictures/f{k % 3}/{path.name}", path.read_bytes())
    return folder


@pytest.fixture
def score(tiny_onnx: Path) -> Callable[..., int]:
    def run(*line: str | Path) -> int:
        return main(["ood-score", *map(str, line), "--model", str(tiny_onnx), "-q"])

    return run


@pytest.fixture
def expected(score: Callable[..., int], pictures: Path, tmp_path: Path) -> str:
    score(pictures, "--output", tmp_path / "rows.csv")
    return (tmp_path / "rows.csv").read_text().replace(str(pictures), f"{BUCKET}/pictures")


def test_faults_of_the_server_do_not_change_the_rows(
    score: Callable[..., int], pictures: Path, expected: str, faults: Faults
) -> None:
    def plan(method: str, path: str, number: int) -> str | None:
        if number > 2 or (method == "HEAD" and number > 1):
            return None
        kinds = ("503", None, "truncated", None, None, "503")
        if method == "GET" and path.endswith(("7.jpg", "23.jpg")) and number == 1:
            return "timeout"
        return kinds[sum(path.encode()) % len(kinds)] if method in ("GET", "PUT", "HEAD") else None

    faults.plan = plan
    output = f"{BUCKET}/out/rows.csv"
    assert score(f"{BUCKET}/pictures", "--output", output) == 0
    assert min(faults.injected[kind] for kind in ("503", "truncated", "timeout")) > 0, faults.injected
    faults.plan = lambda method, path, number: None
    assert remote.read(output).decode() == expected
    assert remote.info(f"{output}.partial") is None


def test_an_object_that_always_fails_is_a_row_with_an_error(
    score: Callable[..., int], pictures: Path, expected: str, faults: Faults
) -> None:
    faults.plan = lambda method, path, number: "503" if path.endswith("010.jpg") and method == "GET" else None
    output = f"{BUCKET}/out/rows.jsonl"
    assert score(f"{BUCKET}/pictures", "--output", output) == 3
    rows = [json.loads(line) for line in remote.read(output).decode().splitlines()]
    assert len(rows) == IMAGES
    (failed,) = [row for row in rows if row["error"]]
    assert failed["path"] == f"{BUCKET}/pictures/f1/010.jpg"
    assert "after 6 attempts" in failed["error"]


def test_a_run_that_the_server_ended_continues(
    score: Callable[..., int],
    pictures: Path,
    expected: str,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_remote_rows, "PART_ROWS", 16)
    output = f"{BUCKET}/out/rows.csv"
    faults.plan = lambda method, path, number: (
        "503" if method == "PUT" and path.endswith("part-000002.parquet") else None
    )
    assert score(f"{BUCKET}/pictures", "--output", output) == 2
    assert f"{output}: cannot be written after 6 attempts" in " ".join(capsys.readouterr().err.split())
    faults.plan = lambda method, path, number: None
    assert remote.info(output) is None
    faults.seen.clear()
    assert score(f"{BUCKET}/pictures", "--output", output) == 0
    fetched = sum(path.endswith(".jpg") for method, path in faults.seen if method == "GET")
    assert fetched == IMAGES - 2 * 16
    assert remote.read(output).decode() == expected


def test_a_tar_is_streamed_from_the_bucket(
    score: Callable[..., int], pictures: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(pictures, "set")
    score(tmp_path / "a.tar", "--output", tmp_path / "rows.csv")
    remote.write(f"{BUCKET}/a.tar", (tmp_path / "a.tar").read_bytes())
    monkeypatch.setattr(remote, "BLOCK", 2**14)
    faults.plan = lambda method, path, number: (
        "truncated" if method == "GET" and path.endswith("a.tar") and number % 3 == 2 else None
    )
    output = f"{BUCKET}/rows.csv"
    assert score(f"{BUCKET}/a.tar", "--output", output) == 0
    faults.plan = lambda method, path, number: None
    rows = (tmp_path / "rows.csv").read_text().replace(str(tmp_path), BUCKET)
    assert remote.read(output).decode() == rows
    assert faults.injected["truncated"] > 0


@pytest.mark.parametrize("reason", ["bucket", "credentials", "clock", "key", "output"])
def test_what_cannot_be_read_is_named(
    score: Callable[..., int],
    faults: Faults,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    line, said = [f"{BUCKET}/pictures"], ""
    if reason == "bucket":
        line, said = ["s3://no-such-bucket/pictures"], "its bucket does not exist"
    elif reason == "key":
        line, said = [f"{BUCKET}/no-such-key"], "does not exist"
    elif reason == "output":
        line += ["--output", "s3://no-such-bucket/rows.csv"]
        said = "s3://no-such-bucket/rows.csv: cannot be read: its bucket does not exist"
    elif reason == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": False})
        s3fs.S3FileSystem.clear_instance_cache()
        said = "there are no credentials for it"
    else:
        faults.plan = lambda method, path, number: "skewed" if method == "GET" else None
        said = "this machine's clock and the server's disagree"
    assert score(*line) == 2
    assert said in " ".join(capsys.readouterr().err.split())
