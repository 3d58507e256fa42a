"""Calibration on held-out images: temperature (Guo et al. 2017; appendix C of the paper) and thresholds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, loader
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError
from ratioctl.models.device import select_device
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Calibration, Recipe

THRESHOLDS = (95, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration found and wrote.

    Attributes:
        package: the package as it is now.
        temperature: logits are divided by it.
        thresholds: "tpr95", "tpr99" to confidences.
        n, accuracy: of the held-out images.
        before, after: "ece" (search bins), "ece_report" (report bins), "nll", "mean_confidence".
        warnings: findings that stand beside the numbers.
        unreadable: held-out images that were left out because they could not be read.
    """

    package: ModelPackage
    temperature: float
    thresholds: dict[str, float]
    n: int
    accuracy: float
    before: dict[str, float]
    after: dict[str, float]
    warnings: tuple[str, ...]
    unreadable: int


def calibrate(
    model: str | os.PathLike[str] | ModelPackage,
    *,
    data: str | None = None,
    objective: Literal["ece", "nll"] | None = None,
    out: Path | None = None,
    device: str = "auto",
    download: bool = False,
) -> Calibrated:
    """Choose the temperature and thresholds of a package on held-out labelled images and write them to it.

    Args:
        model: a package, its folder, or a bundled model's name.
        data: a labelled SOURCE; None takes the split that the package's recipe held out.
        objective: what the temperature minimises; None takes the recipe's (ece).
        out: write a new package there and leave the old one alone.

    Raises:
        SourceError: no data, or class folders that are no labels of the model.
        PackageError: the package cannot be read.
    """
    package = packages.resolve(model)
    if out is None:
        packages.check_writable(package)
    recipe = None if package.recipe_text is None else recipes.loads(package.recipe_text, str(package.path))
    spec = recipe.calibration if recipe is not None else Calibration()
    if objective is not None:
        spec = spec.model_copy(update={"objective": objective})
    images, source = _images(package, recipe, data, download)
    assert images.labels is not None
    compute = select_device(device, "fp32", reason="scores always are")
    logits = predictor(package, compute.device).predict(images.pixels)
    temperature = search(logits, images.labels, spec)
    before = _figures(logits, images.labels, 1.0, spec)
    after = _figures(logits, images.labels, temperature, spec)
    confidences = metrics.confidence(logits, temperature)
    thresholds = {f"tpr{x}": metrics.threshold_at_tpr(confidences, x) for x in THRESHOLDS}
    warnings = _doubts(spec, temperature, before, after, len(images), images)
    accuracy = float(metrics.accuracy(logits.argmax(1), images.labels))
    changes = {
        "temperature": temperature,
        "thresholds": thresholds,
        "calibration": {
            "source": source,
            "fingerprint": images.fingerprint,
            "n": len(images),
            "objective": spec.objective,
            "accuracy": accuracy,
            "bins": spec.bins,
            "report_bins": spec.report_bins,
            "range": [1 / len(package.label_names), 1.0],
            "grid": {"low": spec.low, "high": spec.high, "temperatures": spec.temperatures},
            "before": before,
            "after": after,
            "warnings": list(warnings),
        },
    }
    same = (temperature, thresholds) == (package.temperature, package.thresholds)
    if package.config["ratio"].get("metrics") and not same:
        changes["metrics"] = {}
        warnings += ("its measurements were made with another temperature or thresholds and are removed",)
    if out is not None:
        package = _copy(package, out)
    written = packages.update(package, config_changes={"ratio": changes})
    return Calibrated(
        package=written,
        temperature=temperature,
        thresholds=thresholds,
        n=len(images),
        accuracy=accuracy,
        before=before,
        after=after,
        warnings=warnings,
        unreadable=len(images.errors),
    )


def search(logits: np.ndarray, labels: np.ndarray, spec: Calibration) -> float:
    """The temperature of the geometric grid that minimises the objective; of ties, the one nearest 1.

    Args:
        logits: (N, K); labels: (N,).
    """
    grid = np.geomspace(spec.low, spec.high, spec.temperatures)
    correct = logits.argmax(1) == labels
    low = 1 / logits.shape[1]
    values = np.empty(len(grid))
    for k, temperature in enumerate(grid):
        if spec.objective == "ece":
            values[k] = metrics.ece(metrics.confidence(logits, temperature), correct, spec.bins, low)
        else:
            values[k] = metrics.nll(logits, labels, temperature)
    best = np.flatnonzero(values <= values.min() + 1e-12)
    return float(grid[best[np.argmin(np.abs(np.log(grid[best])))]])


def _figures(
    logits: np.ndarray, labels: np.ndarray, temperature: float, spec: Calibration
) -> dict[str, float]:
    confidences = metrics.confidence(logits, temperature)
    correct = logits.argmax(1) == labels
    low = 1 / logits.shape[1]
    return {
        "ece": float(metrics.ece(confidences, correct, spec.bins, low)),
        "ece_report": float(metrics.ece(confidences, correct, spec.report_bins, low)),
        "nll": float(metrics.nll(logits, labels, temperature)),
        "mean_confidence": float(confidences.mean()),
    }


def _doubts(
    spec: Calibration,
    temperature: float,
    before: dict[str, float],
    after: dict[str, float],
    n: int,
    images: Images,
) -> tuple[str, ...]:
    found = []
    if temperature <= spec.low * 1.0001 or temperature >= spec.high * 0.9999:
        found.append(
            f"the temperature {temperature:.4g} is at the end of the grid [{spec.low:g}, {spec.high:g}]"
        )
    for key, name in (("ece_report", f"ECE ({spec.report_bins} bins)"), ("nll", "NLL")):
        if after[key] > before[key]:
            found.append(f"{name} rose from {before[key]:.4g} to {after[key]:.4g}")
    if n < 1000:
        found.append(f"only {n} held-out images")
    assert images.labels is not None
    missing = [name for k, name in enumerate(images.label_names) if not (images.labels == k).any()]
    if missing:
        found.append(f"no held-out image of {', '.join(missing)}")
    return (*found, *in_distribution.unreadable({in_distribution.short_name(images.source): images}))


def _images(
    package: ModelPackage, recipe: Recipe | None, data: str | None, download: bool
) -> tuple[Images, str]:
    channels, size, _ = package.input_size
    if data is not None:
        found = in_distribution.load_labelled(data, size, channels, package.label_names, download=download)
        return found, data
    if recipe is None:
        raise UsageError(
            package.path, "has no recipe that names held-out images", "Give them with --data SOURCE."
        )
    try:
        found = loader.held_out(recipe, package.label_names, download=download)
    except SourceError as error:
        raise SourceError(
            error.thing,
            f"the recipe's held-out images are not to be had: {error.reason}",
            "Give labelled images with --data SOURCE.",
        ) from None
    if recipe.data.calibration is not None:
        return found, recipe.data.calibration
    return found, f"{recipe.data.train} (held out, seed {recipe.seed})"


def _copy(package: ModelPackage, out: Path) -> ModelPackage:
    """A package of the same content in another folder."""
    if out.exists() and out.resolve() == package.path.resolve():
        return package
    return packages.write(
        out,
        config=packages.portable_config(package) | {},
        weights=package.weights_path.read_bytes(),
        recipe_text=package.recipe_text,
        card=None,
    )
