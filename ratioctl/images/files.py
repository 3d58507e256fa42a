"""Image files: which names are images, and reading their bytes within limits."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from ratioctl.errors import ImageError
from ratioctl.utils import remote
from ratioctl.utils.text import shown

FORMATS = "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM/PGM/PBM, DICOM"
SUFFIXES = frozenset(
    (
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".dcm",
    )
)
FOREIGN_SUFFIXES = frozenset((".heic", ".heif", ".avif", ".jxl", ".jp2"))
MAX_BYTES = 256 * 2**20  # of one encoded image, in a file or in an archive


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES. Never waits for a FIFO and never reads a device.

    Raises:
        ImageError: missing, not a regular file, not readable, empty or too large; the reason says which.
    """
    name = shown(os.fspath(path))
    if remote.is_url(path):
        return read_url(os.fspath(path))
    try:
        _refuse_special(os.stat(path).st_mode, name)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
        )
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _refuse_special(status.st_mode, name)  # it may have been replaced between stat and open
            if status.st_size > MAX_BYTES:
                raise too_long(name)
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise unreadable(name, e) from e
    except ValueError as e:  # a NUL byte in the name
        raise ImageError(name, "is not a valid file name") from e
    return sized(data, name)


def read_url(url: str, size: int | None = None) -> bytes:
    """The bytes of a remote image of at most MAX_BYTES; `size` is that in a listing. Raises ImageError."""
    if (size or 0) > MAX_BYTES:
        raise too_long(shown(url))
    try:
        return sized(remote.read(url, size), shown(url))
    except remote.RemoteError as error:
        raise error.of(ImageError, url) from None


def open_binary(path: str) -> BinaryIO:
    """A file or URL as a stream that can seek. Raises OSError."""
    if not remote.is_url(path):
        return open(path, "rb", buffering=2**18)
    try:
        return remote.open_stream(path)
    except remote.RemoteError as error:
        raise OSError(error.reason) from None


def packed_size(path: str) -> int:
    """Bytes of a file or URL; 0 where a server does not say it. Raises OSError."""
    if not remote.is_url(path):
        return os.path.getsize(path)
    try:
        found = remote.info(path)
    except remote.RemoteError as error:
        raise OSError(error.reason) from None
    return (found.size if found else None) or 0


def _refuse_special(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "is a folder, not an image"),
        (stat.S_ISFIFO, "is a FIFO, not a file"),
        (stat.S_ISSOCK, "is a socket, not a file"),
        (stat.S_ISCHR, "is a device, not a file"),
        (stat.S_ISBLK, "is a device, not a file"),
    )
    raise ImageError(name, next((text for test, text in kinds if test(mode)), "is not a regular file"))


def unreadable(name: str, e: OSError) -> ImageError:
    known = {
        errno.ENOENT: ("does not exist", "Check the spelling of the path."),
        errno.ENOTDIR: ("does not exist", "Check the spelling of the path."),
        errno.EACCES: ("may not be read: no permission", "Change its permissions or run as its owner."),
        errno.EPERM: ("may not be read: no permission", "Change its permissions or run as its owner."),
        errno.ELOOP: ("is a symbolic link that leads back to itself", ""),
        errno.ENAMETOOLONG: ("does not exist: the name is too long", ""),
        errno.EMFILE: ("cannot be opened: too many open files", "Raise the limit with `ulimit -n`."),
    }
    reason, step = known.get(e.errno or 0, (f"cannot be read: {e.strerror or e}", ""))
    return ImageError(name, reason, step)


def too_long(name: str) -> ImageError:
    return ImageError(name, f"is larger than {MAX_BYTES >> 20} MiB, the limit for one image file")


def sized(data: bytes, name: str) -> bytes:
    if not data:
        raise ImageError(name, "is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise too_long(name)
    return data


def suffix_kind(name: str) -> str:
    base = name.rsplit("/", 1)[-1].lower()
    suffix = base[base.rfind(".") :] if "." in base else ""
    return "image" if suffix in SUFFIXES or suffix in FOREIGN_SUFFIXES else "other"


def is_hidden(name: str) -> bool:
    return any((p.startswith(".") and p not in (".", "..")) or p == "__MACOSX" for p in name.split("/"))
