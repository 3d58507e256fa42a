"""The same sources make the same wheel, whenever, wherever and by whomever it is built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(sources: Path, out: Path, epoch: int) -> Path:
    """A wheel built from a copy of the checkout with fresh dates, under another name and file mode mask."""
    sources.mkdir(parents=True)
    for name in ("ratioctl", "recipes", "assets"):
        shutil.copytree(
            ROOT / name,
            sources / name,
            copy_function=shutil.copy,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(sources)],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    epoch = 1_700_000_000
    first = build(tmp_path / "here", tmp_path / "one", epoch)
    before = os.umask(0o077)
    try:
        second = build(tmp_path / "over" / "there", tmp_path / "two", epoch)
    finally:
        os.umask(before)
    digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in (first, second)]
    assert digests[0] == digests[1]
    with zipfile.ZipFile(first) as wheel:
        dates = {info.date_time for info in wheel.infolist()}
        names = wheel.namelist()
    assert dates == {(2023, 11, 14, 22, 13, 20)}  # the moment that was asked for, not that of the build
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert len(names) == len(set(names))
