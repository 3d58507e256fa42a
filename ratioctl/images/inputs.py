"""Images as Python values: PIL images, encoded bytes, arrays and tensors, turned into items to decode."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, JpegImagePlugin

from ratioctl.errors import ImageError, UsageError
from ratioctl.images.archive import Member
from ratioctl.images.arrays import to_uint8
from ratioctl.images.files import read_file
from ratioctl.images.walk import Item
from ratioctl.utils.text import shown

ACCEPTED = (
    "Give file names, PIL images, encoded bytes, uint8 arrays (H, W), (H, W, C) or (N, H, W, C), or float "
    "arrays or tensors (C, H, W) or (N, C, H, W) in [0, 1]; one or a sequence."
)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_CONVERTED = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}  # others become RGB


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
    to the rounding of floats to 8 bits. A PIL image keeps its EXIF orientation and transparency. One that was
    opened from a JPEG and not changed since is read from its file again: a file is decoded at reduced scale,
    which a PIL image is not.

    Raises:
        UsageError: not an image, or an array of another type, shape or range.
    """
    if is_path(image):
        return iter([Item(path=shown(image), member=Member(name="", file=os.fspath(image)))])
    name = f"image-{index}"
    if isinstance(image, bytes | bytearray | memoryview):
        return iter([_item(name, bytes(image))])
    if isinstance(image, Image.Image):
        if image.mode != "F":
            return iter([_item(name, _unchanged_jpeg(image) or _png(image))])
        image = np.asarray(image)[None]
    if not _is_array(image):
        raise UsageError(name, f"has the type {type(image).__name__}, which is not an image", ACCEPTED)
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
        raise UsageError("images", f"hold an unsupported {shown}", _conversion(array) or ACCEPTED)
    if array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):  # false for NaN
        step = "Divide by 255, or convert to uint8 with channels last." if array.max() > 1 else ACCEPTED
        raise UsageError("images", f"hold values outside [0, 1] or NaN in a {shown}", step)
    return array


def _conversion(array: np.ndarray) -> str:
    """What to do about an array of a likely, but unsupported form; empty for others."""
    if array.dtype.kind in "iub" and array.dtype != np.uint8 and array.ndim in (2, 3, 4):
        return "Convert it to uint8 with values from 0 to 255."
    last = array.ndim in (3, 4) and array.shape[-1] in (1, 3, 4)
    if array.dtype.kind == "f" and (last or array.ndim == 2):
        axes = {2: "array[None]", 3: "array.transpose(2, 0, 1)", 4: "array.transpose(0, 3, 1, 2)"}[array.ndim]
        return f"Floats have channels first: {axes}. With channels last, convert to uint8."
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-3] in (1, 3):
        axes = "array.transpose(1, 2, 0)" if array.ndim == 3 else "array.transpose(0, 2, 3, 1)"
        return f"uint8 has channels last: {axes}."
    return ""


def _is_array(image: object) -> bool:
    return isinstance(image, np.ndarray) or (hasattr(image, "detach") and hasattr(image, "cpu"))


def _item(name: str, data: bytes) -> Item:
    return Item(path=name, member=Member(name=name, data=data))


def _unchanged_jpeg(image: Image.Image) -> bytes | None:
    """The bytes of the JPEG that a PIL image was opened from, if the pixels of both are the same."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):  # a copy or a converted image is none
        return None
    try:
        if image.fp is None:  # it was loaded, which closes the file
            data = read_file(os.fsdecode(image.filename))
        else:
            place = image.fp.tell()
            image.fp.seek(0)
            data = image.fp.read()
            image.fp.seek(place)
        with Image.open(io.BytesIO(data)) as file:
            same = (file.size, file.mode) == (image.size, image.mode)
            if same and image.fp is None:
                same = np.array_equal(np.asarray(file), np.asarray(image))
    except (ImageError, OSError, ValueError):
        return None
    return data if same else None


def _png(image: Image.Image) -> bytes:
    picture = image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UsageError("images", "hold integers outside 0..65535", "Convert them to 8 or 16 bits.")
        picture = Image.fromarray(values.astype(np.uint16))
    elif image.mode not in _PNG_MODES:
        picture = image.convert(_CONVERTED.get(image.mode, "RGB"))
    stream = io.BytesIO()
    exif = image.info.get("exif")
    picture.save(stream, "PNG", compress_level=1, **({"exif": exif} if isinstance(exif, bytes) else {}))
    return stream.getvalue()
