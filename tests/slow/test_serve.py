"""`ratioctl serve` as a process: many clients, signals, hostile clients, and its OpenAPI document."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import ratioctl

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef"
Serve = Callable[..., Any]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """64 images of different sizes and colors, so that every one has its own row."""
    generator, files = np.random.default_rng(7), []
    for k in range(64):
        low, size = generator.integers(0, 200, 3), 4 + k % 5
        pixels = generator.integers(low, low + 55, (size, size, 3)).astype(np.uint8)
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def test_32_clients_each_get_their_own_rows(serving: Serve, tiny_onnx: Path, pictures: list[Path]) -> None:
    expected = [row.to_json(["red", "green", "blue"]) for row in ratioctl.ood_score(
        pictures, model=tiny_onnx, probabilities=True
    )]  # fmt: skip
    server, ends = serving(tiny_onnx), time.monotonic() + 8
    data = [path.read_bytes() for path in pictures]

    def client(number: int) -> int:
        generator, count = np.random.default_rng(number), 0
        with httpx.Client(base_url=server.url, timeout=60) as session:
            while time.monotonic() < ends:
                chosen = generator.integers(0, len(data), 1 + number % 4).tolist()
                files = [("image", (str(pictures[k]), data[k])) for k in chosen]
                answer = session.post("/v1/score?probabilities=true", files=files)
                assert answer.status_code == 200, answer.text
                rows = answer.json()["rows"]
                assert len(rows) == len(chosen)
                for row, k in zip(rows, chosen, strict=True):
                    assert row.keys() == expected[k].keys()
                    for key, value in expected[k].items():
                        assert (
                            row[key] == pytest.approx(value, abs=1e-6)
                            if isinstance(value, float)
                            else row[key] == value
                        )
                count += len(rows)
        return count

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        counts = list(pool.map(client, range(32)))
    assert min(counts) > 0
    text = httpx.get(f"{server.url}/metrics").text
    scored = [
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("ratioctl_images_total")
    ]
    assert sum(scored) == sum(counts)
    assert server.stop() == (0, "")


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(
    serving: Serve, small_package: Path, photographs: Path
) -> None:
    server = serving(small_package)
    image = (photographs / "one.png").read_bytes()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        job = client.post("/v1/counterfactual?target=dog&steps=200", content=image).json()["id"]
        with client.stream("GET", f"/v1/counterfactual/{job}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: progress"
            server.process.send_signal(signal.SIGTERM)
            for _ in range(600):
                refused = httpx.post(f"{server.url}/v1/score", content=image)
                if refused.status_code == 503:
                    break
                time.sleep(0.05)
            assert refused.json()["error"]["message"] == "the server: is stopping. Send the request again."
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            assert [line for line in lines if line.startswith("event:")][-1] == "event: done"
        result = client.get(f"/v1/counterfactual/{job}").json()
        assert result["result"]["images"][0]["targets"][0]["target"] == "dog"
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health/live")


def test_a_second_signal_ends_at_once(serving: Serve, small_package: Path, photographs: Path) -> None:
    server = serving(small_package)
    image = (photographs / "one.png").read_bytes()
    httpx.post(f"{server.url}/v1/counterfactual?target=all&steps=2000", content=image, timeout=60)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    code, said = server.stop(signal.SIGINT)
    assert (code, "Traceback" in said) == (130, False)
    assert "stopped by a second signal" in said


def test_hostile_connections_do_not_stop_others(serving: Serve, tiny_onnx: Path, colors: Path) -> None:
    server = serving(tiny_onnx, "--max-body", "1", "--timeout", "1")
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    red = (colors / "red.png").read_bytes()

    def connect(sent: bytes) -> socket.socket:
        connection = socket.create_connection((host, port), timeout=60)
        connection.sendall(sent)
        return connection

    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\n"
    silent = [connect(b"") for _ in range(50)]
    slow_heads = [connect(head) for _ in range(50)]
    slow_bodies = [connect(head + b"Content-Length: 1000\r\n\r\nx") for _ in range(50)]
    long_head = connect(head + b"X: " + b"y" * 200_000)
    large = connect(head + b"Content-Length: 9999999999\r\n\r\n")
    nonsense = connect(b"\x16\x03\x01 nonsense\r\n\r\n")
    answer = httpx.post(f"{server.url}/v1/score", content=red, timeout=30)
    assert answer.json()["rows"][0]["label"] == "red"

    def answered(connection: socket.socket) -> bytes:
        received = b""
        with connection, contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received[:12]

    assert {answered(one) for one in slow_bodies} == {b"HTTP/1.1 408"}
    assert answered(large) == b"HTTP/1.1 413"
    assert answered(nonsense) == b"HTTP/1.1 400"
    assert answered(long_head) in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")
    assert {answered(one) for one in [*silent, *slow_heads]} == {b"HTTP/1.1 408"}
    assert httpx.post(f"{server.url}/v1/score", content=red, timeout=30).status_code == 200
    assert server.stop() == (0, "")


def test_the_address_is_refused_where_others_listen_or_no_token_is_given(
    serving: Serve, tiny_onnx: Path
) -> None:
    server = serving(tiny_onnx, RATIOCTL_SERVE_TOKEN=TOKEN)
    assert httpx.get(f"{server.url}/v1/model").status_code == 401
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{server.url}/v1/model", headers=headers).status_code == 200
    port = server.url.rpartition(":")[2]
    for options, said in (
        (["--port", port], "cannot be listened on"),
        (["--host", "0.0.0.0"], "Add --token"),
    ):
        line = [sys.executable, "-m", "ratioctl", "serve", str(tiny_onnx), *options]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


def test_memory_does_not_grow_with_requests(serving: Serve, tiny_onnx: Path, colors: Path) -> None:
    server = serving(tiny_onnx)
    red = (colors / "red.png").read_bytes()

    def resident() -> int:
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(150):
            client.post("/v1/score", content=red)
        before = resident()
        for _ in range(600):
            client.post("/v1/score", content=red)
        assert resident() - before < 8 * 1024, "KiB"


def test_the_openapi_document_is_kept(
    serving: Serve, small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    """schemathesis makes requests from the document: none fails the server, and all answers are described."""
    server, image = serving(small_package), (photographs / "one.png").read_bytes()
    job = httpx.post(f"{server.url}/v1/counterfactual?target=dog&steps=4", content=image, timeout=60).json()
    (tmp_path / "schemathesis.toml").write_text(f'parameters = {{ id = "{job["id"]}" }}\n')
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    line = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks]
    line += ["--max-examples", "12", "--seed", "1", "--workers", "1", "--phases", "examples,coverage,fuzzing"]
    line += ["--suppress-health-check", "all", "--request-timeout", "60"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert json.loads(httpx.get(f"{server.url}/v1/model").text)["models"][0]["name"] == "small"
