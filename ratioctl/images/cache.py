"""The cache folder, and decoded sources in it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import platformdirs
from PIL import __version__ as pillow_version

from ratioctl.errors import DiskError, OutputError
from ratioctl.utils import resources
from ratioctl.utils.atomic_files import alive, sweep, write_file

T = TypeVar("T")

CACHE_FROM_BYTES = 8 * 2**20  # smaller sources are decoded faster than a cache is worth
KEEP_FREE = 2**28  # bytes that the cache leaves free on its disk
CHECK_EVERY = 2**26  # bytes written between looks at the free space
_CACHE_FORMAT = 3
_HEADER = 128  # bytes


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


def read(key: str) -> tuple[np.ndarray, dict[str, Any], bool] | None:
    """The images filed under `key`, the JSON values, and whether the file is as it was written.

    None where there are none or they are unreadable.
    """
    try:
        folder = cache_dir() / "decoded"
        meta = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        path = folder / f"{key}.npy"
        unchanged = meta.get("file") == _identity(path)
        # Copy-on-write: writable for the caller, and the file stays as it is.
        return np.asarray(np.load(path, mmap_mode="c", allow_pickle=False)), dict(meta), unchanged
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError):
        return None


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class Rows:
    """Images that are collected one after the other: in memory, and many of them in a file of the cache.

    A writer has a file of its own until it is complete, so several may decode the same source at once.
    """

    def __init__(self, key: str | None, shape: tuple[int, int, int], source: str) -> None:
        """With `key` None everything stays in memory; `source` is named in errors."""
        self.key, self.shape, self.source = key, shape, source
        self.array = np.empty((0, *shape), np.uint8)
        self.count = 0
        self.file: BinaryIO | None = None
        self.path = Path()
        self.checked = 0

    def expect(self, count: int) -> None:
        """Refuse at once a cache folder without room for so many images, if memory has none either.

        Raises:
            DiskError: it names the folder, the bytes that are needed and those that are free.
        """
        needed = count * int(np.prod(self.shape))
        if self.key is not None and needed >= CACHE_FROM_BYTES and not self._room(needed):
            self.key = None  # they fit into memory

    def _room(self, needed: int) -> bool:
        """Whether the disk has room for more bytes; false where memory must do. Raises DiskError."""
        folder = cache_dir()
        try:
            while not folder.exists():
                folder = folder.parent
            free = shutil.disk_usage(folder).free
        except OSError:
            return True  # whatever is wrong is found when it is written
        if needed + KEEP_FREE <= free:
            return True
        done = self.count * int(np.prod(self.shape))
        if done + needed <= (resources.memory_limit() or 2**62) // 4:
            return False
        reason = (
            f"has {free / 2**30:.1f} GiB free, and the decoded images of {self.source} need "
            f"{(done + needed) / 2**30:.1f} GiB or more"
        )
        step = "Free some space, set RATIOCTL_CACHE to a folder on a larger disk, or choose a smaller size."
        raise DiskError(cache_dir(), reason, step)

    def append(self, image: np.ndarray) -> None:
        """Add one image (H, W, C). Raises DiskError."""
        size = int(np.prod(self.shape))
        if self.file is None and self.key is not None and (self.count + 1) * size >= CACHE_FROM_BYTES:
            self._spill()
        if self.file is not None:
            try:
                if self.checked <= 0:
                    self.checked = CHECK_EVERY
                    if not self._room(CHECK_EVERY):
                        raise OSError(errno.ENOSPC, "no room")
                self.file.write(np.ascontiguousarray(image).data)
                self.checked -= size
                self.count += 1
                return
            except OSError:
                self._retreat()
        if self.count == len(self.array):
            # realloc moves the pages of a large block: growing neither copies nor doubles memory.
            self.array.resize((max(1024, self.count + self.count // 8), *self.shape), refcheck=False)
        self.array[self.count] = image
        self.count += 1

    def _spill(self) -> None:
        folder = cache_dir() / "decoded"
        name = f"{self.key}.npy"
        self.path = folder / f".{name}.{threading.get_ident()}.{os.getpid()}.tmp~"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder, f"{name}*")
            self.file = self.path.open("xb")
            self.file.write(_header(self.count, self.shape))
            self.file.write(self.array[: self.count].tobytes())
            self.array = np.empty((0, *self.shape), np.uint8)
        except OSError:
            self._retreat()

    def _retreat(self) -> None:
        """Go on in memory: the cache cannot be written."""
        rows = self.array[: self.count]
        if self.file is not None:
            if not len(rows):
                with contextlib.suppress(OSError):
                    self.file.flush()
                rows = np.fromfile(self.path, np.uint8, self.count * int(np.prod(self.shape)), offset=_HEADER)
            self.discard()
        self.array = np.empty((rows.size // int(np.prod(self.shape)), *self.shape), np.uint8)
        self.array[:] = rows.reshape(self.array.shape)
        self.count, self.key = len(self.array), None

    def discard(self) -> None:
        """Remove the unfinished file, if there is one."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.file = None

    def images(self) -> np.ndarray:
        """All images (N, H, W, C)."""
        if self.file is None:
            self.array.resize((self.count, *self.shape), refcheck=False)
            return self.array
        self.file.seek(0)
        self.file.write(_header(self.count, self.shape))
        self.file.flush()
        os.fsync(self.file.fileno())
        return np.asarray(np.load(self.path, mmap_mode="c", allow_pickle=False))

    def file_under_key(self, meta: dict[str, Any]) -> None:
        """Give the file its name, JSON values beside it. A cache that cannot be written is skipped.

        The images that `images` returned stay valid.
        """
        if self.file is None or self.key is None:
            return
        path = cache_dir() / "decoded" / f"{self.key}.npy"
        with contextlib.suppress(OSError, OutputError, DiskError):
            os.replace(self.path, path)
            known = {**meta, "file": _identity(path), "source": self.source}
            write_file(path.with_suffix(".json"), json.dumps(known).encode("utf-8"))
        self.discard()


def generated(
    facts: Sequence[object], shape: tuple[int, int, int], source: str, images: Iterator[np.ndarray]
) -> np.ndarray:
    """Images (N, H, W, C) that `images` makes one by one, or those of an earlier call with equal `facts`."""
    key = hashlib.sha256(json.dumps([_CACHE_FORMAT, np.__version__, *facts]).encode()).hexdigest()[:32]
    found = read(key)
    if found is not None and found[2]:
        return found[0]
    rows = Rows(key, shape, source)
    try:
        for image in images:
            rows.append(image)
        made = rows.images()
        rows.file_under_key({})
        return made
    finally:
        rows.discard()


def _header(count: int, shape: tuple[int, int, int]) -> bytes:
    """The header of an .npy file, of the same length for every count."""
    text = (
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {shape[0]}, {shape[1]}, {shape[2]})}}"
    )
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER - 10).to_bytes(2, "little")
        + text.ljust(_HEADER - 11).encode()
        + b"\n"
    )


def remembered(facts: Sequence[object], compute: Callable[[], T]) -> T:
    """`compute()`, a JSON value, kept in the cache under everything that decides it."""
    key = hashlib.sha256(json.dumps([_CACHE_FORMAT, *facts]).encode()).hexdigest()[:32]
    path = cache_dir() / "findings" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    value = compute()
    with contextlib.suppress(OSError, OutputError, DiskError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"value": value}).encode())
    return value


def entries() -> list[dict[str, Any]]:
    """What the cache holds, largest first: "kind", "name", "path", "bytes" and "used" (a time stamp) each."""
    found = []
    folder = cache_dir()
    for path in sorted((folder / "decoded").glob("*.npy")):
        name = path.stem
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            name = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("source", name)
        found.append(_entry("decoded images", name, path))
    for path in sorted(folder.glob("torchvision/*")):
        found.append(_entry("downloaded", path.name, path))
    if any(folder.glob("findings/*.json")):
        found.append(_entry("findings", "duplicates and statistics", folder / "findings"))
    return sorted(found, key=lambda entry: -entry["bytes"])


def _entry(kind: str, name: str, path: Path) -> dict[str, Any]:
    files = [path, path.with_suffix(".json")] if path.is_file() else path.rglob("*")
    status = [file.stat() for file in files if file.is_file()]
    used = max((max(s.st_mtime, s.st_atime) for s in status), default=0.0)
    return {
        "kind": kind,
        "name": str(name),
        "path": str(path),
        "bytes": sum(s.st_size for s in status),
        "used": used,
    }


def clear(downloads: bool = False) -> int:
    """Remove decoded images and findings, with `downloads` also downloaded sets; the number of bytes freed.

    Unfinished files of running processes stay.
    """
    freed = 0
    folder = cache_dir()
    for path in (*(folder / "decoded").glob("*"), *(folder / "findings").glob("*")):
        *_, number, ending = ("", "", *path.name.rsplit(".", 2))
        if ending == "tmp~" and number.isdecimal() and alive(int(number)):
            continue
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    if downloads:
        for path in folder.glob("torchvision/*"):
            freed += int(_entry("", "", path)["bytes"])
            shutil.rmtree(path, ignore_errors=True)
    return freed
