"""Attacked images on disk: `adversarial/<model>-<set>-<ball>.npz`, one file per set and attack.

Plain numpy arrays, without pickle: `x` (N, C, H, W) float32 in [0,1], `index` (N,) of the image in its set,
`distance` (N,) in the ball's norm, `predicted` (N,). Files of the robust accuracy also contain `label` and
`broken_by`: -1 wrong without an attack, 0 survived (`x` is then the image itself), else the attack's number
from 1. The others contain `confidence`. Pixels are floats, because rounding to 8 bits could leave the ball or
undo the attack.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import numpy as np

from ratioctl.utils.atomic_files import make_folder, write_file

_LONGEST = 120  # characters of a file name


def floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0,1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


class AttackedImages:
    """The folder of attacked images of one run; every name gets a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self.used: set[str] = set()

    def write(self, name: str, **arrays: np.ndarray) -> Path:
        """Write one file atomically.

        Raises:
            OutputError, DiskError: it cannot be written.
        """
        path = self.folder / f"{self._stem(name)}.npz"
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        write_file(path, stream.getvalue())
        return path

    def _stem(self, name: str) -> str:
        """ASCII letters, digits and "._+-". A hash of `name` replaces what is lost, "-2" a repetition."""
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")
        if not name.isascii() or len(safe) > _LONGEST:
            safe = f"{safe[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        stem, number = safe, 1
        while stem.casefold() in self.used:
            number += 1
            stem = f"{safe}-{number}"
        self.used.add(stem.casefold())
        return stem
