"""Images as Python values: PIL images, encoded bytes, arrays and tensors, turned into items to decode."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from ratioctl.errors import UsageError
from ratioctl.images.archive import Member
from ratioctl.images.arrays import to_uint8
from ratioctl.images.walk import Item
from ratioctl.utils.text import shown

ACCEPTED = (
    "Give file names, PIL images, encoded bytes, uint8 arrays (H, W), (H, W, C) or (N, H, W, C), or float "
    "arrays or tensors (C, H, W) or (N, C, H, W) in [0, 1]; one or a sequence."
)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")


def is_path(image: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(image, str | os.PathLike)


def as_list(images: object, name: str = "images") -> list[object]:
    """One image, or several, as a list. Raises UsageError for anything else; `name` is the parameter's."""
    if (
        is_path(images)
        or isinstance(images, bytes | bytearray | memoryview | Image.Image)
        or _is_array(images)
    ):
        return [images]
    if not isinstance(images, Iterable):
        raise UsageError(name, f"cannot be read from {type(images).__name__}", ACCEPTED)
    return list(images)


def items_of_value(image: object, index: int) -> Iterator[Item]:
    """One image as items called "image-<index>", or by its file; an array with four axes gives several.

    Arrays and PIL images are encoded as PNG, so that they take the same path as a file. That is lossless up
    to the rounding of floats to 8 bits. A PIL image keeps its EXIF orientation and transparency.

    Raises:
        UsageError: not an image, or an array of another type, shape or range.
    """
    if is_path(image):
        return iter([Item(path=shown(image), member=Member(name="", file=os.fspath(image)))])
    name = f"image-{index}"
    if isinstance(image, bytes | bytearray | memoryview):
        return iter([_item(name, bytes(image))])
    if isinstance(image, Image.Image):
        return iter([_item(name, _png(image))])
    if not _is_array(image):
        raise UsageError(name, f"has the type {type(image).__name__}, which is no image", ACCEPTED)
    array = as_array(image)
    if array.dtype != np.uint8:
        array = to_uint8(array) if array.ndim == 4 else to_uint8(array[None])[0]
    if array.ndim < 4:
        return iter([_item(name, encoded(array))])
    return (_item(f"{name}-{k}", encoded(one)) for k, one in enumerate(array))


def encoded(array: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, C) as a PNG."""
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return _png(Image.fromarray(np.ascontiguousarray(squeezed)))


def as_array(image: Any) -> np.ndarray:
    """An array or torch tensor, checked: uint8 with channels last, or floats in [0, 1] with channels first.

    Raises:
        UsageError: another type, shape or range.
    """
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    shown = f"{array.dtype} array of shape {array.shape}"
    if array.dtype == np.uint8:
        channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim in (3, 4) else 0
        fits = channels in (1, 3, 4)
    else:
        fits = array.dtype.kind == "f" and array.ndim in (3, 4) and array.shape[-3] in (1, 3)
    if not fits or 0 in array.shape:
        raise UsageError("images", f"hold an unsupported {shown}", ACCEPTED)
    if array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):  # false for NaN
        raise UsageError("images", f"hold values outside [0, 1] or NaN in a {shown}", ACCEPTED)
    return array


def _is_array(image: object) -> bool:
    return isinstance(image, np.ndarray) or (hasattr(image, "detach") and hasattr(image, "cpu"))


def _item(name: str, data: bytes) -> Item:
    return Item(path=name, member=Member(name=name, data=data))


def _png(image: Image.Image) -> bytes:
    picture = image if image.mode in _PNG_MODES else image.convert("RGB")
    stream = io.BytesIO()
    exif = image.info.get("exif")
    picture.save(stream, "PNG", compress_level=1, **({"exif": exif} if isinstance(exif, bytes) else {}))
    return stream.getvalue()
