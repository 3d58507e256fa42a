"""Near-duplicates."""

import io

import numpy as np
import pytest
from PIL import Image

from ratioctl import images
from ratioctl.images import duplicates
from tests.images.helpers import encoded


def scenes(n, seed=0, size=32):
    """Pictures that differ in coarse and in fine structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray
    out = []
    for _ in range(n):
        blobs = coarse(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        fine = coarse(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((size, size))
        out.append(np.asarray(Image.blend(blobs, fine, 0.3)))
    return np.stack(out)


@pytest.mark.parametrize("size", [32, 28, 50])
def test_copies_are_found_and_strangers_are_not(size):
    first, second = scenes(300, 1, size), scenes(60, 2, size)
    second[5] = first[77]
    recoded = Image.fromarray(first[123])
    second[9] = np.asarray(Image.open(io.BytesIO(encoded(recoded, "JPEG", quality=60))))
    second[30] = np.asarray(
        recoded.resize((size * 3, size * 3), Image.Resampling.LANCZOS).resize((size, size))
    )
    second[41] = np.clip(first[200].astype(int) + 12, 0, 255)
    got = images.near_duplicates(first, second)
    assert {(d.second, d.first) for d in got} == {(5, 77), (9, 123), (30, 123), (41, 200)}
    assert [d.exact for d in got] == [True, False, False, False]
    assert got[0].distance == 0
    assert list(got) == sorted(got, key=lambda d: d.distance)
    assert all(0 < d.distance < 0.07 for d in got[1:])


def test_smooth_lookalikes_are_no_duplicates():
    """Skies that correlate to 0.97 and lie near each other, but whose details are their own."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 32).reshape(1, 32, 1, 1)
    noise = rng.normal(0, 10, (20, 16, 16, 1)).repeat(2, 1).repeat(2, 2)
    skies = np.clip(ramp + noise.repeat(3, 3), 0, 255).astype(np.uint8)
    assert images.near_duplicates(skies[:10], skies[10:]) == ()
    shapes, pooled = duplicates._shapes(skies), duplicates._pooled(skies)
    assert (shapes[:10] @ shapes[10:].T).max() > duplicates.SAME_SHAPE
    assert np.sqrt(np.mean((pooled[0] - pooled[10]) ** 2)) / 255 < duplicates.SAME_COLOR


def test_flat_images_match_only_exactly():
    flat = np.zeros((5, 16, 16, 1), np.uint8) + np.arange(5, dtype=np.uint8).reshape(-1, 1, 1, 1) * 50
    got = images.near_duplicates(flat[:4], flat[2:])
    assert [(d.first, d.second, d.exact) for d in got] == [(2, 0, True), (3, 1, True)]


def test_each_image_has_at_most_one_duplicate_the_closest():
    first = scenes(1).repeat(500, 0)
    first[:499, 0, 0, 0] ^= 1
    got = images.near_duplicates(first, scenes(1).repeat(3, 0))
    assert [(d.first, d.second, d.exact) for d in got] == [(499, 0, True), (499, 1, True), (499, 2, True)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_tiny_images_have_duplicates_too(size):
    first = np.random.default_rng(0).integers(0, 256, (20, size, size, 1), dtype=np.uint8)
    assert images.near_duplicates(first, first[7:8])[0] == images.Duplicate(
        first=7, second=0, distance=0.0, exact=True
    )


def test_duplicates_of_nothing_and_of_the_wrong_shape():
    assert images.near_duplicates(scenes(2), scenes(2)[:0]) == ()
    assert images.near_duplicates(scenes(2)[:0], scenes(2)) == ()
    with pytest.raises(ValueError, match="uint8"):
        images.near_duplicates(scenes(2), scenes(2, size=16))
