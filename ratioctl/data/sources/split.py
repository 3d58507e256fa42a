"""A training and a test part of photographs that come without a split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ratioctl.data.registry import SourceRequest, register_source
from ratioctl.errors import SourceError

if TYPE_CHECKING:
    from ratioctl.data.image_set import Images

TEST_SHARE = 0.15
PARTS = ("train", "test")


@register_source(
    "split",
    usage="split:train:SOURCE, split:test:SOURCE",
    description="85 % and 15 % of each class of a SOURCE, by the content of its files",
)
def split(request: SourceRequest) -> Images:
    """The parts depend on the files alone, not on names, order or seed. Near duplicates stay together."""
    from ratioctl.data import content_split, in_distribution

    part, _, inner = request.argument.partition(":")
    if part not in PARTS or not inner:
        raise SourceError(request.source, "names no part", "Use split:train:SOURCE or split:test:SOURCE.")
    everything = in_distribution.load_labelled(
        inner, request.size, request.channels, download=request.download
    )
    return content_split.part_of(everything, part, TEST_SHARE, request.source)
