"""The cache folder, and decoded sources in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from PIL import __version__ as pillow_version

from ratioctl.errors import DiskError, OutputError
from ratioctl.utils.atomic_files import partial, streaming, write_file

CACHE_FROM_BYTES = 8 * 2**20  # smaller sources are decoded faster than a cache is worth
_CACHE_FORMAT = 2


def cache_dir() -> Path:
    """Folder of downloads and decoded data: $RATIOCTL_CACHE, else `ratioctl` in the user's cache folder.

    The folder that earlier versions used (~/.cache/ratioctl on every Unix) is kept where it exists.
    """
    if own := os.environ.get("RATIOCTL_CACHE"):
        return Path(own).expanduser()
    folder = platformdirs.user_cache_path("ratioctl", appauthor=False)
    earlier = Path("~/.cache/ratioctl").expanduser()
    return earlier if sys.platform == "darwin" and earlier.is_dir() and not folder.is_dir() else folder


def key_of(facts: Sequence[object], files: Iterable[tuple[str, str | None]]) -> str | None:
    """Name of a decoded result: a digest of `facts` and of the size and time of every file.

    Args:
        facts: JSON values that decide the result.
        files: (name, path on disk or None) of each file it was made of.

    Returns:
        None where the files cannot be examined.
    """
    digest = hashlib.sha256()
    try:
        for name, path in files:
            status = os.stat(path) if path and os.path.exists(path) else None
            seen = (name, status.st_size, status.st_mtime_ns) if status else (name,)
            digest.update(repr(seen).encode("utf-8", "backslashreplace"))
    except OSError:
        return None
    state = json.dumps([_CACHE_FORMAT, pillow_version, *facts, digest.hexdigest()])
    return hashlib.sha256(state.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def read(key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The images and JSON values filed under `key`; None where there are none or they are unreadable."""
    try:
        folder = cache_dir() / "decoded"
        meta = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        # Copy-on-write: writable for the caller, and the file stays as it is.
        return np.asarray(np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)), dict(meta)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None


def write(key: str, images: np.ndarray, meta: dict[str, Any]) -> None:
    """File images and JSON values under `key`; a cache that cannot be written is skipped."""
    folder = cache_dir() / "decoded"
    path = folder / f"{key}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with streaming(path) as file:
            np.save(file, images, allow_pickle=False)
        write_file(folder / f"{key}.json", json.dumps(meta).encode("utf-8"))
    except (OSError, OutputError, DiskError):
        with contextlib.suppress(OSError):
            partial(path).unlink(missing_ok=True)
