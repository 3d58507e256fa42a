"""Pixels as floats and back."""

import hashlib

import numpy as np
import pytest

from ratioctl import images


def test_pixels_and_back_are_exact():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    pixels = images.to_pixels(values)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(pixels[0, 0].ravel(), np.arange(256, dtype=np.float32) / np.float32(255))
    np.testing.assert_array_equal(images.to_uint8(pixels), values)
    edge = np.array([-0.1, 0.49 / 255, 0.51 / 255, 1.2]).reshape(1, 1, 2, 2)
    assert images.to_uint8(edge).ravel().tolist() == [0, 0, 1, 255]


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        images.to_pixels(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        images.to_uint8(np.full((1, 1, 2, 2), np.nan))
    with pytest.raises(ValueError, match="uint8"):
        images.pixels_sha256(np.zeros((2, 2, 3)))


def test_sha256_covers_shape_and_bytes():
    a = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert images.pixels_sha256(a) == hashlib.sha256(b"2x2x3\n" + bytes(range(12))).hexdigest()
    assert images.pixels_sha256(a) != images.pixels_sha256(a.reshape(2, 3, 2))
    assert images.pixels_sha256(a[::-1]) == images.pixels_sha256(a[::-1].copy())
