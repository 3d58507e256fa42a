"""Images that files, folders, archives and lists of paths name, streamed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from ratioctl.errors import SourceError
from ratioctl.images.archive import DamagedArchiveError, Member, archive_members, is_archive
from ratioctl.images.files import FORMATS, is_hidden, suffix_kind
from ratioctl.utils.text import nfc, readable, shown


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image to be read: its name in rows, and access to its bytes (from any thread, repeatedly)."""

    path: str  # the argument as given, joined with the POSIX relative path; valid Unicode
    member: Member = field(repr=False)

    def read(self) -> bytes:
        """The encoded bytes. Raises ImageError."""
        return self.member.read(self.path)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read())


def walk(paths: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None = None) -> Iterator[Item]:
    """The images that files, folders, archives and `-` (a list of paths on stdin) name, streamed.

    A file given by name is always an item. Folders are walked recursively in sorted order, for names with an
    image suffix, hidden ones left out; tars are streamed in the archive's order, zips sorted; `a.tar:dir`
    selects a part of an archive. What cannot be read (a folder without permission, the rest of a damaged
    archive) is an item whose `read()` raises ImageError. Lists on stdin are separated by newlines, or
    by NUL bytes.

    Args:
        paths: the arguments; checked at once, before the first item.
        stdin: where `-` reads from; the process's standard input by default.
    Raises:
        SourceError: an argument does not exist, or is a folder or archive without images.
    """
    arguments = [os.fspath(p) for p in paths]
    for argument in arguments:
        if argument == "-":
            continue
        if _locate(argument) is None:
            raise SourceError(shown(argument), "does not exist", "Check the spelling of the path.")
        with contextlib.closing(_expand(argument)) as items:
            if next(items, None) is None:
                raise SourceError(shown(argument), "holds no images", f"Images may be {FORMATS}.")
    return _walk(arguments, stdin)


def _walk(arguments: list[str], stdin: BinaryIO | None) -> Iterator[Item]:
    for argument in arguments:
        if argument != "-":
            yield from _expand(argument)
            continue
        for line in _lines(stdin if stdin is not None else sys.stdin.buffer):
            listed = os.fsdecode(line)
            if listed.endswith("\r") and not os.path.lexists(listed):
                listed = listed[:-1]
            found = False
            for item in _expand(listed):
                found = True
                yield item
            if not found:
                yield _broken(listed, "holds no images")


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
        if os.path.lexists(argument):
            return argument, ""
        left, colon, right = argument.rpartition(":")
        while colon:
            if is_archive(left) and os.path.isfile(left) and right.strip("/"):
                return left, argument[len(left) + 1 :].strip("/")
            left, colon, right = left.rpartition(":")
    except ValueError:  # a NUL byte
        pass
    return None


def _broken(path: str, reason: str) -> Item:
    return Item(path=readable(path), member=Member(name="", error=reason))


def _expand(argument: str) -> Generator[Item, None, None]:
    located = _locate(argument)
    if located is None:
        yield _broken(argument, "does not exist")
        return
    path, part = located
    if os.path.isdir(path):
        joint = path if path.endswith("/") else path + "/"
        for member in folder_members(path):
            if member.kind in ("image", "closed"):
                yield Item(path=readable(joint + member.name), member=member)
    elif is_archive(path) and os.path.isfile(path):
        part = nfc(part)
        inside = (lambda n: (nfc(n) + "/").startswith(part + "/")) if part else (lambda n: True)
        try:
            for member in archive_members(path, inside):
                if member.kind == "image" and inside(member.name):
                    yield Item(path=f"{readable(path)}:{member.name}", member=member)
        except DamagedArchiveError as e:
            yield _broken(path, f"{e.fault}; not read to its end")
    else:
        yield Item(path=readable(path), member=Member(name=path, file=path))


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
