"""Which images of a batch each process of a job has, and random numbers that do not depend on it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The part of every batch that one of `world` processes has: consecutive images, in order of `rank`."""

    rank: int = 0
    world: int = 1

    def rows(self, count: int) -> slice:
        """The rows of a batch of `count` images; the parts differ by at most one image."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def size(self, count: int) -> int:
        rows = self.rows(count)
        return rows.stop - rows.start

    def weight(self, count: int) -> float:
        """Factor of a mean over the own rows, so that the mean over processes is that over all images."""
        return self.size(count) * self.world / count


WHOLE = Share()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartOfBatch:
    """Random numbers for some rows of a batch.

    They are drawn for all its images, so an image's numbers do not depend on the number of processes.

    Attributes:
        generator: in the same state in every process.
        count: images of the whole batch.
        rows: those that this process has.
    """

    generator: torch.Generator
    count: int
    rows: slice
