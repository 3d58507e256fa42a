"""Images in several arrays, indexed like one."""

from __future__ import annotations

import numpy as np
import pytest

from ratioctl.images.rows import PixelRows, joined, select


def test_it_indexes_like_the_array_it_stands_for() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 3, 2, 1), dtype=np.uint8) for n in (5, 0, 3, 7)]
    whole = np.concatenate(parts)
    order = rng.permutation(len(whole))[:11]
    for rows, expected in (
        (joined(parts), whole),
        (select(joined(parts), order), whole[order]),
        (select(select(joined(parts), order), np.array([3, 3, 0])), whole[order][[3, 3, 0]]),
        (select(parts[0], np.array([4, 1])), parts[0][[4, 1]]),
    ):
        assert isinstance(rows, PixelRows)
        assert (len(rows), rows.shape, rows.dtype, rows.ndim) == (
            len(expected),
            expected.shape,
            np.uint8,
            4,
        )
        assert rows.nbytes == expected.nbytes
        np.testing.assert_array_equal(np.asarray(rows), expected)
        np.testing.assert_array_equal(np.stack(list(rows)), expected)
        mask = np.arange(len(expected)) % 2 == 0
        for key in (slice(None), slice(1, 3), slice(None, None, -2), [0, -1], mask, 0, -1, np.int64(1)):
            np.testing.assert_array_equal(rows[key], expected[key])
        for key in ((slice(1, 3), 0), (0, 1, 1), (slice(None), 0, 1, 0), (Ellipsis, 0), ([0, 1], slice(1))):
            np.testing.assert_array_equal(rows[key], expected[key])
        with pytest.raises(IndexError):
            rows[len(expected)]
    assert joined([whole]) is whole


def test_a_selection_does_not_copy() -> None:
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    chosen = select(pixels, np.array([1, 3]))
    pixels[3] = 9
    assert (chosen[1] == 9).all()
