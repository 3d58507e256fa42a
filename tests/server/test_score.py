"""POST /v1/score: the rows of `ood-score`, batches of several requests, limits, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.server import Settings
from ratioctl.server.settings import host_name, is_loopback

TOKEN = "0123456789abcdef"
StartServer = Callable[..., Any]


def png(color: tuple[int, int, int], size: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def rows_of_the_command(capsys: pytest.CaptureFixture[str], model: Path, *line: str | Path) -> list[Any]:
    options = ["--model", str(model), "--format", "jsonl", "--skip-errors", "--quiet", "--probabilities"]
    assert main(["ood-score", *map(str, line), *options]) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


def bomb(side: int = 20_000) -> bytes:
    """A PNG of a few hundred bytes that states `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )  # fmt: skip


def test_rows_are_those_of_ood_score(
    start: StartServer, tiny_onnx: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (colors / "notes.png").write_text("no image")
    files = [colors / "blue.png", colors / "deep" / "green.png", colors / "notes.png", colors / "red.png"]
    expected = rows_of_the_command(capsys, tiny_onnx, *files)
    answer = start(tiny_onnx).score(*files, probabilities=True)
    assert answer.status_code == 200
    rows = answer.json()["rows"]
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other, file in zip(rows, expected, files, strict=True):
        assert row == {**other, "path": file.name}
    assert answer.json()["model"] == "tiny"
    plain = start(tiny_onnx).score(*files).json()["rows"]
    assert plain == [{k: v for k, v in row.items() if not k.startswith("p:")} for row in rows]


def test_a_raw_body_is_one_image(start: StartServer, tiny_onnx: Path) -> None:
    answer = start(tiny_onnx).ask("POST", "/v1/score", content=png((255, 0, 0)))
    (row,) = answer.json()["rows"]
    assert (row["path"], row["label"], row["error"]) == ("image-0", "red", None)


def test_thresholds_and_models_by_name(start: StartServer, tiny_onnx: Path) -> None:
    server = start(tiny_onnx, tiny_onnx)
    image = png((128, 128, 128))
    assert server.score(image).json()["threshold"] == 0.9
    flags = {t: server.score(image, threshold=t).json()["rows"][0]["is_ood"] for t in ("tpr99", "0.2")}
    assert flags == {"tpr99": True, "0.2": False}
    assert server.score(image, model="tiny-2").json()["model"] == "tiny-2"
    unknown = server.score(image, model="tinny-2")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["next_step"].startswith('Did you mean "tiny-2"?')
    wrong = server.score(image, threshold="tpr42")
    assert wrong.status_code == 400
    with pytest.raises(UsageError) as caught:
        ratioctl.ood_score([image], model=tiny_onnx, threshold="tpr42")
    assert wrong.json()["error"]["message"] == str(caught.value)
    listed = server.ask("GET", "/v1/model").json()["models"]
    assert [model["name"] for model in listed] == ["tiny", "tiny-2"]
    assert (listed[0]["labels"], listed[0]["thresholds"]["tpr99"]) == (["red", "green", "blue"], 0.7)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"no image", "is text, not an image"),
        (png((1, 2, 3))[:40], "damaged PNG"),
        (bomb(), "20,000 x 20,000"),
    ],
)
def test_an_image_that_cannot_be_read(start: StartServer, tiny_onnx: Path, body: bytes, reason: str) -> None:
    answer = start(tiny_onnx).ask("POST", "/v1/score", content=body)
    assert answer.status_code == 422
    assert reason in answer.json()["error"]["reason"]
    assert answer.json()["rows"][0]["error"] == answer.json()["error"]["reason"]


def test_pixels_are_limited_before_they_are_decoded(start: StartServer, tiny_onnx: Path) -> None:
    server = start(tiny_onnx, max_pixels=50 * 50)
    rows = server.score(png((255, 0, 0), 50), png((255, 0, 0), 51)).json()["rows"]
    assert [row["label"] for row in rows] == ["red", None]
    assert rows[1]["error"] == "has 51 x 51 pixels, more than the 2,500 that are decoded"


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ({"content": b""}, 400, "has no body"),
        ({"data": {"image": "x"}, "files": {}}, 422, "is text"),  # a form is taken as a raw body
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, 400, "multipart"),
        ({"files": [("image", ("a.png", b"x"))] * 5}, 413, "too many files"),
        ({"files": {"image": (None, "text")}}, 400, "holds no file"),
        ({"content": bytes(3 * 2**20)}, 413, "more than the 2,097,152"),
    ],
)
def test_bodies_that_are_refused(
    start: StartServer, tiny_onnx: Path, options: dict[str, Any], status: int, reason: str
) -> None:
    answer = start(tiny_onnx, max_images=4, max_body=2**21).ask("POST", "/v1/score", **options)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert reason in error["reason"]
    assert error["next_step"]


def test_slow_and_endless_bodies_end_while_others_are_served(start: StartServer, tiny_onnx: Path) -> None:
    server = start(tiny_onnx, timeout=0.5, max_body=10_000)

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(3)
        yield b"y"

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)

    late, long, fine = server.together(
        server.send("POST", "/v1/score", content=slow()),
        server.send("POST", "/v1/score", content=endless()),
        server.send("POST", "/v1/score", content=png((0, 255, 0))),
    )
    assert (late.status_code, long.status_code, fine.status_code) == (408, 413, 200)
    assert fine.json()["rows"][0]["label"] == "green"
    assert server.app.held == server.app.active == 0


class Held:
    """Replaces `predict` of a server's model: batches wait until they are let go."""

    def __init__(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.free, self.begun = threading.Event(), threading.Event()
        (served,) = server.service.models.values()
        predict = served.model.predict

        def held(images: np.ndarray) -> np.ndarray:
            self.batches.append(len(images))
            self.begun.set()
            assert self.free.wait(30)
            return predict(images)

        object.__setattr__(served.model, "predict", held)
        self.queue = served.queue


def test_requests_share_batches_and_get_their_own_rows(
    start: StartServer, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ratioctl.utils.resources.processors", lambda: 1)
    server = start(tiny_onnx)
    held = Held(server, monkeypatch)
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)] * 4

    async def release() -> None:
        await asyncio.to_thread(held.begun.wait, 30)
        while len(held.queue) + sum(held.batches) < len(colors):
            await asyncio.sleep(0.01)
        held.free.set()

    *answers, _ = server.together(
        *(server.send("POST", "/v1/score", content=png(color)) for color in colors), release()
    )
    labels = [answer.json()["rows"][0]["label"] for answer in answers]
    assert labels == ["red", "green", "blue"] * 4
    assert sum(held.batches) == len(colors)
    assert len(held.batches) <= 2, "what had waited was not scored together"
    text = server.ask("GET", "/metrics").text
    assert 'ratioctl_images_total{model="tiny",result="ood"}' in text
    assert "ratioctl_batch_images_sum 12.0" in text


def test_a_full_queue_refuses_and_a_client_that_leaves_makes_room(
    start: StartServer, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ratioctl.utils.resources.processors", lambda: 1)
    server = start(tiny_onnx, max_queue=2)
    held = Held(server, monkeypatch)

    async def scenario() -> None:
        first = asyncio.create_task(server.send("POST", "/v1/score", content=png((255, 0, 0))))
        await asyncio.to_thread(held.begun.wait, 30)
        files = [("image", ("a", png((0, 255, 0))))] * 2
        leaving = asyncio.create_task(leave_while_it_waits(server, png((0, 255, 0))))
        waiting = asyncio.create_task(server.send("POST", "/v1/score", content=png((0, 0, 255))))
        while len(held.queue) < 2:
            await asyncio.sleep(0.01)
        full = await server.send("POST", "/v1/score", files=files)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert "holds 2 images" in full.json()["error"]["reason"]
        assert await leaving == 499
        after = asyncio.create_task(server.send("POST", "/v1/score", content=png((0, 255, 0))))
        while server.app.active < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        held.free.set()
        assert (await after).json()["rows"][0]["label"] == "green"
        assert (await first).json()["rows"][0]["label"] == "red"
        assert (await waiting).json()["rows"][0]["label"] == "blue"

    asyncio.run(scenario())
    assert sum(held.batches) == 3, "the image of the client that left was scored"


async def leave_while_it_waits(server: Any, body: bytes) -> int:
    """A request whose client closes the connection; the status that nobody receives."""
    headers = [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score", "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000), "root_path": "",
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    statuses = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    await server.app(scope, receive, send)
    return statuses[0]


def test_a_request_that_takes_too_long_is_ended(
    start: StartServer, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(tiny_onnx, timeout=0.3)
    held = Held(server, monkeypatch)
    answer = server.ask("POST", "/v1/score", content=png((255, 0, 0)))
    held.free.set()
    assert answer.status_code == 503
    assert answer.json()["error"]["reason"] == "was not answered within 0.3 s"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "models.example:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_other_sites_and_names_are_refused(
    start: StartServer, tiny_onnx: Path, headers: dict[str, str], status: int
) -> None:
    server = start(tiny_onnx, allowed_hosts=("models.example",))
    answer = server.ask("POST", "/v1/score", content=png((255, 0, 0)), headers=headers)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_token(start: StartServer, tiny_onnx: Path) -> None:
    server = start(tiny_onnx, token=TOKEN)

    def status(path: str, header: str | bytes | None) -> int:
        headers = {} if header is None else {"authorization": header}
        return int(server.ask("GET", path, headers=headers).status_code)

    assert status("/v1/model", f"Bearer {TOKEN}") == status("/metrics", f"bearer {TOKEN}") == 200
    for wrong in (
        None,
        "Bearer",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        "Bearer é".encode(),
    ):
        assert status("/v1/model", wrong) == status("/metrics", wrong) == 401
    assert {status(path, None) for path in ("/", "/health/live", "/health/ready", "/openapi.json")} == {200}
    assert server.ask("GET", "/openapi.json").json()["security"] == [{"token": []}]


def test_others_may_connect_with_a_token_only() -> None:
    assert Settings(host="::1").token is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="--token"):
            Settings(host=host)
        assert Settings(host=host, token=TOKEN).token == TOKEN
    for weak in ("", "short", "with spaces in it, though long", "ä" * 20):
        with pytest.raises(UsageError, match="at least 16"):
            Settings(token=weak)
    assert TOKEN not in repr(Settings(token=TOKEN))
    assert Settings(host="0.0.0.0", token=TOKEN).accepts_host("10.1.2.3:80")
    assert not Settings(host="0.0.0.0", token=TOKEN).accepts_host("evil.example")
    assert [host_name(h) for h in ("A:1", "[::1]:80", "[::1]", "b", "")] == ["a", "::1", "::1", "b", ""]
    assert [is_loopback(h) for h in ("127.9.9.9", "::1", "LocalHost", "10.0.0.1", "")] == [True] * 3 + [
        False
    ] * 2


def test_uploads_never_touch_the_disk(
    start: StartServer, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # a temporary file would fail
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    assert len(stream.getvalue()) > 4 * 2**20  # Starlette keeps one MiB in memory
    answer = start(tiny_onnx).score(stream.getvalue(), stream.getvalue())
    assert [row["error"] for row in answer.json()["rows"]] == [None, None]


def test_no_answer_contains_a_path_of_the_server(
    start: StartServer, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(tiny_onnx)
    (served,) = server.service.models.values()

    def broken(images: np.ndarray) -> np.ndarray:
        raise PackageError(tiny_onnx, "cannot compute", f"See {tiny_onnx}")

    good = [server.ask("GET", path).text for path in ("/v1/model", "/openapi.json", "/metrics", "/nowhere")]
    object.__setattr__(served.model, "predict", broken)
    answer = server.ask("POST", "/v1/score", content=png((255, 0, 0)))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error: the server failed. Its log says why."
    assert "cannot compute" in caplog.text
    assert not [text for text in [*good, answer.text] if str(tiny_onnx.parent) in text]


def test_a_server_that_stops_refuses_what_is_new(start: StartServer, tiny_onnx: Path) -> None:
    server = start(tiny_onnx)
    assert server.ask("GET", "/health/ready").json() == {"status": "ok"}
    server.service.draining = True
    assert server.ask("GET", "/health/ready").status_code == 503
    assert server.ask("GET", "/health/live").json() == {"status": "stopping"}
    refused = server.ask("POST", "/v1/score", content=png((255, 0, 0)))
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")


def test_parameters_are_refused_in_our_words(start: StartServer, tiny_onnx: Path) -> None:
    answer = start(tiny_onnx).score(png((0, 0, 0)), probabilities="perhaps")
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == (
        "probabilities perhaps: is neither true nor false. See /openapi.json."
    )
    answer = start(tiny_onnx).score(png((0, 0, 0)), treshold="tpr99")
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == (
        'treshold: is not a parameter of this request. Did you mean "threshold"?'
    )
    assert start(tiny_onnx).ask("GET", "/v1/score").status_code == 405


def test_every_error_of_the_openapi_document_has_our_form(start: StartServer, tiny_onnx: Path) -> None:
    document = start(tiny_onnx).ask("GET", "/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    paths = document["paths"]
    assert {"/v1/score", "/v1/counterfactual", "/v1/model", "/health/ready", "/metrics"} <= set(paths)
    content = paths["/v1/score"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/octet-stream", "multipart/form-data"}


def test_scores_without_torch_and_an_explanation_of_why_there_are_no_explanations(
    tiny_package: Path, tiny_onnx: Path
) -> None:
    program = f"""
import asyncio, sys
for name in ("torch", "torchvision", "onnx", "jinja2", "markdown_it", "scipy"):
    sys.modules[name] = None
import httpx
from ratioctl.server import Settings
from ratioctl.server.run import application
from ratioctl.server.service import Service
app = application(Service([{str(tiny_package)!r}, {str(tiny_onnx)!r}], Settings()))
async def main():
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        print((await client.post("/v1/score", content={png((0, 0, 255))!r})).json()["rows"][0]["label"])
        for name in ("tiny", "tiny-2"):
            answer = await client.post(f"/v1/counterfactual?target=red&model={{name}}", content=b"x")
            print(answer.status_code, answer.json()["error"]["message"])
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    label, package, onnx = done.stdout.splitlines() or [done.stderr] * 3
    assert label == "blue"
    assert package == (
        "501 counterfactual: needs torch, which is not installed. "
        'Run on the server: pip install "ratioctl[torch]"'
    )
    assert onnx.startswith("501 tiny-2: is an ONNX file that gives scores only")
