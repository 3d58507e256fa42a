"""The images an evaluation uses: loading per model, limits, and reproducible subsets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import UsageError
from ratioctl.evaluation.suites import Suite
from ratioctl.package import ModelPackage


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """The images one model is evaluated on.

    Attributes:
        name: of the in-distribution (ID) set in reports: its SOURCE without leading folders.
        inside: labelled ID images, after `limit`.
        outside: OOD sets by name, after `limit`.
        fingerprints: of the sets before `limit`, by name.
        sources: SOURCE of each set, by name.
    """

    name: str
    inside: Images
    outside: dict[str, Images]
    fingerprints: dict[str, str]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 labels of the ID images."""
        assert self.inside.labels is not None
        return self.inside.labels

    def all(self) -> dict[str, Images]:
        """Every set by name, the ID set first."""
        return {self.name: self.inside, **self.outside}


@dataclasses.dataclass(kw_only=True)
class Datasets:
    """Loads every set once for each input size and label list."""

    data: str
    ood: Mapping[str, str]
    suite: Suite
    limit: int | None
    seed: int
    download: bool
    loaded: dict[Any, EvaluationData] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}", "must be positive", "For example --limit 1000.")

    def of(self, package: ModelPackage) -> EvaluationData:
        """The sets at the package's input size, labels in its order."""
        key = (package.input_size, package.label_names)
        if key not in self.loaded:
            channels, size = package.input_size[0], package.frame
            test = in_distribution.load_labelled(
                self.data, size, channels, package.label_names, download=self.download
            )
            outside = {
                name: out_distribution.load([source], size, channels, seed=self.seed, download=self.download)
                for name, source in self.ood.items()
            }
            name = in_distribution.short_name(self.data)
            self.loaded[key] = EvaluationData(
                name=name,
                inside=self._limited(test),
                outside={name: self._limited(images) for name, images in outside.items()},
                fingerprints={key: images.fingerprint for key, images in {name: test, **outside}.items()},
                sources={name: self.data, **self.ood},
            )
        return self.loaded[key]

    def _limited(self, images: Images) -> Images:
        if self.suite.explains:
            default = self.suite.inside if images.labels is not None else self.suite.outside
            return class_balanced(images, self.limit or default or len(images), self.seed)
        if self.limit is None or self.limit >= len(images):
            return images
        return images.subset(stratified_indices(images, self.limit, self.seed))


def stratified_indices(images: Images, count: int | None, seed: int) -> np.ndarray:
    """Ascending indices of `count` images, stratified by class where labels exist; None selects all.

    A smaller selection is a subset of a larger one with the same seed.
    """
    n = len(images)
    if count is None or count >= n:
        return np.arange(n)
    order = np.random.default_rng([seed, 0xC401CE]).permutation(n)
    if images.labels is None:
        return np.sort(order[:count])
    position = np.empty(n)
    for label in np.unique(images.labels):
        mine = order[images.labels[order] == label]
        position[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return np.sort(np.lexsort((np.argsort(order), position))[:count])


def class_balanced(images: Images, count: int, seed: int) -> Images:
    """`count` random images with equal numbers per class; a smaller selection is a subset of a larger one."""
    if count >= len(images):
        return images
    order = np.random.default_rng([seed, 0xE8]).permutation(len(images))
    turn = np.zeros(len(images), int)
    if images.labels is not None:
        for label in np.unique(images.labels):
            mine = order[images.labels[order] == label]
            turn[mine] = np.arange(len(mine))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return images.subset(np.sort(chosen))


def evenly_spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spaced: sets are sorted by class, so the first ones share a class."""
    n = len(indices)
    return indices if n <= count else indices[(np.arange(count) * n) // max(count, 1)]


def take(pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The images at ascending, distinct indices; no copy where all are selected."""
    return pixels if len(index) == len(pixels) else pixels[index]
