"""scikit-learn's digits."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ratioctl.data import in_distribution


def test_digits_splits_are_disjoint_and_complete() -> None:
    train, test = in_distribution.load("digits:train", 8, 1), in_distribution.load("digits:test", 8, 1)
    whole = in_distribution.load("digits", 8, 1)
    assert len(train) + len(test) == len(whole) == 1797
    assert whole.label_names == tuple("0123456789")

    def key(images: in_distribution.Images) -> Counter[bytes]:
        return Counter(p.tobytes() for p in images.pixels)

    assert not key(train) & key(test), "no picture is in both"
    assert key(train) + key(test) == key(whole)
    assert test.labels is not None
    assert min(np.bincount(test.labels)) >= 34


def test_digits_at_another_size_and_in_color() -> None:
    images = in_distribution.load("digits:test", 32, 3)
    assert images.pixels.shape[1:] == (32, 32, 3)
    assert (images.pixels[..., 0] == images.pixels[..., 2]).all()
