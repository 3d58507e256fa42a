"""Seeds stay what they were: published numbers depend on them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ratioctl.utils.seeding import seed_from_bytes, seed_from_key


def test_seeds_from_keys_are_frozen() -> None:
    assert [seed_from_key(0, 0, 1), seed_from_key(0, 1, 1)] == [
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
        for key in ((0, 0, 1), (0, 1, 1))
    ]
    assert seed_from_key(0, 0) < 2**63


@pytest.mark.parametrize(("bits", "length"), [(56, 7), (64, 8), (8, 1)])
def test_seeds_from_bytes_are_leading_bytes_of_the_hash(bits: int, length: int) -> None:
    expected = int.from_bytes(hashlib.sha256(b"worst/image").digest()[:length], "big")
    assert seed_from_bytes(b"worst", b"/", b"image", bits=bits) == expected
