"""The images of a request: where they come from, and how a model's 8-bit input is made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ratioctl import images as pixels_of
from ratioctl.counterfactuals.region import mask_of_box
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
        region: bool (H, W), true where it may change, if that differs from image to image.
    """

    path: str
    sha256: str
    pixels: np.ndarray
    notes: tuple[str, ...] = ()
    region: np.ndarray | None = None


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
        ours = _own_folders(os.fspath(one), out) if pixels_of.is_path(one) else ()
        items = pixels_of.walk([one]) if pixels_of.is_path(one) else pixels_of.items_of_value(one, index)
        for item in items:
            file = item.member.file
            if not os.path.realpath(file or item.path).startswith(ours):
                count += 1
                yield Source(path=item.path, read=item.read, file=file)
    if not count:
        raise SourceError(
            paths[0], "holds only output of ratioctl, no other images", "Name the images to explain."
        )


def _own_folders(folder: str, out: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Real paths, with a trailing separator, of our own output in `folder`.

    That is `out` if it lies below, and if it is the folder itself what its counterfactuals.json names.
    """
    if out is None or not os.path.isdir(folder):
        return ()
    real, root = os.path.realpath(out), os.path.realpath(folder)
    if os.path.commonpath([real, root]) != root:
        return ()
    if real != root:
        return (real + os.sep,)
    try:
        document = json.loads(Path(real, "counterfactuals.json").read_bytes())
        if not str(document["schema"]).startswith("ratioctl/counterfactuals/"):
            return ()
        places = {str(image["input_png"]).rpartition("/")[0] for image in document["images"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()
    hidden = (".results", ".results.partial", ".answers", ".answers.partial", ".interrupted")
    return tuple(os.path.join(real, place) + os.sep for place in (*places, *hidden) if place)


def load(
    source: Source, spec: Spec, bit_depth: int | None = None, box: Sequence[int] | None = None
) -> Picture:
    """Read an image as the model's 8-bit input, with the region of `box`. Raises ImageError."""
    channels, size = spec.input_size[0], spec.frame
    data = source.read()
    decoded = pixels_of.decode(data, size, channels, name=source.path, bit_depth=bit_depth)
    return Picture(
        path=source.path,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=decoded.pixels,
        notes=decoded.notes,
        region=None if box is None else mask_of_box(data, box, size, source.path),
    )


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files on disk among the sources; members of archives are left out."""
    return [Path(source.file) for source in sources if source.file and os.path.isfile(source.file)]
