"""The images of one run, numbered; a shard keeps its part of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ratioctl.images import Item
from ratioctl.scoring.sources import Unreadable
from ratioctl.utils.sharding import Shard

Skip = Callable[[Iterator[Item | Unreadable]], Iterator[Item | Unreadable]]


class Listing:
    """Numbers the images that a run lists and keeps those of its shard.

    An image belongs to a shard by the hash of its path, so that the parts do not depend on the other images.

    Attributes:
        shard: None keeps every image.
        skip: of the images that are kept, passes on those that have not been scored before; None passes on
            all.
        images: how many have been listed so far, those of other shards included.
    """

    def __init__(self, shard: Shard | None = None, skip: Skip | None = None) -> None:
        self.shard, self.skip = shard, skip
        self.images = 0
        self._paths = hashlib.sha256()

    def numbered(self, items: Iterable[Item | Unreadable]) -> Iterator[Item | Unreadable]:
        """The images of the shard, each with its place among all as `index`."""
        found = self._numbered(items)
        return found if self.skip is None else self.skip(found)

    def _numbered(self, items: Iterable[Item | Unreadable]) -> Iterator[Item | Unreadable]:
        for item in items:
            self._paths.update(item.path.encode("utf-8", "surrogatepass") + b"\n")
            index, self.images = self.images, self.images + 1
            if self.shard is None or self.shard.owns(item.path):
                yield item if self.shard is None else dataclasses.replace(item, index=index)

    def facts(self) -> dict[str, Any]:
        """What the shards of a collection have in common: "images", "paths_sha256"; once all are listed."""
        return {"images": self.images, "paths_sha256": self._paths.hexdigest()}
