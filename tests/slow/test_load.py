"""The short form of `tools/load.py`: what grows with images or calls shows here already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def measured(tmp_path: Path, *options: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "tools.load", "--scratch", str(tmp_path), *options]
    done = subprocess.run(
        [*line, "--json", str(tmp_path / "load.json")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr  # every row was compared there
    found: dict[str, Any] = json.loads((tmp_path / "load.json").read_text())
    return found


def test_five_thousand_images_leave_memory_flat(tmp_path: Path) -> None:
    found = measured(tmp_path, "--images", "5000", "--layout", "folders", "--layout", "tar", "--calls", "0")
    assert [part["layout"] for part in found["images"]] == ["folders", "tar"]
    for part in found["images"]:
        assert (part["rows"], part["errors"]) == (5000, sum(k % 64 == 17 for k in range(5000)))
        assert part["summary"]["images"] == 5000
        used = part["rss_bytes_by_images"]
        assert used["most"] - used["at_a_tenth"] < 16 * MIB
        assert part["open_files"][1] < 20
        assert part["threads"][1] < 20


def test_three_hundred_calls_leave_nothing_behind(tmp_path: Path) -> None:
    found = measured(tmp_path, "--images", "0", "--calls", "300")["calls"]
    assert found["calls"] >= 290
    # Some are open while we look; a leak would be hundreds.
    assert found["open_files"][1] < found["open_files"][0] + 20
    assert found["threads_of_ours_at_the_end"] == 0
    assert found["threads"][1] <= found["threads"][0] + 2
    # A leaked session of the smallest model would be half a megabyte a call.
    used = found["rss_bytes_by_calls"]
    assert used["at_the_end"] - used["at_a_tenth"] < 60 * MIB
