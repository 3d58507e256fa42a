"""The region of an image that may change, as a mask in pixels of the model's input."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ratioctl import images as pixels_of
from ratioctl.errors import ImageError, UsageError
from ratioctl.utils.frame import Size, frame_of


def parse_region(region: str | Sequence[int] | np.ndarray, size: Size) -> np.ndarray:
    """The mask (H, W), bool, of a box "X,Y,W,H", an array, or a mask image, which is decoded like an image.

    Raises:
        UsageError: a box outside the input, a mask of another shape or without white pixels.
    """
    frame = frame_of(size)
    shape = frame.height, frame.width
    if isinstance(region, np.ndarray):
        mask = region.astype(bool)
        if mask.shape != shape:
            raise UsageError("region", f"has shape {mask.shape}, not {shape}", "Use the input's size.")
    else:
        shown = region if isinstance(region, str) else ",".join(str(n) for n in region)
        if re.fullmatch(_BOX, shown):
            x, y, w, h = (int(part) for part in shown.split(","))
            if not (0 <= x < x + w <= frame.width and 0 <= y < y + h <= frame.height):
                raise UsageError(
                    f"--region {shown}",
                    f"is not a box within the model's {frame.width}x{frame.height} input",
                    "X,Y is its upper left corner, W,H its size.",
                )
            mask = np.zeros(shape, dtype=bool)
            mask[y : y + h, x : x + w] = True
        else:
            try:
                mask = pixels_of.decode(shown, size, 1).pixels[..., 0] >= 128
            except ImageError as error:
                raise UsageError(
                    f"--region {shown}",
                    error.reason,
                    "Give X,Y,W,H or a mask image, white where it may change.",
                ) from None
    if not mask.any():
        raise UsageError("--region", "leaves no pixel to change", "White parts of a mask may change.")
    return mask


_BOX = r"\s*-?\d+\s*(,\s*-?\d+\s*){3}"


def photo_box(region: str | Sequence[int] | np.ndarray) -> tuple[int, ...] | None:
    """X, Y, W, H of a box in pixels of a photograph; None for a mask image, which is resized like one."""
    shown = region if isinstance(region, str) else ",".join(str(n) for n in np.ravel(region))
    return tuple(int(part) for part in shown.split(",")) if re.fullmatch(_BOX, shown) else None


def mask_of_box(data: bytes, box: Sequence[int], size: Size, name: str) -> np.ndarray:
    """The mask (H, W) in the model's input of a box in the photograph, oriented as displayed.

    A white box on black goes through the photograph's own crop and resize. Raises ImageError.
    """
    x, y, w, h = box
    with Image.open(io.BytesIO(data)) as photo:
        width, height = photo.size
        if photo.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # the orientation swaps the sides
            width, height = height, width
    shown = ",".join(map(str, box))
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
        raise ImageError(name, f"--region {shown} is not a box within its {width}x{height} pixels", "")
    canvas = Image.new("L", (width, height))
    canvas.paste(255, (x, y, x + w, y + h))
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    mask = pixels_of.decode(stream.getvalue(), size, 1).pixels[..., 0] >= 128
    if not mask.any():
        raise ImageError(name, f"--region {shown} leaves no pixel of the model's input to change", "")
    return mask


def describe_region(region: np.ndarray | None) -> dict[str, Any]:
    """JSON of a mask (H, W): its bounding box X,Y,W,H in pixels of the model's input and its pixel count."""
    if region is None:
        return {}
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
    return {"region": {"box": box, "pixels": int(region.sum())}}
