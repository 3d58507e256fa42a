"""Images that files, folders, archives and lists of paths name, streamed."""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from ratioctl.errors import SourceError
from ratioctl.images.archive import DamagedArchiveError, Member, archive_members, is_archive
from ratioctl.images.files import FORMATS, is_hidden, suffix_kind
from ratioctl.images.parquet import is_parquet, parquet_members
from ratioctl.utils.remote import RemoteError, is_url
from ratioctl.utils.remote import info as remote_info
from ratioctl.utils.remote import listing as remote_listing
from ratioctl.utils.text import nfc, readable, shown


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image to be read: its name in rows, and access to its bytes (from any thread, repeatedly)."""

    path: str  # the argument as given, joined with the POSIX relative path; valid Unicode
    member: Member = field(repr=False)
    index: int | None = None  # its place among the images of a run, where they are numbered

    def read(self) -> bytes:
        """The encoded bytes. Raises ImageError."""
        return self.member.read(self.path)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read())


def walk(paths: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None = None) -> Iterator[Item]:
    """The images that files, folders, archives and `-` (a list of paths on stdin) name, streamed.

    A file given by name is always an item. Folders are walked recursively in sorted order, for names with an
    image suffix (a warning counts the others), hidden ones left out; tars are streamed in the archive's
    order, zips sorted; `a.tar:dir` selects a part of an archive. The rows of a Parquet file with a column of
    images are items, too. What cannot be read (a folder without permission, the rest of a damaged archive)
    is an item whose `read()` raises ImageError. Lists on stdin are separated by newlines, or by NUL bytes.

    Args:
        paths: the arguments; checked at once, before the first item.
        stdin: where `-` reads from; the process's standard input by default.
    Raises:
        SourceError: an argument does not exist, or is a folder or archive without images.
    """
    arguments = [os.fspath(p) for p in paths]
    begun: dict[str, Iterator[Item]] = {}  # remote listings, which are not read twice
    for argument in arguments:
        if argument == "-":
            continue
        try:
            if _locate(argument) is None:
                raise SourceError(shown(argument), "does not exist", "Check the spelling of the path.")
            items = _expand(argument)
            first = next(items, None)
        except RemoteError as error:
            raise error.of(SourceError, argument) from None
        if first is None:
            raise SourceError(shown(argument), "holds no images", f"Images may be {FORMATS}.")
        if is_url(argument):
            begun[argument] = itertools.chain([first], items)
        else:
            items.close()
    return _walk(arguments, stdin, begun)


def _walk(arguments: list[str], stdin: BinaryIO | None, begun: dict[str, Iterator[Item]]) -> Iterator[Item]:
    for argument in arguments:
        if argument != "-":
            yield from _named(argument, begun.pop(argument, None))
            continue
        for line in _lines(stdin if stdin is not None else sys.stdin.buffer):
            listed = os.fsdecode(line)
            if listed.endswith("\r") and not os.path.lexists(listed):
                listed = listed[:-1]
            found = False
            for item in _named(listed):
                found = True
                yield item
            if not found:
                yield _broken(listed, "holds no images")


def _named(argument: str, begun: Iterator[Item] | None = None) -> Iterator[Item]:
    """What an argument names; a remote listing that fails ends in an item with the reason."""
    try:
        yield from _expand(argument) if begun is None else begun
    except RemoteError as error:
        yield _broken(argument, error.reason)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The entries of a list of paths, separated by NUL bytes if there are any, else by newlines."""
    read = getattr(stream, "read1", stream.read)
    rest, mark = b"", b""
    while chunk := read(2**16):
        rest += chunk
        mark = mark or (b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b"")
        if mark:
            *whole, rest = rest.split(mark)
            yield from (entry for entry in whole if entry)
    if rest:
        yield rest


def _locate(argument: str) -> tuple[str, str] | None:
    """(existing path, part of it) for `path` or `archive:part`; None where nothing exists."""
    try:
        if _exists(argument):
            return argument, ""
        left, colon, right = argument.rpartition(":")
        while colon:
            if is_archive(left) and is_file(left) and right.strip("/"):
                return left, argument[len(left) + 1 :].strip("/")
            left, colon, right = left.rpartition(":")
    except ValueError:  # a NUL byte
        pass
    return None


def is_collection(argument: str) -> bool:
    """Whether a path or URL names an archive, a part of one, or a table of images. Raises SourceError."""
    try:
        located = None if argument == "-" else _locate(argument)
        return located is not None and (
            (is_archive(located[0]) or is_parquet(located[0])) and is_file(located[0])
        )
    except RemoteError as error:
        raise error.of(SourceError, argument) from None


def _exists(path: str) -> bool:
    return remote_info(path) is not None if is_url(path) else os.path.lexists(path)


def is_file(path: str) -> bool:
    """Whether a path or URL names a file. Raises RemoteError."""
    if not is_url(path):
        return os.path.isfile(path)
    found = remote_info(path)
    return found is not None and not found.folder


def is_folder(path: str) -> bool:
    """Whether a path or URL names a folder. Raises RemoteError."""
    if not is_url(path):
        return os.path.isdir(path)
    found = remote_info(path)
    return found is not None and found.folder


def _broken(path: str, reason: str) -> Item:
    return Item(path=readable(path), member=Member(name="", error=reason))


@dataclass
class _Others:
    """The files of a folder or archive whose names do not end like those of images."""

    count: int = 0
    first: str = ""

    def add(self, member: Member) -> None:
        if member.kind == "other" and not is_hidden(member.name):
            self.first = self.first or member.name
            self.count += 1

    def tell(self, path: str) -> None:
        """Warn: in a folder of uploads such a file may be an image."""
        if self.count:
            files = "1 file" if self.count == 1 else f"{self.count:,} files"
            log = logging.getLogger(__name__)
            log.warning("%s: %s without the suffix of an image left out (%s)", path, files, shown(self.first))


def _expand(argument: str) -> Generator[Item, None, None]:
    located = _locate(argument)
    if located is None:
        yield _broken(argument, "does not exist")
        return
    path, part = located
    if is_folder(path):
        joint = path if path.endswith("/") else path + "/"
        others = _Others()
        for member in remote_members(path) if is_url(path) else folder_members(path):
            if member.kind in ("image", "closed"):
                yield Item(path=readable(joint + member.name), member=member)
            others.add(member)
        others.tell(path)
    elif is_archive(path) and is_file(path):
        part = nfc(part)
        inside = (lambda n: (nfc(n) + "/").startswith(part + "/")) if part else (lambda n: True)
        try:
            others = _Others()
            for member in archive_members(path, inside):
                if member.kind == "image" and inside(member.name):
                    yield Item(path=f"{readable(path)}:{member.name}", member=member)
                elif inside(member.name):
                    others.add(member)
            others.tell(path)
        except DamagedArchiveError as e:
            yield _broken(path, f"{e.fault}; not read to its end")
    elif is_parquet(path) and is_file(path):
        try:
            for member in parquet_members(path):
                yield Item(path=f"{readable(path)}:{member.name}", member=member)
        except DamagedArchiveError as e:
            yield _broken(path, f"cannot be read as a table of images: {e.reason}")
    else:
        yield Item(path=readable(path), member=Member(name=path, file=path))


def remote_members(root: str) -> Iterator[Member]:
    """`folder_members` of a URL. Raises RemoteError."""
    for entry in remote_listing(root):
        if is_hidden(entry.name):
            continue
        kind = "folder" if entry.folder else suffix_kind(entry.name)
        yield Member(name=entry.name, kind=kind, file=entry.url, size=entry.size)


def folder_members(root: str) -> Iterator[Member]:
    """Entries below `root`, sorted by name within each folder, files and folders in one order.

    Symbolic links to folders are followed, each target once and never into a folder that is being walked, so
    loops end. A folder that cannot be listed is an entry with an error.
    """
    linked: set[tuple[int, int]] = set()

    def visit(
        folder: str, prefix: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[Member, tuple[str, str, frozenset[tuple[int, int]]] | None]]:
        """Each entry, and for a folder the arguments of the visit to it."""
        unlisted = "is a folder that cannot be listed: "
        names: list[str] = []
        others: dict[str, os.DirEntry[str]] = {}  # of a million plain files only the names are kept
        try:
            with os.scandir(folder) as scan:
                for entry in scan:
                    if is_hidden(entry.name):
                        continue
                    names.append(entry.name)
                    if not entry.is_file(follow_symlinks=False):
                        others[entry.name] = entry
        except OSError as e:
            name = prefix.rstrip("/") or "."
            yield Member(name=name, kind="closed", error=f"{unlisted}{e.strerror}"), None
            return
        names.sort()
        for name in names:
            found, path = others.get(name), os.path.join(folder, name)
            try:
                is_folder = found is not None and found.is_dir()
            except OSError:
                is_folder = False
            if found is None or not is_folder:
                yield Member(name=prefix + name, kind=suffix_kind(name), file=path), None
                continue
            here = above
            try:
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                if found.is_symlink():
                    if identity in above or identity in linked:
                        continue
                    linked.add(identity)
                here = above | {identity}
            except OSError as e:
                yield Member(name=prefix + name, kind="closed", error=f"{unlisted}{e.strerror}"), None
                continue
            yield Member(name=prefix + name, kind="folder"), (path, prefix + name + "/", here)

    status = os.stat(root)
    # Not recursive: paths may be deeper than Python's stack.
    stack = [visit(root, "", frozenset({(status.st_dev, status.st_ino)}))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            continue
        member, inner = found
        yield member
        if inner is not None:
            stack.append(visit(*inner))
