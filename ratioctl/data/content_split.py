"""Parts of a labelled set that depend on the content of its files alone."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.data.image_set import Images
from ratioctl.images import duplicate_groups
from ratioctl.images.cache import CACHE_FROM_BYTES, remembered


def part_of(everything: Images, part: str, test_share: float, source: str) -> Images:
    """The part "train" or "test": the latter has `test_share` of each class, whole groups of duplicates.

    Args:
        source: of the result, as the user wrote it.
    """
    assert everything.labels is not None
    groups = groups_of(everything)
    digests = everything.digests
    if digests is None:
        found = (hashlib.sha256(image.tobytes()).digest()[:8] for image in everything.pixels)
        digests = np.array([int.from_bytes(d, "big") for d in found], dtype=np.uint64)
    counts = np.bincount(everything.labels, minlength=len(everything.label_names))
    share = {c: max(1, round(test_share * int(n))) for c, n in enumerate(counts) if n}
    test = in_distribution.whole_groups(everything.labels, groups, digests, share)
    index = test if part == "test" else np.setdiff1d(np.arange(len(everything)), test)
    chosen = dataclasses.replace(everything, groups=groups).subset(index)
    return dataclasses.replace(chosen, source=source)


def groups_of(everything: Images) -> np.ndarray:
    """Groups of near duplicates, kept in the cache for large sets."""
    if everything.pixels.nbytes < CACHE_FROM_BYTES:
        return duplicate_groups(everything.pixels)
    known = remembered(
        ["groups", everything.fingerprint], lambda: duplicate_groups(everything.pixels).tolist()
    )
    return np.array(known, dtype=np.int64)
