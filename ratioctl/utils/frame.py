"""The frame that an image is fitted into: the model's input size, and whether it is cut or padded to it."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, order=True)
class Frame:
    """Height and width in pixels. An image of another shape is cut to the frame's, or padded with `pad`."""

    height: int
    width: int
    pad: bool = False

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def side(self) -> float:
        """Side of the square of the same area."""
        return math.sqrt(self.area)

    @property
    def built_for(self) -> int | tuple[int, int]:
        """The size as networks take it: one number for a square."""
        return self.height if self.height == self.width else (self.height, self.width)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


Size = int | Frame  # a number is the side of a square that images are cut to


def frame_of(size: Size) -> Frame:
    return size if isinstance(size, Frame) else Frame(size, size)
