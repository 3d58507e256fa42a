"""Remote images are fetched by many threads at once, ahead of the workers that decode them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from ratioctl.errors import ImageError
from ratioctl.images import Item, Member
from ratioctl.scoring.sources import Unreadable
from ratioctl.utils import remote
from ratioctl.utils.ordered_pool import map_batches


def prefetched(items: Iterator[Item | Unreadable]) -> Iterator[Item | Unreadable]:
    """The items in order, those with a URL with their bytes or the reason why they cannot be read.

    Items are passed on as they are unless the first one is remote.
    """
    first = next(items, None)
    if first is None:
        return
    everything = itertools.chain([first], items)
    if not _is_remote(first):
        yield from everything
        return
    found = map_batches(everything, _fetch, batch=1, workers=remote.READERS, name="fetch")
    with contextlib.closing(found):
        yield from itertools.chain.from_iterable(found)


def _is_remote(item: Item | Unreadable) -> bool:
    return isinstance(item, Item) and remote.is_url(item.member.file)


def _fetch(batch: Sequence[Item | Unreadable]) -> list[Item | Unreadable]:
    found: list[Item | Unreadable] = []
    for item in batch:
        if isinstance(item, Item) and _is_remote(item):
            try:
                member = Member(name=item.member.name, data=item.read())
            except ImageError as error:
                member = Member(name=item.member.name, error=error.reason)
            item = dataclasses.replace(item, member=member)
        found.append(item)
    return found
