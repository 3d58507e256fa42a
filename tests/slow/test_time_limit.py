"""`train --max-time` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ratioctl import package

SECONDS = 45


@pytest.mark.slow
def test_a_run_ends_within_its_time(tmp_path: Path) -> None:
    settings = ["model.width=4", "optim.epochs=10000", "optim.batch_size=32", "optim.batch_size_out=16"]
    line = ["train", "digits-ratio", *(f"--set={setting}" for setting in settings), "--out", str(tmp_path)]
    began = time.monotonic()
    command = [sys.executable, "-m", "ratioctl", *line, "--max-time", f"{SECONDS}s"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    spent = time.monotonic() - began
    assert 0.5 * SECONDS < spent < SECONDS + 5  # the interpreter starts and ends outside of it
    assert "of the recipe's updates fit into 45 s" in ended.stderr
    made = package.read(tmp_path / "package")
    assert made.calibrated
    provenance = made.config["ratio"]["provenance"]
    assert provenance["max_time"]["seconds"] == SECONDS
    assert 10 < provenance["updates"] < 200_000
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["update"] == last["updates"] == provenance["updates"]
    assert last["lr"] < 0.05  # digits-ratio ends its schedule near 0
