"""Access to URLs: what is tried again, what is not, and how failures are named."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ratioctl.errors import SourceError, UsageError
from ratioctl.utils import remote


class Flaky(MemoryFileSystem):
    """A file system in memory whose answers fail as `faults` say, one after the other."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    faults: list[Any] = []  # noqa: RUF012
    calls = 0

    def _next(self) -> Any:
        Flaky.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        fault = self._next()
        data: bytes = super().cat_file(path, start=start, end=end)
        return data[: len(data) // 2] if fault == "truncated" else data

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._next()
        return super().ls(path, detail=detail)

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        fault = self._next()
        super().pipe_file(path, value[:1] if fault == "truncated" else value)


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.faults, Flaky.calls = [], 0
    yield Flaky
    Flaky.faults = []
    Flaky.store.clear()


class ServerError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


PASSING = [
    TimeoutError("timed out"),
    OSError("503 Slow Down"),
    ServerError(503),
    ServerError(429),
    "truncated",
]


def test_failures_that_may_pass_are_tried_again(flaky: type[Flaky]) -> None:
    remote.write("flaky://b/x", b"0123456789")
    flaky.faults = list(PASSING)
    assert remote.read("flaky://b/x", size=10) == b"0123456789"
    flaky.faults = ["truncated"]
    assert remote.read("flaky://b/x", start=2, end=8) == b"234567"
    flaky.faults = ["truncated", OSError("reset")]
    remote.write("flaky://b/y", b"whole")
    assert remote.read("flaky://b/y") == b"whole"
    flaky.faults = [OSError("reset")]
    assert [entry.name for entry in remote.listing("flaky://b")] == ["x", "y"]


def test_failures_that_stay_are_reported_after_all_attempts(flaky: type[Flaky]) -> None:
    remote.write("flaky://b/x", b"0123456789")
    flaky.faults, flaky.calls = ["truncated"] * 99, 0
    with pytest.raises(remote.RemoteError) as caught:
        remote.read("flaky://b/x", size=10)
    assert caught.value.reason == "cannot be read after 6 attempts: 5 of 10 bytes arrived"
    assert flaky.calls == remote.ATTEMPTS


NoCredentialsError = type("NoCredentialsError", (Exception,), {})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (FileNotFoundError("x"), "does not exist"),
        (FileNotFoundError("The specified bucket does not exist"), "its bucket does not exist"),
        (PermissionError("Forbidden"), "may not be read: access is denied"),
        (NoCredentialsError("Unable to locate credentials"), "there are no credentials for it"),
        (OSError("RequestTimeTooSkewed: the difference"), "this machine's clock and the server's disagree"),
        (ServerError(400), "cannot be read: status 400"),
    ],
)
def test_failures_that_cannot_pass_are_named_at_once(
    flaky: type[Flaky], fault: Exception, reason: str
) -> None:
    flaky.faults = [fault]
    with pytest.raises(remote.RemoteError, match=reason) as caught:
        remote.read("flaky://b/x")
    assert flaky.calls == 1
    error = caught.value.of(SourceError, "flaky://b/x")
    assert str(error).startswith("flaky://b/x: ")
    assert error.next_step


def test_waits_grow_to_a_limit(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 4.0)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    flaky.faults = [OSError("reset")] * 99
    with pytest.raises(remote.RemoteError):
        remote.read("flaky://b/x")
    assert waits == [1, 2, 4, 4, 4]


def test_a_stream_seeks_and_survives_faults(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 16)
    data = bytes(range(256)) * 4
    remote.write("flaky://b/x", data)
    flaky.faults = [None, "truncated", OSError("reset"), None, "truncated"]
    with remote.open_stream("flaky://b/x") as stream:
        assert stream.read(100) == data[:100]
        stream.seek(-24, io.SEEK_END)
        assert stream.read() == data[-24:]
        stream.seek(5)
        assert stream.read(20) == data[5:25]
        flaky.store.clear()
        stream.seek(600)
        with pytest.raises(OSError, match="does not exist"):
            stream.read(20)


def test_a_listing_is_sorted_and_names_sizes() -> None:
    for name, data in (("b/2.png", b"12"), ("b/a/1.png", b"1"), ("b/a/deep/0.png", b""), ("c/x.png", b"x")):
        remote.write(f"flaky://root/{name}", data)
    found = [(entry.name, entry.folder, entry.size) for entry in remote.listing("flaky://root/b/")]
    assert [one[:2] for one in found] == [
        *(("2.png", False), ("a", True), ("a/1.png", False), ("a/deep", True), ("a/deep/0.png", False))
    ]
    assert [size for _, folder, size in found if not folder] == [2, 1, 0]
    assert remote.info("flaky://root/nothing") is None
    folder = remote.info("flaky://root/b")
    assert folder is not None
    assert folder.folder


@pytest.mark.parametrize(
    ("text", "yes"),
    [("s3://b/x", True), ("memory://x", True), ("C://x", False), ("x/s3://b", False), ("s3:/b/x", False)],
)
def test_urls_are_recognized(text: str, yes: bool) -> None:
    assert remote.is_url(text) is yes


def test_what_is_not_installed_or_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(remote.RemoteError, match="is no URL that fsspec knows"):
        remote.read("nonsense://b/x")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: exec("raise ImportError('Install s3fs')"))
    with pytest.raises(remote.RemoteError, match="needs another library: Install s3fs"):
        remote.read("s3://b/x")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UsageError, match=r'needs fsspec.* Run: pip install "ratioctl\[remote\]"'):
        remote.read("s3://b/x")
