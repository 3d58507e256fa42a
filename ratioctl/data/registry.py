"""The registry of named data sources: what a SOURCE of the form NAME or NAME:ARGUMENT loads.

A module in `ratioctl/data/sources` that calls `register_source` is found without being listed anywhere. These
modules import NumPy and libraries only where they load: `--help` shows the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ratioctl.errors import SourceError
from ratioctl.utils.frame import Frame, Size, frame_of
from ratioctl.utils.registry import import_modules
from ratioctl.utils.remote import is_url

if TYPE_CHECKING:
    import numpy as np

    from ratioctl.data.image_set import Images


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What is loaded.

    Attributes:
        source: as the user wrote it.
        argument: what follows `NAME:`, empty without a colon.
        size, channels: of the model's input.
        seed, count: of generated images; None leaves the number to the source.
        download: whether the network may be used.
    """

    source: str
    argument: str
    size: Size
    channels: int
    seed: int = 0
    count: int | None = None
    download: bool = False

    @property
    def frame(self) -> Frame:
        return frame_of(self.size)

    @property
    def side(self) -> int:
        """Of square images that are generated and then fitted."""
        return max(self.frame.height, self.frame.width)

    def choose(self, *choices: str) -> str:
        """The argument, which must be one of `choices`. Raises SourceError."""
        if self.argument in choices:
            return self.argument
        name = self.source.partition(":")[0]
        legal = [f"{name}:{choice}" if choice else name for choice in choices]
        reason = f'has no "{self.argument}"' if self.argument else "needs a choice"
        raise SourceError(self.source, reason, f"Use one of: {', '.join(legal)}.")

    def images(
        self, pixels: np.ndarray, labels: np.ndarray | None = None, label_names: tuple[str, ...] = ()
    ) -> Images:
        """(N, H, W, C) uint8 of any size as the `Images` of this request."""
        from ratioctl.data import image_set

        pixels = image_set.resize(pixels, self.size, self.channels)
        return image_set.Images(
            pixels=pixels,
            labels=labels,
            label_names=label_names,
            fingerprint=image_set.fingerprint(pixels, labels),
            source=self.source,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A named source.

    Attributes:
        name: before the colon.
        usage: the forms of its SOURCE, for help and messages.
        description: one line.
        load: raises SourceError.
    """

    name: str
    usage: str
    description: str
    load: Callable[[SourceRequest], Images]


_SOURCES: dict[str, Source] = {}


def register_source(
    name: str, *, usage: str, description: str
) -> Callable[[Callable[[SourceRequest], Images]], Callable[[SourceRequest], Images]]:
    """Decorator of a function that loads `name` or `name:ARGUMENT`."""

    def register(load: Callable[[SourceRequest], Images]) -> Callable[[SourceRequest], Images]:
        if name in _SOURCES:
            raise ValueError(f'there is already a source named "{name}"')
        _SOURCES[name] = Source(name=name, usage=usage, description=description, load=load)
        return load

    return register


def find(source: str) -> Source | None:
    """The named source that `source` means; None for URLs and for files and folders, which win over names."""
    name = source.partition(":")[0]
    return None if is_url(source) or Path(source).exists() else registered().get(name)


def names() -> list[str]:
    """Names of all sources, sorted."""
    return list(registered())


@cache
def registered() -> dict[str, Source]:
    """All sources by name, sorted, after every module of `sources` has been imported."""
    import_modules("ratioctl.data.sources")
    return dict(sorted(_SOURCES.items()))
