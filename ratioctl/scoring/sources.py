"""What is scored: paths, archives, lists on stdin and images as Python values, as one stream of items."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from ratioctl import images
from ratioctl.errors import SourceError, UsageError

# A path, a PIL image, encoded bytes, an array or a tensor; or several of them.
Images = str | os.PathLike[str] | Iterable[Any] | Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An argument that names nothing to score, beside others that do."""

    path: str
    reason: str
    index: int | None = None


def items_of(paths: Images, *, stdin: BinaryIO | None = None) -> Iterator[images.Item | Unreadable]:
    """Everything that `paths` names; a path that names nothing is `Unreadable` beside ones that do.

    Raises (at once):
        SourceError: no path names anything; a single one is a typing error, not an unreadable image.
            At its end, where the list on stdin is empty and all there is: what wrote it may have failed.
        UsageError: nothing at all, or a value that is not an image.
    """
    given = images.as_list(paths, "paths")
    if not given:
        raise UsageError("paths", "there are none", "Name images, folders or archives.")
    stdins = [path for path in given if images.is_path(path) and os.fspath(path) == "-"]
    if stdins and stdin is None:
        stdin = _unlocked_stdin()
    if len(stdins) == len(given):
        return _listed(stdin, alone=True)
    parts: list[Iterable[images.Item | Unreadable]] = []
    refused: list[SourceError] = []
    for index, path in enumerate(given):
        if not images.is_path(path):
            parts.append(images.items_of_value(path, index))
        elif os.fspath(path) != "-":
            try:
                parts.append(images.walk([os.fspath(path)], stdin=stdin))
            except SourceError as error:
                refused.append(error)
                parts.append([Unreadable(path=images.shown(os.fspath(path)), reason=error.reason)])
        elif stdins:  # a list is read once
            stdins.clear()
            parts.append(_listed(stdin, alone=False))
    if refused and len(refused) == len(parts):
        raise refused[0]
    return itertools.chain.from_iterable(parts)


def _listed(stdin: BinaryIO | None, *, alone: bool) -> Iterator[images.Item | Unreadable]:
    """What the list on stdin names; an empty one is an error, or `Unreadable` where it is not alone."""
    items = images.walk(["-"], stdin=stdin)
    first = next(items, None)
    if first is not None:
        yield first
        yield from items
        return
    reason = "the list of paths on standard input is empty"
    if alone:
        raise SourceError("-", reason, "Check the command that writes it.")
    yield Unreadable(path="-", reason=reason)


def _unlocked_stdin() -> BinaryIO:
    """Standard input without Python's buffer: a thread that still waits there at the end of the process
    would hold the buffer's lock, which the interpreter then reports as a fatal error.
    """
    try:
        return open(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    except (OSError, ValueError, AttributeError):  # replaced by something without a descriptor, or closed
        if sys.stdin is None:
            raise UsageError("-", "there is no standard input", "Name the images as arguments.") from None
        return sys.stdin.buffer
