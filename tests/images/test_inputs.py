"""Images as Python values: the same pixels as from a file, and clear refusals."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
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


def test_a_jpeg_that_pil_opened_gives_the_pixels_of_its_file(tmp_path: Path) -> None:
    """Files are decoded at reduced scale, which moves the pixels; a changed image is taken as it is."""
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(1).integers(0, 256, (48, 71, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((710, 480)).save(path)
    (expected,) = decoded(path)
    with Image.open(path) as lazy:
        assert np.array_equal(decoded(lazy)[0], expected)
        assert np.array_equal(decoded(lazy)[0], expected), "the file is still open"
        lazy.load()
        assert np.array_equal(decoded(lazy)[0], expected)
        lazy.paste((0, 0, 0), (0, 0, 710, 480))
        assert (decoded(lazy)[0] == 0).all()
    memory = Image.open(io.BytesIO(path.read_bytes()))
    assert np.array_equal(decoded(memory)[0], expected)
    converted = decoded(Image.open(path).convert("RGB"))[0]
    assert not np.array_equal(converted, expected)
    assert np.abs(converted.astype(int) - expected).mean() < 12
    path.unlink()
    memory.load()
    assert np.array_equal(decoded(memory)[0], converted), "there are no bytes to compare with"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "La", "RGBa", "PA", "HSV", "YCbCr"])
def test_every_mode_of_pil_keeps_its_brightness(mode: str) -> None:
    """Half of the range, opaque."""
    grey = np.full((6, 6), 128, np.uint8)
    if mode in ("I;16", "I;16B", "I"):
        image = Image.frombytes("I;16", (6, 6), (grey.astype("<u2") * 257).tobytes())
        image = image if mode == "I;16" else image.convert("I")
        if mode == "I;16B":
            image = Image.frombytes(mode, (6, 6), (grey.astype(">u2") * 257).tobytes())
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(grey)
        for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "P", "PA")}.get(
            mode, ("RGB", mode)
        ):
            image = image.convert(step)
    assert image.mode == mode
    assert np.abs(decoded(image)[0].astype(int) - 128).max() <= 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "image-3: has the type int, which is not an image. Give file names, PIL images"),
        (None, "has the type NoneType"),
        (PIXELS[:0], "hold an unsupported uint8 array of shape (0, 6, 3)"),
        (np.full((3, 6, 6), np.nan), "hold values outside [0, 1] or NaN"),
        (PIXELS.reshape(-1), "hold an unsupported uint8 array of shape (108,)"),
    ],
)
def test_what_is_refused_names_what_is_accepted(value: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        images.items_of_value(value, 3)
    assert said in str(caught.value)
    assert "uint8 arrays (H, W), (H, W, C)" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said", "advised", "step"),
    [
        (PIXELS.astype(np.int64), "int64 array of shape (6, 6, 3)", "to uint8", lambda a: a.astype(np.uint8)),
        (
            PIXELS.transpose(2, 0, 1),
            "uint8 array of shape (3, 6, 6)",
            "array.transpose(1, 2, 0)",
            lambda a: a.transpose(1, 2, 0),
        ),
        (
            FLOATS[0].transpose(1, 2, 0).astype(np.float64),
            "an unsupported float64 array of shape (6, 6, 3)",
            "array.transpose(2, 0, 1)",
            lambda a: a.transpose(2, 0, 1),
        ),
        (
            FLOATS.transpose(0, 2, 3, 1),
            "array of shape (1, 6, 6, 3)",
            "array.transpose(0, 3, 1, 2)",
            lambda a: a.transpose(0, 3, 1, 2),
        ),
        (FLOATS[0, 0], "float32 array of shape (6, 6)", "array[None]", lambda a: a[None]),
        (FLOATS[0] * 255, "values outside [0, 1] or NaN", "Divide by 255", lambda a: a / 255),
    ],
)
def test_a_likely_mistake_is_told_with_what_to_do(
    value: Any, said: str, advised: str, step: Callable[[np.ndarray], np.ndarray]
) -> None:
    with pytest.raises(UsageError) as caught:
        images.items_of_value(value, 3)
    assert said in str(caught.value)
    assert advised in str(caught.value)
    assert len(decoded(step(value))) == 1


def test_one_or_several() -> None:
    assert images.as_list("cat.png") == ["cat.png"]
    assert images.as_list(PIXELS)[0] is PIXELS
    assert len(images.as_list([PIXELS, "cat.png", png(PIXELS)])) == 3
    assert images.as_list(str(n) for n in range(2)) == ["0", "1"]
    with pytest.raises(UsageError, match="images: cannot be read from int"):
        images.as_list(3)
