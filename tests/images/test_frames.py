"""Frames that are no square, and padding: what of the picture arrives where."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ratioctl import images
from ratioctl.data import image_set
from ratioctl.utils.frame import Frame
from tests.images.helpers import encoded, picture


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, so that a pixel tells where it comes from."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full(x.shape, 128.0)], axis=2)
    return Image.fromarray(np.rint(rgb).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (640, 120)])
def test_cutting_keeps_the_centre_and_the_proportions(kind: str, width: int, height: int) -> None:
    frame = Frame(32, 48)
    data = encoded(
        gradient(width, height), kind, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {})
    )
    found = images.decode(data, frame)
    assert found.pixels.shape == (32, 48, 3)
    scale = min(width / 48, height / 32)
    for axis, side, length in ((1, 48, width), (0, 32, height)):
        pixel = found.pixels.mean(axis=1 - axis)[:, 1 - axis] / 255 * length  # where it lay in the file
        expected = length / 2 + (np.arange(side) + 0.5 - side / 2) * scale
        np.testing.assert_allclose(pixel[2:-2], expected[2:-2], atol=0.02 * length)
    assert any("cut to the center" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (90, 400), (2000, 100), (40, 40), (7, 3)])
def test_padding_keeps_the_whole_picture(kind: str, width: int, height: int) -> None:
    frame = Frame(32, 32, pad=True)
    white = encoded(Image.new("RGB", (width, height), (255, 255, 255)), kind)
    found = images.decode(white, frame).pixels
    scale = 32 / max(width, height)
    rows, columns = (max(1, round(scale * n)) for n in (height, width))
    full = found.min(axis=2) > 250
    assert full.sum() == rows * columns
    assert (found[~full] == 0).all()
    assert full.any(1).sum() == rows
    assert full.any(0).sum() == columns
    if width != height:
        pixels = images.decode(encoded(gradient(width, height), "PNG"), frame).pixels
        inside = pixels[full].reshape(rows, columns, 3).astype(int)
        coarse = 255 / min(rows, columns, width, height)
        assert inside[0, 0, :2].max() < coarse + 12, "the corners are there"
        assert inside[-1, -1, :2].min() > 255 - coarse - 12


def test_a_square_frame_is_what_a_number_means() -> None:
    for width, height in ((48, 32), (31, 77), (16, 16)):
        for mode in ("RGB", "L"):
            data = encoded(picture(width, height, mode))
            a, b = images.decode(data, 16, 1), images.decode(data, Frame(16, 16), 1)
            np.testing.assert_array_equal(a.pixels, b.pixels)
            assert a.notes == b.notes


def test_an_image_of_the_frame_s_size_passes_unchanged() -> None:
    for pad in (False, True):
        data = encoded(picture(48, 32))
        found = images.decode(data, Frame(32, 48, pad))
        np.testing.assert_array_equal(found.pixels, np.asarray(picture(48, 32)))
        assert found.notes == ()


def test_arrays_are_fitted_as_files_are() -> None:
    pixels = np.stack([np.asarray(picture(48, 32, seed=k)) for k in range(2)])
    for frame in (Frame(20, 12), Frame(20, 12, pad=True), Frame(16, 16)):
        fitted = image_set.resize(pixels, frame, 3)
        expected = np.stack([images.decode(encoded(picture(48, 32, seed=k)), frame).pixels for k in range(2)])
        np.testing.assert_array_equal(fitted, expected)


def test_a_source_is_cached_by_its_frame(tmp_path, monkeypatch, pets) -> None:
    from ratioctl.images import cache

    monkeypatch.setattr(cache, "CACHE_FROM_BYTES", 0)
    shapes = [
        images.load_source(f"{pets}:train", size).images
        for size in (Frame(16, 24), Frame(24, 16), Frame(16, 24, pad=True), 16)
    ]
    assert [s.shape[1:3] for s in shapes] == [(16, 24), (24, 16), (16, 24), (16, 16)]
    assert (np.asarray(shapes[0]) != np.asarray(shapes[2])).any()
