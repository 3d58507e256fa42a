"""What the studies of counterfactuals share: model, images, one random target class per image."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.data import in_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.evaluation.datasets import class_balanced
from ratioctl.evaluation.stages.explanations import target_of
from ratioctl.models.predict import predictor
from tools import harness


def parser(
    doc: str | None, *, images: int, steps: int = 100, short: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """The harness's parser with SOURCE, --images, --steps and --seed."""
    made = harness.parser(doc, short={"images": 2, **short})
    made.add_argument("source", nargs="?", help="labelled images; default: sample photographs named by class")
    made.add_argument("--images", type=int, default=images)
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--seed", type=int, default=0)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A model, its images with labels, and `targets` (N,): a class other than the label for each image."""

    package: packages.ModelPackage
    images: Images
    labels: np.ndarray
    targets: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]

    @property
    def target_names(self) -> list[str]:
        return [self.package.label_names[k] for k in self.targets]

    def confidence(self, pixels: np.ndarray, target: int) -> float:
        """Confidence in a class, after the temperature, of one 8-bit image."""
        return float(metrics.softmax(self.predict(pixels[None]), self.package.temperature)[0, target])

    def about(self, options: argparse.Namespace) -> dict[str, Any]:
        """What identifies the study in its result."""
        return {
            "n": len(self.images),
            "steps": options.steps,
            "seed": options.seed,
            "source_fingerprint": self.images.fingerprint,
            "model": self.package.digest,
        }


def load(options: argparse.Namespace, model: str, rng: np.random.Generator | None = None) -> Study:
    """The model and `--images` images of SOURCE: balanced over classes by the seed, or any drawn by `rng`."""
    package = packages.read(packages.find(model))
    channels, size, _ = package.input_size
    with tempfile.TemporaryDirectory() as scratch:
        source = options.source or _samples(Path(scratch), package.label_names)
        images = in_distribution.load_labelled(source, size, channels, package.label_names)
    if rng is None:
        images = class_balanced(images, options.images, options.seed)
    else:
        images = images.subset(np.sort(rng.permutation(len(images))[: options.images]))
    if images.labels is None:
        sys.exit(f"{options.source}: has no labels. Name a labelled SOURCE, for example cifar10:test.")
    classes = len(package.label_names)
    pairs = zip(images.pixels, images.labels, strict=True)
    return Study(
        package=package,
        images=images,
        labels=images.labels,
        targets=np.array([target_of(x, int(y), classes, options.seed) for x, y in pairs]),
        predict=predictor(package).predict,
    )


def _samples(folder: Path, labels: tuple[str, ...]) -> str:
    """The sample photographs that are named by one of the classes, as a labelled folder."""
    for path in harness.SAMPLES.glob("*.jpg"):
        if path.stem in labels:
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem)
    return str(folder)


def share(hits: int, n: int) -> dict[str, Any]:
    return {"share": hits / n, "interval": metrics.wilson_interval(hits, n)}
