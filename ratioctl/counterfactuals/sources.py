"""The images of a request: where they come from, and how a model's 8-bit input is made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ratioctl import images as pixels_of
from ratioctl.errors import SourceError, UsageError
from ratioctl.package import Spec


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image to be read.

    Attributes:
        read: returns the encoded bytes.
        file: the file on disk, if it is one.
        targets: its own targets instead of the request's, if any.
    """

    path: str
    read: Callable[[], bytes]
    file: str | None = None
    targets: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image as a model sees it.

    Attributes:
        sha256: of the file.
        pixels: (H, W, C) uint8, the model's 8-bit input.
        notes: how the file was converted (cropped, resized, ...).
    """

    path: str
    sha256: str
    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def sources_of(images: object, out: str | os.PathLike[str] | None) -> Iterator[Source]:
    """The images that `images` names or holds, files in the output folder `out` left out.

    Raises:
        SourceError: a file or folder that does not exist or holds no images.
        UsageError: no image at all, or a value of another type (see `ratioctl.images.items_of_value`).
    """
    given = pixels_of.as_list(images)
    if not given:
        raise UsageError("images", "there are none", "Name an image or a folder.")
    paths = [os.fspath(one) for one in given if pixels_of.is_path(one)]
    pixels_of.walk(paths)  # checks at once that all of them exist
    count = 0
    for index, one in enumerate(given):
        ours = _inside(os.fspath(one), out) if pixels_of.is_path(one) else None
        items = pixels_of.walk([one]) if pixels_of.is_path(one) else pixels_of.items_of_value(one, index)
        for item in items:
            file = item.member.file
            if ours is None or not os.path.realpath(file or item.path).startswith(ours):
                count += 1
                yield Source(path=item.path, read=item.read, file=file)
    if not count:
        raise SourceError(paths[0], "holds no images but our own output", "Name the images to explain.")


def _inside(folder: str, out: str | os.PathLike[str] | None) -> str | None:
    """The real path of `out` with a trailing separator, if it lies below `folder`."""
    if out is None or not os.path.isdir(folder):
        return None
    real, root = os.path.realpath(out), os.path.realpath(folder)
    return real + os.sep if os.path.commonpath([real, root]) == root and real != root else None


def load(source: Source, spec: Spec, bit_depth: int | None = None) -> Picture:
    """Read an image and convert it to the model's 8-bit input. Raises ImageError."""
    channels, size, _ = spec.input_size
    data = source.read()
    decoded = pixels_of.decode(data, size, channels, name=source.path, bit_depth=bit_depth)
    return Picture(
        path=source.path,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=decoded.pixels,
        notes=decoded.notes,
    )


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files on disk among the sources; members of archives are left out."""
    return [Path(source.file) for source in sources if source.file and os.path.isfile(source.file)]
