"""Results of finished batches on disk, so that an interrupted run continues where it stopped.

The key of a batch is the SHA-256 of everything that determines its result (model, images, attack, seed,
precision, versions), so stale results are never used. Files are written atomically.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl.utils.atomic_files import make_folder, write_file, writing

Arrays = dict[str, np.ndarray]
_FINISHED = "finished"


class ResultCache:
    """A folder of batches, `<key>.npz` each; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, *, keep: bool = False, others: Sequence[Path] = ()) -> None:
        """Open the cache of an interrupted run. That of a finished run is emptied unless `keep`.

        Args:
            others: folders of further caches, which are only read.

        Raises:
            OutputError, DiskError: the folder cannot be written.
        """
        self.folder = folder
        self.others = tuple(others)
        if folder is None:
            return
        make_folder(folder)
        with writing(folder):
            if (folder / _FINISHED).exists() and not keep:
                for path in folder.glob("*.npz"):
                    path.unlink()
            (folder / _FINISHED).unlink(missing_ok=True)

    def get_or_compute(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """The batch stored under `key`, else `compute()`, stored with the "seconds" it took."""
        stored = self.get(key)
        if stored is not None:
            return stored
        started = time.monotonic()
        arrays = compute()
        arrays["seconds"] = np.array(time.monotonic() - started)
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            write_file(self.folder / f"{key}.npz", buffer.getvalue())
        return arrays

    def get(self, key: str) -> Arrays | None:
        """The batch stored under `key`; None where there is none or its file is damaged."""
        for folder in (self.folder, *self.others):
            if folder is None:
                continue
            try:
                data = (folder / f"{key}.npz").read_bytes()
                with np.load(io.BytesIO(data), allow_pickle=False) as filed:
                    return {name: filed[name] for name in filed.files}
            except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile):
                continue
        return None

    def finish(self) -> None:
        """Mark the run as complete, after its reports are written."""
        if self.folder is not None:
            write_file(self.folder / _FINISHED, b"")


def key_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `facts`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
