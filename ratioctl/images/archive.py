"""Members of tar and zip archives, streamed; nothing is unpacked to disk."""

from __future__ import annotations

import array
import bz2
import contextlib
import functools
import gzip
import io
import logging
import lzma
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ratioctl.errors import ImageError
from ratioctl.images import files
from ratioctl.images.files import (
    is_hidden,
    open_binary,
    packed_size,
    read_file,
    read_url,
    sized,
    suffix_kind,
    too_long,
)
from ratioctl.utils.remote import is_url
from ratioctl.utils.text import readable, shown

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
MAX_XZ_MEMORY = 256 * 2**20
MAX_RATIO, FREE_BYTES = 200, 2**30  # an archive may unpack to 200 times its size, or to 1 GiB
MAX_TAR_HEADER = 2**20  # bytes of one extended header (a long name); honest ones stay below some kilobytes


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry below a folder or archive. `name` is its POSIX path in there."""

    name: str
    kind: str = "image"  # or "folder", "other", "closed" (a folder that cannot be listed)
    file: str | None = None  # where it lies on disk, or its URL
    size: int | None = None  # in bytes, of a URL whose listing states it
    data: bytes | None = field(default=None, repr=False)
    error: str = ""  # why it cannot be read, known already

    def read(self, name: str) -> bytes:
        if self.error:
            raise ImageError(name, self.error)
        if self.data is not None:
            return sized(self.data, name)
        assert self.file is not None, "an entry that was only listed"
        try:
            return read_url(self.file, self.size) if is_url(self.file) else read_file(self.file)
        except ImageError as e:
            raise ImageError(name, e.reason, e.next_step) from e


class DamagedArchiveError(Exception):
    """An archive that cannot be read to its end: damaged, unless `refused` for a limit; with the reason."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fault = f"is {'refused' if refused else 'a damaged archive'}: {reason}"
        self.next_step = "Unpack it yourself if you trust it." if refused else "Fetch or pack it again."


def is_archive(path: str | os.PathLike[str]) -> bool:
    """True for the name of a .tar, .tar.gz, .tar.xz, .tar.bz2 (or .tgz, .txz, .tbz2) or .zip file."""
    return os.fspath(path).lower().endswith(ARCHIVE_SUFFIXES)


def archive_members(path: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The entries, streamed; a note is logged at the end where several have the same name."""
    reader = _zip_members if path.lower().endswith(".zip") else _tar_members
    hashes = array.array("q")  # eight bytes for each name
    for member in reader(path, wanted):
        if member.kind != "folder":
            hashes.append(hash(member.name))
        yield member
    repeated = len(hashes) - len(np.unique(np.frombuffer(hashes, np.int64))) if hashes else 0
    if repeated:
        _note_repeated(path, repeated)


@functools.cache
def _note_repeated(path: str, repeated: int) -> None:
    """Once in a process: archives are read more than once."""
    logging.getLogger(__name__).warning(
        "%s: repeated file names: %d; every copy is read, where unpacking would keep the last",
        shown(path),
        repeated,
    )


@contextlib.contextmanager
def _opened_tar(path: str) -> Iterator[BinaryIO]:
    with open_binary(path) as file:
        magic = file.read(6)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            yield _buffered(gzip.GzipFile(fileobj=file))
        elif magic == b"\xfd7zXZ\0":
            yield _buffered(_Xz(file))
        elif magic[:3] == b"BZh":
            yield _buffered(bz2.BZ2File(file))
        else:
            yield file


def _buffered(raw: io.BufferedIOBase | io.RawIOBase) -> BinaryIO:
    # The decompressors' own reads cost more than a header's parsing.
    return io.BufferedReader(raw, 2**18)


class _Xz(io.RawIOBase):
    """An .xz file, decompressed within a memory limit, which `lzma.open` does not offer.

    A header may claim a dictionary of 4 GiB; that of `xz -9` is 64 MiB.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # not closed here
        self._decompressor: lzma.LZMADecompressor | None = None
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while True:
            self._input = self._input or self._file.read(2**16)
            if self._decompressor is None:  # streams may be concatenated, with zeros between them
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    self._input = self._file.read(2**16)
                    if not self._input:
                        return 0
                    continue
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
            elif not self._input and self._decompressor.needs_input:
                raise EOFError("compressed data ended before the end of the stream")
            try:
                data = self._decompressor.decompress(self._input, len(view))
            except lzma.LZMAError as e:
                if "Memory usage" not in str(e):
                    raise
                reason = f"it needs more than {MAX_XZ_MEMORY >> 20} MiB of memory to unpack"
                raise DamagedArchiveError(reason, refused=True) from None
            self._input = self._decompressor.unused_data
            if self._decompressor.eof:
                self._decompressor = None
            if data:
                view[: len(data)] = data
                return len(data)


class _Limited:
    """Counts what is unpacked from an archive. Raises DamagedArchiveError for a decompression bomb."""

    def __init__(self, path: str) -> None:
        self.packed, self.unpacked = packed_size(path), 0

    def add(self, size: int) -> None:
        self.unpacked += size
        if self.unpacked > max(FREE_BYTES, MAX_RATIO * self.packed):
            raise DamagedArchiveError(f"it unpacks to more than {MAX_RATIO} times its size", refused=True)


def _tar_members(path: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Entries of a tar in the order of the archive, streamed: memory does not grow with their number.

    Unless `wanted(name)`, a member is only listed. The standard library's `tarfile` takes a damaged header
    for the end, keeps every member in memory, reads extended headers of any size whole, and costs more than
    decoding a small image does.

    Raises:
        DamagedArchiveError: the archive breaks off or holds a damaged header.
    """
    try:
        with _opened_tar(path) as raw:
            long_name, long_size = "", -1  # from extended headers, for the member that follows
            limited = _Limited(path)
            for name, size, kind in _tar_headers(raw):
                if kind in b"LKxXg":
                    if size > MAX_TAR_HEADER:
                        raise DamagedArchiveError(f"it has a header of {size:,} bytes")
                    extended = _exactly(raw, size)
                    _skip(raw, -size % 512)
                    if kind == b"L":
                        long_name = _tar_text(extended)
                    elif kind in b"xX":
                        records = _pax_records(extended)
                        long_name = records.get("path", long_name)
                        long_size = int(records.get("size", long_size))
                        if any(key.startswith("GNU.sparse.") for key in records):
                            raise DamagedArchiveError("it holds sparse files; pack it without --sparse")
                    continue
                size = size if long_size < 0 else long_size
                name, long_name, long_size = _member_name(long_name or name), "", -1
                size = 0 if kind in b"123456" else size  # links, devices and folders have no data
                limited.add(size)
                image = bool(name) and not is_hidden(name) and suffix_kind(name) == "image"
                data = None
                if image and kind in b"07\0" and size <= files.MAX_BYTES and wanted(name):
                    data = _exactly(raw, size)
                    _skip(raw, -size % 512)
                else:
                    _skip(raw, size + -size % 512)
                if not name or is_hidden(name):
                    continue
                if kind == b"5":
                    yield Member(name=name, kind="folder")
                elif not image:
                    yield Member(name=name, kind="other")
                elif kind in b"12":
                    yield Member(
                        name=name, error="is a link inside the archive, and links are not followed there"
                    )
                elif kind not in b"07\0":
                    yield Member(name=name, error="is not a regular file")
                elif size > files.MAX_BYTES:
                    yield Member(name=name, error=too_long(name).reason)
                else:
                    yield Member(name=name, data=data)
    except (DamagedArchiveError, GeneratorExit, MemoryError):
        raise
    except OSError as e:
        raise DamagedArchiveError(shown(e.strerror or str(e))) from e
    except Exception as e:  # zlib, lzma and number parsing raise many kinds on damaged input
        raise DamagedArchiveError(shown(str(e) or type(e).__name__)) from e


def _tar_headers(raw: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """The headers to the end of the file: archives may be concatenated, with zero blocks between them."""
    ended = False
    while block := raw.read(512):
        if not any(block):
            ended = True
            continue
        if len(block) < 512:
            raise DamagedArchiveError("it is truncated")
        try:
            header = _tar_header(block)
        except (DamagedArchiveError, ValueError):
            if ended:
                raise DamagedArchiveError("there are other data after its end") from None
            raise
        ended = False
        yield header
    if not ended:
        raise DamagedArchiveError("it is truncated")


def _tar_header(block: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a 512-byte header in the ustar, GNU or old format. Raises where it is damaged."""
    if sum(block) - sum(block[148:156]) + 8 * 32 != int(block[148:156].strip(b"\0 ") or b"0", 8):
        raise DamagedArchiveError("a header does not match its checksum")
    if block[124] & 0x80:  # sizes of 8 GiB and more are binary
        size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else -1
    else:
        size = int(block[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
    if size < 0:
        raise DamagedArchiveError("a header states a negative size")
    name, kind = _tar_text(block[:100]), block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = _tar_text(block[345:500]) + "/" + name
    if kind in b"0\0" and name.endswith("/"):
        kind = b"5"  # how the oldest format marks a folder
    return name, size, kind


def _tar_text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _exactly(raw: BinaryIO, size: int) -> bytes:
    data = raw.read(size)
    if len(data) < size:
        raise DamagedArchiveError("it is truncated")
    return data


def _skip(raw: BinaryIO, size: int) -> None:
    while size > 0:
        size -= len(_exactly(raw, min(size, 2**20)))


def _pax_records(block: bytes) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of an extended header."""
    records = {}
    block = block.rstrip(b"\0")
    at = 0
    while at < len(block):
        space = block.index(b" ", at, at + 20)
        end = at + int(block[at:space])
        if not space < end <= len(block):
            raise DamagedArchiveError("an extended header is damaged")
        key, _, value = block[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _zip_members(path: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Entries of a zip, sorted by name; otherwise like `_tar_members`."""
    try:
        with open_binary(path) as file, zipfile.ZipFile(file) as archive:
            _refuse_overlaps(archive.infolist())
            limited = _Limited(path)
            for info in sorted(archive.infolist(), key=lambda i: i.filename):
                name = _member_name(info.filename.replace("\\", "/"))
                if not name or is_hidden(name):
                    continue
                if info.is_dir():
                    yield Member(name=name, kind="folder")
                    continue
                kind = suffix_kind(name)
                if kind != "image" or not wanted(name):
                    yield Member(name=name, kind=kind)
                else:
                    limited.add(info.file_size if info.file_size <= files.MAX_BYTES else 0)
                    yield _zip_member(archive, info, name)
    except (DamagedArchiveError, GeneratorExit, MemoryError):
        raise
    except OSError as e:
        raise DamagedArchiveError(shown(e.strerror or str(e))) from e
    except Exception as e:
        raise DamagedArchiveError(shown(str(e) or type(e).__name__)) from e


def _refuse_overlaps(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Entries that share bytes make a small file unpack to any size; no honest tool writes them."""
    end = 0
    for info in sorted(entries, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise DamagedArchiveError("its entries overlap", refused=True)
        end = info.header_offset + 30 + info.compress_size  # at least: the name and more lie between


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Member:
    if info.flag_bits & 0x1:
        return Member(name=name, error="is encrypted")
    if stat.S_ISLNK(info.external_attr >> 16):
        return Member(name=name, error="is a link inside the archive, and links are not followed there")
    if info.file_size > files.MAX_BYTES:
        return Member(name=name, error=too_long(name).reason)
    try:
        with archive.open(info) as file:
            return Member(name=name, data=file.read(files.MAX_BYTES + 1))
    except MemoryError:
        raise
    except Exception as e:
        return Member(
            name=name, error=f"is damaged inside the archive ({shown(str(e) or type(e).__name__)[:200]})"
        )


def _member_name(name: str) -> str:
    """A member's name as a relative POSIX path. It is only displayed, never opened."""
    return readable("/".join(p for p in name.split("/") if p not in ("", ".")))
