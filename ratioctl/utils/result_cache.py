"""Finished batches on disk: a run that died continues where it stopped, whatever killed it.

A batch is filed under the SHA-256 of everything that decides its result (model, images, attack, seed,
precision, versions), so nothing stale is ever taken up. Files are there whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl.utils.atomic_files import make_folder, write_file, writing

Arrays = dict[str, np.ndarray]
_FINISHED = "finished"


class ResultCache:
    """A folder of finished batches, `<key>.npz` each; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, *, keep: bool = False) -> None:
        """Open the journal of an interrupted run; that of a finished one starts anew unless `keep`.

        Raises:
            OutputError, DiskError: the folder cannot be written.
        """
        self.folder = folder
        self.reused = 0
        if folder is None:
            return
        make_folder(folder)
        with writing(folder):
            if (folder / _FINISHED).exists() and not keep:
                for path in folder.glob("*.npz"):
                    path.unlink()
            (folder / _FINISHED).unlink(missing_ok=True)

    def get_or_compute(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """The batch filed under `key`, else `compute()`, filed with the "seconds" it took."""
        filed = self._read(key)
        if filed is not None:
            self.reused += 1
            return filed
        started = time.monotonic()
        arrays = compute()
        arrays["seconds"] = np.float64(time.monotonic() - started)  # type: ignore[assignment]
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
            write_file(self.folder / f"{key}.npz", buffer.getvalue())
        return arrays

    def _read(self, key: str) -> Arrays | None:
        if self.folder is None:
            return None
        try:
            data = (self.folder / f"{key}.npz").read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as filed:
                return {name: filed[name] for name in filed.files}
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile):
            return None  # not there, or damaged: it is computed (again)

    def finish(self) -> None:
        """Mark the run as complete, after its reports are written."""
        if self.folder is not None:
            write_file(self.folder / _FINISHED, b"")


def key_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON table's canonical form."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
