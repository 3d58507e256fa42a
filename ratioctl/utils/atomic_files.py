"""Durable writing: files are complete or absent, one writer at a time, errors as `RatioctlError`."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from ratioctl.errors import DiskError, OutputError

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})
_GONE = frozenset({errno.ENOENT, errno.ESTALE})
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: under a temporary name beside it, synced, renamed.

    Raises:
        DiskError: the disk is full or failed.
        OutputError: the path cannot be written.
    """
    write_files({path: data})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all are staged and synced before the first is renamed.

    If the disk has no room for one of them, the old ones stay. They are renamed in the order given.

    Raises:
        as `write_file`.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in contents.items():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp~")
            with writing(path, creating=True):
                sweep(path.parent, glob.escape(path.name))
                staged.append((temporary, path))
                write_synced(temporary, data)
        for temporary, path in staged:
            with writing(path):
                os.replace(temporary, path)
        for folder in dict.fromkeys(path.parent for path in contents):
            sync_folder(folder)
    except BaseException:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, name: str) -> None:
    """Remove temporary files of `name` (a pattern) in `folder` whose writers were killed."""
    for left in folder.glob(f".{name}.*.tmp~"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not alive(int(number)):
            with contextlib.suppress(OSError):
                left.unlink()


def alive(process: int) -> bool:
    """Whether a process with that number runs on this machine; true if that cannot be determined."""
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process; not a process number
        return True
    return True


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk; an error leaves a partial one under `path`.

    An existing entry is removed first, so nothing is written through a symbolic link.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; raises OutputError or DiskError."""
    with writing(folder, creating=True):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def streaming(path: Path) -> Iterator[BinaryIO]:
    """A stream whose file replaces `path` once it is complete.

    Until then, and after an error, the data are in `partial(path)` and the old file keeps its name. Pipes and
    devices are written directly.

    Raises:
        DiskError, OutputError: as `write_file`; also if its folder is missing, or if another process began to
            write the same file.
    """
    with writing(path, creating=True):
        if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
            with path.open("wb") as stream:
                yield stream
            return
        unfinished = partial(path)
        if not unfinished.parent.is_dir():
            raise OutputError(path, "cannot be written: there is no such folder", "Create it first.")
        unfinished.unlink(missing_ok=True)  # nothing is written through a symbolic link
        with unfinished.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not unfinished.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            if not (unfinished.exists() and os.path.samestat(os.fstat(stream.fileno()), unfinished.stat())):
                raise OutputError(path, "was taken over by another process that writes it", "Try again.")
        os.replace(unfinished, path.resolve())
        sync_folder(path.resolve().parent)


def partial(path: Path) -> Path:
    """The path that `streaming` writes to: beside the file, or beside the target of a link."""
    return path.resolve().with_name(path.name + ".partial")


@contextlib.contextmanager
def writing(thing: Path, *, creating: bool = False) -> Iterator[None]:
    """Convert operating system errors into DiskError (exit code 6) or OutputError (exit code 2).

    The caller has made the folder or seen it before: if it is gone, it was removed meanwhile, which is a
    DiskError. With `creating`, a folder that is there and takes no new file (/proc) is an OutputError.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if error.filename and not _is_temporary(error.filename) else thing
        reason = (error.strerror or "failed").lower()
        if error.errno in DISK_ERRORS:
            raise DiskError(
                named, f"cannot be written: {reason}", "Free some space, or write elsewhere."
            ) from None
        if creating and error.errno in _GONE and Path(os.fsdecode(named)).parent.is_dir():
            reason = "its folder accepts no new files"
        elif error.errno in _GONE:
            raise DiskError(
                _topmost_missing(Path(os.fsdecode(named))),
                "disappeared while it was being written",
                "Put it back, or write elsewhere.",
            ) from None
        raise OutputError(
            named, f"cannot be written: {reason}", "Check the path and its permissions."
        ) from None


def _topmost_missing(path: Path) -> Path:
    """The topmost missing folder above `path`, or `path` itself."""
    while path.parent != path and not os.path.exists(path.parent):  # False where a network folder is stale
        path = path.parent
    return path


def _is_temporary(name: str | bytes) -> bool:
    return os.fsdecode(name).endswith(("~", ".partial")) or ".partial/" in os.fsdecode(name)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` against other writers; the system releases it if the process dies.

    Without support for locks (some network file systems) two writers are not detected.

    Raises:
        OutputError: another process holds it; the message names it.
    """
    path = folder / ".lock"
    descriptor = _locked(path)
    if descriptor is None:
        yield
        return
    try:
        os.ftruncate(descriptor, 0)
        program = Path(sys.argv[0]).name if sys.argv else "python"
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk must not prevent a change that frees space
            os.write(
                descriptor,
                f"process {os.getpid()} ({program}) on {socket.gethostname()} since {since}".encode(),
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """The descriptor of the lock file, now held; None without support for locks. Raises as `lock`."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise OutputError(
                path.parent, f"is being written by {holder}", "Wait for it to end, then try again."
            ) from None
        except FileNotFoundError:  # removed meanwhile
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # its last holder removed it between the two steps
