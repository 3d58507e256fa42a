"""2,000 images damaged at random, scored by a real process: every one is a row, nothing else happens."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

COUNT = 2_000
KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}


def originals() -> list[tuple[str, bytes]]:
    """(suffix, bytes) of pictures of several sizes in every format."""
    rng = np.random.default_rng(0)
    found = []
    for width, height in ((32, 32), (64, 48), (320, 240)):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = smooth.resize((width, height), Image.Resampling.BICUBIC)
        for kind, suffix in KINDS.items():
            for options in ({}, {"compression": "tiff_lzw"}) if kind == "TIFF" else ({},):
                stream = io.BytesIO()
                picture.save(stream, kind, **options)
                found.append((suffix, stream.getvalue()))
    return found


def damaged(data: bytes, how: int, rng: np.random.Generator, other: bytes) -> bytes:
    changed = bytearray(data)
    if how == 0:  # flipped bits anywhere
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            changed[at] ^= 1 << rng.integers(8)
    elif how == 1:  # cut short
        del changed[rng.integers(0, len(data)) :]
    elif how == 2:  # longer than it should be
        changed += rng.bytes(int(rng.integers(1, 5_000)))
    elif how == 3:  # the head of another file
        length = int(rng.integers(4, 64))
        changed[:length] = other[:length]
    else:  # changed bytes in the head
        for at in rng.integers(0, min(len(data), 64), 3):
            changed[at] = rng.integers(256)
    return bytes(changed)


def score(folder: Path, model: Path) -> tuple[list[dict[str, str]], int, float]:
    """(rows, exit code, MiB held at most)."""
    line = [sys.executable, "-m", "ratioctl", "ood-score", str(folder), "--model", str(model)]
    errors = folder.with_suffix(".stderr")
    with errors.open("wb") as stderr:
        child = subprocess.Popen([*line, "--format", "csv"], stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert child.stdout is not None
        rows = list(csv.DictReader(child.stdout))
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stdout.close()
    said = errors.read_text().splitlines()
    assert len(said) == 1, said[:5]  # the summary
    assert said[0].startswith("2,000 images in ")
    return rows, child.returncode, used.ru_maxrss / 2**10


def test_two_thousand_damaged_images(tiny_onnx: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    rng = np.random.default_rng(1)
    sources = originals()
    for k in range(COUNT):
        suffix, data = sources[k % len(sources)]
        name = f"{k:04d}.{suffix}"
        (whole / name).write_bytes(data)
        other = sources[rng.integers(len(sources))][1]
        (broken / name).write_bytes(damaged(data, k // len(sources) % 5, rng, other))
    rows, code, held = score(whole, tiny_onnx)
    assert (code, len(rows)) == (0, COUNT)
    found, code, held_then = score(broken, tiny_onnx)
    assert code == 3
    assert [Path(row["path"]).name for row in found] == [Path(row["path"]).name for row in rows]
    faults = [row for row in found if row["error"]]
    assert COUNT / 5 < len(faults) < COUNT * 4 / 5
    assert all(bool(row["error"]) != bool(row["confidence"]) for row in found)
    assert held_then < held + 32, "damage costs memory"
