"""The frame that an image is fitted into: the model's input size, and how images get there."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, order=True)
class Frame:
    """Height and width in pixels. An image of another shape is cut to the frame's, or padded with `pad`.

    `bit_depth` is the number of bits in use, 9 to 16, of images with 16 bits per pixel; None takes the file's
    range.
    """

    height: int
    width: int
    pad: bool = False
    bit_depth: int | None = None

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

    @property
    def facts(self) -> tuple[int | bool, ...]:
        """What decides the pixels of an image in this frame, for keys of caches."""
        return (self.height, self.width, self.pad, *(() if self.bit_depth is None else (self.bit_depth,)))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


Size = int | Frame  # a number is the side of a square that images are cut to


def frame_of(size: Size) -> Frame:
    return size if isinstance(size, Frame) else Frame(size, size)
