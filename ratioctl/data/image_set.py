"""A set of images at the model's size, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ratioctl.images import cache
from ratioctl.images.decode import fit
from ratioctl.images.rows import select
from ratioctl.utils.frame import Size, frame_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Images of one or several sources at the model's size.

    Attributes:
        pixels: (N, H, W, C) uint8; a memory map of a large source, or `PixelRows` of one.
        labels: (N,) int64, or None for unlabelled images.
        label_names: names by label; empty without labels.
        fingerprint: SHA-256 over pixels and labels.
        source: as the user wrote it.
        errors: (name, reason) of images that could not be read.
        names: (N,) POSIX paths inside the source; empty for generated and library sets.
        digests: (N,) uint64, of the encoded files; None for generated and library sets.
        groups: (N,) int64; a split keeps images with the same number on one side. None: all may be parted.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    fingerprint: str
    source: str
    errors: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    digests: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: np.ndarray) -> Images:
        """The images at `index` (n,), not copied; the fingerprint names the parent and the selection."""
        index = np.asarray(index)
        digest = hashlib.sha256(self.fingerprint.encode() + index.astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else self.labels[index]
        names = tuple(self.names[k] for k in index) if self.names else ()
        return dataclasses.replace(
            self,
            pixels=select(self.pixels, index),
            labels=labels,
            fingerprint=digest,
            names=names,
            digests=None if self.digests is None else self.digests[index],
            groups=None if self.groups is None else self.groups[index],
        )


def fingerprint(pixels: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 over shape, pixels and labels."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    for start in range(0, len(pixels), 4096):
        digest.update(np.ascontiguousarray(pixels[start : start + 4096]).tobytes())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def resize(pixels: np.ndarray, size: Size, channels: int) -> np.ndarray:
    """(N, H, W, C) uint8 to the model's size and channels, as `images.decode` does; unchanged if they fit.

    Many images are kept in the cache.
    """
    frame = frame_of(size)
    shape = (frame.height, frame.width, channels)
    if pixels.shape[1:] == shape:
        return pixels

    def fitted() -> Iterator[np.ndarray]:
        for image in pixels:
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            yield fit(picture, picture.size, frame, channels)[0]

    if len(pixels) * math.prod(shape) < cache.CACHE_FROM_BYTES:
        return np.array(list(fitted()), np.uint8).reshape(len(pixels), *shape)
    facts = ["resized", fingerprint(pixels, None), frame.facts, channels]
    return cache.generated(facts, shape, f"{len(pixels)} images of {shape[0]}x{shape[1]}", fitted())
