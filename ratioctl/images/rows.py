"""Images in several arrays or a selection of them, indexed like one array without copying."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class PixelRows:
    """(N, H, W, C) uint8 images of several arrays, in any order.

    Indexing by numbers, slices, integer and bool arrays, iteration, `shape`, `dtype` and `np.asarray` work as
    for an array; an index copies the images it names.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, parts: Sequence[Any], index: np.ndarray | None = None) -> None:
        """`index` (N,) counts through the parts, one after the other; None takes all."""
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.index = index

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return self._gather(np.array([range(len(self))[key]]))[0]
        if isinstance(key, slice):
            return self._gather(np.arange(*key.indices(len(self))))
        if isinstance(key, tuple):
            if not key or key[0] is Ellipsis:
                return self[:][key]
            first, *rest = key
            chosen = self[first]
            return (
                chosen[tuple(rest)] if isinstance(first, int | np.integer) else chosen[(slice(None), *rest)]
            )
        at = np.asarray(key)
        if at.dtype == bool:
            at = np.flatnonzero(at)
        at = at.astype(np.int64, copy=False)
        return self._gather(np.where(at < 0, at + len(self), at))

    def copy(self) -> np.ndarray:
        return np.array(self[:])

    def transpose(self, *axes: int) -> np.ndarray:
        return self[:].transpose(*axes)

    def _gather(self, at: np.ndarray) -> np.ndarray:
        chosen = at if self.index is None else self.index[at]
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][chosen])
        out = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        part_of = np.searchsorted(self.starts, chosen, side="right") - 1
        for number in np.unique(part_of):
            here = part_of == number
            out[here] = self.parts[number][chosen[here] - self.starts[number]]
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), 256):
            yield from self[start : start + 256]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows of several arrays cannot become one array without a copy")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)


def select(pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The images at `index` (n,), not copied: a `PixelRows`, which indexes like the array it is typed as."""
    if isinstance(pixels, PixelRows):
        inner = index if pixels.index is None else pixels.index[index]
        return typing.cast(np.ndarray, PixelRows(pixels.parts, inner))
    return typing.cast(np.ndarray, PixelRows([pixels], np.asarray(index)))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The images of several arrays one after the other, not copied, as `select`."""
    return parts[0] if len(parts) == 1 else typing.cast(np.ndarray, PixelRows(parts))
