"""2,000 images through a local Ray with two workers, one of which is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

IMAGES = 2_000
MODEL = "cifar10-ratio-small"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for k in range(IMAGES - 2):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{k:04}.jpg")
    (folder / "broken.jpg").write_text("no image")
    (folder / "empty.jpg").touch()
    return folder


def test_a_killed_worker_changes_no_row(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ratioctl.scoring.ray_engine.CALLS", 20)
    expected = list(ratioctl.ood_score(pictures, model=MODEL))
    rows, killed = [], []
    for row in ratioctl.ood_score(pictures, model=MODEL, engine="ray", workers=2):
        rows.append(row)
        if not killed:
            children = psutil.Process().children(recursive=True)
            actors = [child for child in children if "MapWorker" in " ".join(child.cmdline())]
            assert len(actors) == 2
            os.kill(actors[0].pid, signal.SIGKILL)
            killed.append(len(rows))
    assert killed[0] < IMAGES
    assert len(rows) == IMAGES
    assert sorted(rows, key=lambda row: row.path) == sorted(expected, key=lambda row: row.path)
    assert sum(row.error is not None for row in rows) == 2


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster that Ray's command line has started."""
    port = "26379"
    script = str(Path(sys.executable).with_name("ray"))
    line = [script, "start", "--head", "--block", "--port", port, "--num-cpus", "2", "--disable-usage-stats"]
    running = subprocess.Popen(
        [*line, "--include-dashboard", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
            break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    children = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    running.wait(60)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_the_cluster_of_an_address_is_used(pictures: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "rows.jsonl"
    line = ["ood-score", str(pictures), "--model", MODEL, "--engine", "ray", "--workers", "2"]
    command = [sys.executable, "-m", "ratioctl", *line, "--limit", "300", "--output", str(output), "-q"]
    done = subprocess.run(
        command, env={**os.environ, "RAY_ADDRESS": cluster}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in output.read_text().splitlines()]
    expected = {row.path: row for row in ratioctl.ood_score(pictures, model=MODEL, limit=300)}
    assert {row["path"] for row in rows} == set(expected)
    assert all(row["confidence"] == float(f"{expected[row['path']].confidence:.9g}") for row in rows)
