"""Random numbers of the images of a batch, or of some rows of one."""

from __future__ import annotations

import torch
from torch import Tensor

from ratioctl.utils.shares import PartOfBatch

Numbers = torch.Generator | PartOfBatch


class Draws:
    """Random numbers of `count` images: tensors of shape (count, ...) on the generator's device."""

    def __init__(self, numbers: Numbers, count: int) -> None:
        if isinstance(numbers, torch.Generator):
            numbers = PartOfBatch(generator=numbers, count=count, rows=slice(0, count))
        self.part, self.generator = numbers, numbers.generator

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        size = (self.part.count, *shape)
        return torch.rand(size, generator=self.generator, device=self.generator.device)[self.part.rows]

    def normal(self, *shape: int) -> Tensor:
        size = (self.part.count, *shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)[self.part.rows]

    def integers(self, stop: int, *shape: int) -> Tensor:
        """In 0 to stop - 1."""
        size = (self.part.count, *shape)
        drawn = torch.randint(0, stop, size, generator=self.generator, device=self.generator.device)
        return drawn[self.part.rows]
