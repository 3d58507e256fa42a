"""Attacked images on disk: `adversarial/<model>-<set>-<ball>.npz`, one file per set and attack.

Plain numpy arrays, without pickle: `x` (N, C, H, W) float32 in [0,1], `index` (N,) of the image in its set,
`distance` (N,) in the ball's norm, `predicted` (N,). Files of the robust accuracy also contain `label` and
`broken_by`: -1 wrong without an attack, 0 survived (`x` is then the image itself), else the attack's number
from 1. The others contain `confidence`. Pixels are floats, because rounding to 8 bits could leave the ball or
undo the attack.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from ratioctl.utils.atomic_files import write_file


def floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0,1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def save(folder: Path, name: str, **arrays: np.ndarray) -> Path:
    """Write one file atomically.

    Raises:
        OutputError, DiskError: it cannot be written.
    """
    path = folder / (re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-") + ".npz")
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    write_file(path, stream.getvalue())
    return path
