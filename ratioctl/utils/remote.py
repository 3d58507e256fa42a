"""Files named by URL (`s3://`, `gs://`, `hf://`, `https://`, ...), through fsspec.

fsspec and the library of a protocol are imported with the first URL. Credentials are theirs: environment
variables, configuration files, instance roles. Failures that may pass are tried again with growing waits;
short answers count as failures.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from ratioctl.errors import RatioctlError
from ratioctl.utils import optional
from ratioctl.utils.text import shown

T = TypeVar("T")
Error = TypeVar("Error", bound=RatioctlError)

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds; doubled after each attempt
BLOCK = 4 * 2**20  # bytes that are fetched of an archive at once
READERS = 16  # objects that are fetched at once while others are scored

_PERMANENT = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, TypeError, MemoryError),
)
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ProfileNotFound",
)
_SKEWED = ("RequestTimeTooSkewed", "RequestExpired")
_WITH_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss")


class RemoteError(Exception):
    """What went wrong with a URL, as a clause, and what to do about it."""

    def __init__(self, reason: str, next_step: str = "", *, missing: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.next_step, self.missing = reason, next_step, missing

    def of(self, kind: type[Error], url: str) -> Error:
        """As an error of `ratioctl.errors` about the URL."""
        return kind(shown(url), self.reason, self.next_step)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing.

    Attributes:
        name: its path below the listed folder.
        size: in bytes, if known.
        ranges: whether the server is expected to answer requests for a part of it.
    """

    name: str
    url: str
    folder: bool
    size: int | None
    ranges: bool = True


def is_url(path: object) -> bool:
    """Whether it is a URL of fsspec's; a drive letter is none."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises UsageError, RemoteError."""
    fsspec = optional.load("fsspec", shown(url))
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        step = "Install that library in the environment of ratioctl."
        raise RemoteError(f"needs another library: {error}", step) from None
    except ValueError as error:
        raise RemoteError(f"is no URL that fsspec knows: {error}", "Check its beginning.") from None
    except Exception as error:
        raise _described(error, url) from None


def info(url: str) -> Entry | None:
    """What a URL names, None where there is nothing. Raises RemoteError."""
    fs, path = filesystem(url)
    try:
        found = _retried(lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        _check_bucket(fs, path, url)
        return None
    except Exception as error:
        raise _described(error, url) from None
    web = _protocol(fs) in ("http", "https")
    folder = found.get("type") == "directory" or (web and url.endswith("/"))
    ranges = not web or bool(found.get("partial"))
    return Entry(name="", url=url, folder=folder, size=None if folder else _size(found), ranges=ranges)


def listing(url: str) -> Iterator[Entry]:
    """Files below a URL and folders in it, each folder's entries sorted by name; hidden names included.

    One folder's entries are held at a time, on each level. Raises RemoteError.
    """
    fs, root = filesystem(url)
    root = root.rstrip("/")
    stack = [_entries(fs, root, root, url)]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            continue
        entry, path = found
        yield entry
        if entry.folder:
            stack.append(_entries(fs, path, root, url))


def _entries(fs: Any, folder: str, root: str, url: str) -> Iterator[tuple[Entry, str]]:
    def listed() -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return fs.ls(folder, detail=True)

    try:
        found = _retried(listed)
    except Exception as error:
        raise _described(error, url) from None
    base = url.rstrip("/")
    for one in sorted(found, key=lambda one: str(one["name"]).rstrip("/")):
        path = str(one["name"]).rstrip("/")
        if not path.startswith(folder.rstrip("/") + "/"):  # the folder itself, or a link out of it
            continue
        name = path[len(root) + 1 :]
        is_folder = one.get("type") == "directory"
        yield Entry(name=name, url=f"{base}/{name}", folder=is_folder, size=_size(one)), path


def read(url: str, size: int | None = None, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of an object, or from `start` to `end`; `size` is that of the object where it is known.

    Raises RemoteError; an answer that is shorter or longer than it must be is tried again.
    """
    fs, path = filesystem(url)
    expected = size if start is None or end is None else end - start

    def fetch() -> bytes:
        data: bytes = fs.cat_file(path, start=start, end=end)
        if expected is not None and len(data) != expected:
            raise OSError(f"{len(data):,} of {expected:,} bytes arrived")
        return data

    try:
        return _retried(fetch)
    except Exception as error:
        raise _described(error, url) from None


def open_stream(url: str) -> BinaryIO:
    """An object as a stream that can seek, read in blocks. Raises RemoteError, also while it is read."""
    found = info(url)
    if found is None:
        raise RemoteError("does not exist", "Check the spelling.", missing=True)
    if found.size is None or not found.ranges:  # read once, and kept in a temporary file
        fs, path = filesystem(url)
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - it is what is returned
        try:
            with fs.open(path, "rb") as stream:
                shutil.copyfileobj(stream, copy)
        except Exception as error:
            copy.close()
            raise _described(error, url) from None
        copy.seek(0)
        return typing.cast(BinaryIO, copy)
    return io.BufferedReader(_Ranges(url, found.size), BLOCK)


class _Ranges(io.RawIOBase):
    """An object of known size, read in ranges."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.place = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        end = min(self.place + len(view), self.size)
        if self.place >= end:
            return 0
        try:
            data = read(self.url, start=self.place, end=end)
        except RemoteError as error:
            raise OSError(error.reason) from None
        view[: len(data)] = data
        self.place = end
        return len(data)


def write(url: str, data: bytes) -> None:
    """Replace an object; it appears whole. Raises RemoteError."""
    fs, path = filesystem(url)

    def put() -> None:
        fs.pipe_file(path, data)
        fs.invalidate_cache()
        if _size(fs.info(path)) not in (None, len(data)):
            raise OSError("another number of bytes was stored")

    try:
        _retried(put)
    except Exception as error:
        raise _described(error, url, "written") from None


def put(file: str, url: str, size: int) -> None:
    """Replace an object by a local file of `size` bytes; it appears whole. Raises RemoteError."""
    fs, path = filesystem(url)

    def copy() -> None:
        fs.put_file(file, path)
        fs.invalidate_cache()
        if _size(fs.info(path)) not in (None, size):
            raise OSError("another number of bytes was stored")

    try:
        _retried(copy)
    except Exception as error:
        raise _described(error, url, "written") from None


def delete(url: str) -> None:
    """Remove an object or a folder with what is in it, if it is there. Raises RemoteError."""
    fs, path = filesystem(url)
    try:
        fs.invalidate_cache()
        if _retried(lambda: fs.exists(path)):
            _retried(lambda: fs.rm(path, recursive=True))
    except FileNotFoundError:
        pass
    except Exception as error:
        raise _described(error, url, "removed") from None


def _retried(call: Callable[[], T]) -> T:
    """`call()`, again after failures that may pass."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            if _is_permanent(error):
                raise
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
        time.sleep(wait * random.uniform(0.5, 1))
    return call()


def _is_permanent(error: Exception) -> bool:
    names = {type(cause).__name__ for cause in _causes(error)}
    status = getattr(error, "status", None)
    return (
        isinstance(error, _PERMANENT)
        or bool(names & set(_NO_CREDENTIALS))
        or _is_skewed(error)
        or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))
    )


def _is_skewed(error: Exception) -> bool:
    return any(name in str(cause) for cause in _causes(error) for name in _SKEWED)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _described(error: Exception, url: str, what: str = "read") -> RemoteError:
    """Any exception of fsspec and its libraries."""
    if isinstance(error, RemoteError):
        return error
    names = {type(cause).__name__ for cause in _causes(error)}
    text = " ".join(str(error).split())
    if names & set(_NO_CREDENTIALS):
        step = "Set them as the library of the protocol reads them, for S3 for example AWS_PROFILE."
        return RemoteError(f"cannot be {what}: there are no credentials for it", step)
    if _is_skewed(error):
        step = "Set the clock of this machine."
        return RemoteError(f"cannot be {what}: this machine's clock and the server's disagree", step)
    if "bucket does not exist" in text or "NoSuchBucket" in text:
        step = "Check its spelling, and the endpoint of the credentials."
        return RemoteError(f"cannot be {what}: its bucket does not exist", step, missing=True)
    if isinstance(error, FileNotFoundError):
        return RemoteError("does not exist", "Check the spelling of the URL.", missing=True)
    if isinstance(error, PermissionError):
        return RemoteError(f"may not be {what}: access is denied", "Check the credentials and their rights.")
    detail = shown(text)[:200] or type(error).__name__
    tried = "" if _is_permanent(error) else f" after {ATTEMPTS} attempts"
    return RemoteError(f"cannot be {what}{tried}: {detail}", "Check the server and the network.")


def _check_bucket(fs: Any, path: str, url: str) -> None:
    """Raise RemoteError where the bucket of a missing object does not exist."""
    if _protocol(fs) not in _WITH_BUCKETS or "/" not in path.strip("/"):
        return
    try:
        there = _retried(lambda: fs.exists(path.strip("/").split("/")[0]))
    except Exception as error:
        raise _described(error, url) from None
    if not there:
        raise _described(FileNotFoundError("bucket does not exist"), url)


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])


def _size(found: dict[str, Any]) -> int | None:
    size = found.get("size")
    return int(size) if isinstance(size, int | float) else None
