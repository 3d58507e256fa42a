"""A training and a test part of photographs that come without a split."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.data.image_set import Images
from ratioctl.data.registry import SourceRequest, register_source
from ratioctl.errors import SourceError
from ratioctl.images import duplicate_groups
from ratioctl.images.cache import CACHE_FROM_BYTES, remembered

TEST_SHARE = 0.15
PARTS = ("train", "test")


@register_source(
    "split",
    usage="split:train:SOURCE, split:test:SOURCE",
    description="85 % and 15 % of each class of a SOURCE, by the content of its files",
)
def split(request: SourceRequest) -> Images:
    """The parts depend on the files alone, not on names, order or seed. Near duplicates stay together."""
    part, _, inner = request.argument.partition(":")
    if part not in PARTS or not inner:
        raise SourceError(request.source, "names no part", "Use split:train:SOURCE or split:test:SOURCE.")
    everything = in_distribution.load_labelled(
        inner, request.size, request.channels, download=request.download
    )
    assert everything.labels is not None
    groups = groups_of(everything)
    digests = everything.digests
    if digests is None:
        found = (hashlib.sha256(image.tobytes()).digest()[:8] for image in everything.pixels)
        digests = np.array([int.from_bytes(d, "big") for d in found], dtype=np.uint64)
    counts = np.bincount(everything.labels, minlength=len(everything.label_names))
    share = {c: max(1, round(TEST_SHARE * int(n))) for c, n in enumerate(counts) if n}
    test = in_distribution.whole_groups(everything.labels, groups, digests, share)
    index = test if part == "test" else np.setdiff1d(np.arange(len(everything)), test)
    chosen = dataclasses.replace(everything, groups=groups).subset(index)
    return dataclasses.replace(chosen, source=request.source)


def groups_of(everything: Images) -> np.ndarray:
    """Groups of near duplicates, kept in the cache for large sets."""
    if everything.pixels.nbytes < CACHE_FROM_BYTES:
        return duplicate_groups(everything.pixels)
    known = remembered(
        ["groups", everything.fingerprint], lambda: duplicate_groups(everything.pixels).tolist()
    )
    return np.array(known, dtype=np.int64)
