"""Images as Python values: the same pixels as from a file, and clear refusals."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ratioctl import images
from ratioctl.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
FLOATS = images.to_pixels(PIXELS[None])


def decoded(image: Any) -> list[np.ndarray]:
    return [images.decode(item.read(), 6).pixels for item in images.items_of_value(image, 3)]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        *(png(PIXELS), bytearray(png(PIXELS)), memoryview(png(PIXELS)), Image.fromarray(PIXELS), PIXELS),
        *(FLOATS[0], FLOATS[0].astype(np.float64), torch.from_numpy(FLOATS[0]).requires_grad_()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_form_gives_the_same_pixels(value: Any) -> None:
    (found,) = decoded(value)
    assert np.array_equal(found, PIXELS)
    assert [item.path for item in images.items_of_value(value, 3)] == ["image-3"]


def test_a_batch_gives_several() -> None:
    pair = np.stack([PIXELS, 255 - PIXELS])
    for value in (pair, images.to_pixels(pair), torch.from_numpy(images.to_pixels(pair))):
        assert np.array_equal(np.stack(decoded(value)), pair)
        assert [item.path for item in images.items_of_value(value, 0)] == ["image-0-0", "image-0-1"]


def test_grey_and_transparency() -> None:
    grey = PIXELS[..., 0]
    for value in (grey, grey[..., None], Image.fromarray(grey), FLOATS[0, :1]):
        assert np.array_equal(decoded(value)[0], np.repeat(grey[..., None], 3, axis=2))
    clear = np.dstack([PIXELS, np.zeros((6, 6), np.uint8)])
    assert (decoded(clear)[0] == 255).all(), "transparent pixels over white"


def test_a_pil_image_keeps_its_orientation_and_other_modes_become_rgb() -> None:
    exif = Image.Exif()
    exif[274] = 3
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", exif=exif)
    (found,) = decoded(Image.open(stream))
    assert np.array_equal(found, PIXELS[::-1, ::-1])
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    assert np.array_equal(decoded(cmyk)[0], np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "image-3: has the type int, which is no image. Give file names, PIL images"),
        (None, "has the type NoneType"),
        (PIXELS.astype(np.int64), "hold an unsupported int64 array of shape (6, 6, 3)"),
        (PIXELS.transpose(2, 0, 1), "hold an unsupported uint8 array of shape (3, 6, 6)"),
        (PIXELS[:0], "hold an unsupported uint8 array of shape (0, 6, 3)"),
        (FLOATS[0].transpose(1, 2, 0), "hold an unsupported float32 array of shape (6, 6, 3)"),
        (FLOATS[0] * 255, "hold values outside [0, 1] or NaN"),
        (np.full((3, 6, 6), np.nan), "hold values outside [0, 1] or NaN"),
        (PIXELS.reshape(-1), "hold an unsupported uint8 array of shape (108,)"),
    ],
)
def test_what_is_refused_names_what_is_accepted(value: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        images.items_of_value(value, 3)
    assert said in str(caught.value)
    assert "uint8 arrays (H, W), (H, W, C)" in str(caught.value)


def test_one_or_several() -> None:
    assert images.as_list("cat.png") == ["cat.png"]
    assert images.as_list(PIXELS)[0] is PIXELS
    assert len(images.as_list([PIXELS, "cat.png", png(PIXELS)])) == 3
    assert images.as_list(str(n) for n in range(2)) == ["0", "1"]
    with pytest.raises(UsageError, match="images: cannot be read from int"):
        images.as_list(3)
