"""A real browser for tests: Debian's Chromium, headless, spoken to over its own pipe, no driver needed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SECONDS = 120  # for what takes one, on a machine that has other things to do


class Page:
    """A loaded page: the requests it made, what it wrote to the console, and a way to ask it things."""

    def __init__(self, send: Callable[..., dict[str, Any]], events: list[dict[str, Any]]) -> None:
        self._send, self._events = send, events

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (a promise is awaited) in the page."""
        answer = self._send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """URLs asked for, those inside the page (data:) left out."""
        urls = [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """Console output, exceptions and the browser's own log entries."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in kinds]


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Callable[[Path], Page]]:
    """Opens a local file in Chromium. Without one it skips, except in continuous integration."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on this machine; .ci/run installs it")
        pytest.skip("no chromium on this machine")
    to_browser, ours_out = os.pipe()
    ours_in, from_browser = os.pipe()
    # Out of the way of 3 and 4, where Chromium expects its ends: it reads from 3 and writes to 4.
    to_browser, from_browser = (_moved(end) for end in (to_browser, from_browser))
    command = [
        *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--remote-debugging-pipe"),
        f"--user-data-dir={tmp_path / 'profile'}",
        "about:blank",
    ]
    script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    with os.fdopen(ours_in, "rb") as reader, os.fdopen(ours_out, "wb") as writer:
        try:
            yield _opener(_Pipe(reader, writer))
        finally:
            process.kill()
            process.wait()


def _moved(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


class _Pipe:
    """Chromium's debugging protocol: JSON documents that end with a zero byte."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer, self.number = reader, writer, 0
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], SECONDS)
            assert ready, "chromium does not answer"
            chunk = os.read(self.reader.fileno(), 1 << 20)
            assert chunk, "chromium ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.number += 1
        document: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if session is not None:
            document["sessionId"] = session
        self.writer.write(json.dumps(document).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            message = self.receive()
            if "method" in message:
                self.events.append(message)


def _opener(pipe: _Pipe) -> Callable[[Path], Page]:
    def open_file(path: Path) -> Page:
        target = pipe.send("Target.createTarget", url="about:blank")["targetId"]
        session = pipe.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def send(method: str, **params: Any) -> dict[str, Any]:
            return pipe.send(method, session, **params)

        for domain in ("Page", "Network", "Runtime", "Log"):
            send(f"{domain}.enable")
        pipe.events.clear()
        send("Page.navigate", url=path.as_uri())
        pipe.wait_for("Page.loadEventFired")
        return Page(send, pipe.events)

    return open_file
