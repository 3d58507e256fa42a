"""Calibration of a package on held-out images: its temperature and thresholds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ratioctl import metrics, scores
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.calibration.temperature import calibration_errors, find_temperature, improves_held_out
from ratioctl.calibration.thresholds import score_thresholds, tpr_thresholds
from ratioctl.data import in_distribution, loader
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError
from ratioctl.models.device import select_device
from ratioctl.models.network import from_package
from ratioctl.models.normalization import other_order
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Calibration, Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Results of a calibration.

    Attributes:
        package: the calibrated package.
        temperature: logits are divided by it.
        thresholds: "tpr95", "tpr99" to confidences.
        score, score_thresholds: name of the package's OOD score, and its thresholds.
        n, accuracy: of the held-out images.
        chance: accuracy of always predicting the most frequent class of the held-out images.
        before, after: "ece" (search bins), "ece_report" (report bins), "nll", "mean_confidence".
        warnings: to be shown beside the numbers.
        unreadable: number of held-out images that could not be read and were left out.
    """

    package: ModelPackage
    temperature: float
    thresholds: dict[str, float]
    score: str
    score_thresholds: dict[str, float]
    n: int
    accuracy: float
    chance: float
    before: dict[str, float]
    after: dict[str, float]
    warnings: tuple[str, ...]
    unreadable: int

    @property
    def collapsed(self) -> bool:
        """Whether the accuracy is no better than chance, within two standard errors."""
        return self.accuracy <= self.chance + 2 * (self.chance * (1 - self.chance) / self.n) ** 0.5


def calibrate(
    model: str | os.PathLike[str] | ModelPackage,
    *,
    data: str | None = None,
    objective: Literal["ece", "nll"] | None = None,
    out: Path | None = None,
    score: str | None = None,
    weights: Literal["fp16"] | None = None,
    device: str = "auto",
    download: bool = False,
) -> Calibrated:
    """Choose the temperature and thresholds of a package on held-out labelled images and write them to it.

    Args:
        model: a package, its folder, or a bundled model's name.
        data: a labelled SOURCE; None takes the split that the package's recipe held out.
        objective: what the temperature minimises; None takes the recipe's (ece).
        out: write a new package there and leave the old one unchanged.
        score: name of an OOD score (`ratioctl.scores`) to calibrate and make the package's own; None keeps
            the package's. Confidences and their thresholds are stored in any case.
        weights: "fp16" stores the weights of the new package, which needs `out`, in half the bytes; they are
            computed with in fp32.

    Raises:
        SourceError: no data, or class folders that are no labels of the model.
        OutputError: a bundled model, and no `out`.
        PackageError: the package cannot be read.
    """
    package = packages.resolve(model)
    if weights is not None and (out is None or out.resolve() == package.path.resolve()):
        raise UsageError(
            f"--weights {weights}", "makes another model", "Write it to a new folder with --out."
        )
    if out is None:
        packages.check_writable(package)
    recipe = None if package.recipe_text is None else recipes.loads(package.recipe_text, str(package.path))
    spec = recipe.calibration if recipe is not None else Calibration()
    if objective is not None:
        spec = spec.model_copy(update={"objective": objective})
    images, source = _images(package, recipe, data, download)
    assert images.labels is not None
    compute = select_device(device, "fp32", reason="scores always are")
    network = from_package(package, compute.device, weights_as=weights or "fp32")
    logits = predictor(network, compute.device).predict(images.pixels)
    useful = improves_held_out(logits, images.labels, spec)
    temperature = find_temperature(logits, images.labels, spec) if useful else 1.0
    before = calibration_errors(logits, images.labels, 1.0, spec)
    after = calibration_errors(logits, images.labels, temperature, spec)
    thresholds = tpr_thresholds(metrics.confidence(logits, temperature))
    warnings = _warnings(spec, temperature, before, after, images)
    order = other_order(logits.argmax(1), images.labels, package.label_names)
    warnings = (*([] if order is None else [order]), *warnings)
    if not useful:
        warnings = ("no temperature improves held-out halves of the images; T = 1 is kept", *warnings)
    kind = scores.by_name(score or package.score)
    result = Calibrated(
        package=package,
        temperature=temperature,
        thresholds=thresholds,
        score=kind.name,
        score_thresholds=(
            thresholds if kind.name == scores.DEFAULT else score_thresholds(kind, logits, temperature)
        ),
        n=len(images),
        accuracy=float(metrics.accuracy(logits.argmax(1), images.labels)),
        chance=float(np.bincount(images.labels).max() / len(images)),
        before=before,
        after=after,
        warnings=warnings,
        unreadable=len(images.errors),
    )
    return _write(result, spec, source, images.fingerprint, out, half=weights is not None)


def _write(
    result: Calibrated, spec: Calibration, source: str, fingerprint: str, out: Path | None, *, half: bool
) -> Calibrated:
    """Write a calibration to its package, or to a copy of it in `out`."""
    package = result.package
    changes: dict[str, Any] = {
        "temperature": result.temperature,
        "thresholds": result.thresholds,
        "calibration": {
            "source": source,
            "fingerprint": fingerprint,
            "n": result.n,
            "objective": spec.objective,
            "accuracy": result.accuracy,
            "bins": spec.bins,
            "report_bins": spec.report_bins,
            "range": [1 / len(package.label_names), 1.0],
            "grid": {"low": spec.low, "high": spec.high, "temperatures": spec.temperatures},
            "before": result.before,
            "after": result.after,
            "warnings": list(result.warnings),
        },
    }
    kind = scores.by_name(result.score)
    others = {} if kind.name == scores.DEFAULT else {kind.config_name: result.score_thresholds}
    if others or package.score != kind.name or package.score_thresholds:
        changes |= {"score": kind.config_name, "score_thresholds": others}
    warnings = result.warnings
    same = (result.temperature, result.thresholds) == (package.temperature, package.thresholds)
    if package.config["ratio"].get("metrics") and (half or not same):
        changes["metrics"] = {}
        what = "weights" if half else "temperature or thresholds"
        warnings += (f"its measurements were made with other {what} and are removed",)
    if out is not None:
        package = _copy(package, out, half=half)
    written = packages.update(package, config_changes={"ratio": changes})
    return dataclasses.replace(result, package=written, warnings=warnings)


def _warnings(
    spec: Calibration, temperature: float, before: dict[str, float], after: dict[str, float], images: Images
) -> tuple[str, ...]:
    warnings = []
    if temperature <= spec.low * 1.0001 or temperature >= spec.high * 0.9999:
        warnings.append(
            f"the temperature {temperature:.4g} is at the end of the grid [{spec.low:g}, {spec.high:g}]"
        )
    for key, name, unit in (("ece_report", f"ECE ({spec.report_bins} bins)", ".2%"), ("nll", "NLL", ".4g")):
        if after[key] > before[key]:
            warnings.append(f"{name} rose from {before[key]:{unit}} to {after[key]:{unit}}")
    if len(images) < 1000:
        warnings.append(f"only {len(images)} held-out images")
    assert images.labels is not None
    missing = [name for k, name in enumerate(images.label_names) if not (images.labels == k).any()]
    if missing:
        warnings.append(f"no held-out image of {', '.join(missing)}")
    return (*warnings, *in_distribution.unreadable({in_distribution.short_name(images.source): images}))


def _images(
    package: ModelPackage, recipe: Recipe | None, data: str | None, download: bool
) -> tuple[Images, str]:
    channels, size = package.input_size[0], package.frame
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
            f"the recipe's held-out images are not available: {error.reason}",
            "Give labelled images with --data SOURCE.",
        ) from None
    if recipe.data.calibration is not None:
        return found, recipe.data.calibration
    return found, f"{recipe.data.train} (held out, seed {recipe.seed})"


def _copy(package: ModelPackage, out: Path, *, half: bool = False) -> ModelPackage:
    """A package of the same content in another folder, its weights in fp16 if `half`."""
    if out.exists() and out.resolve() == package.path.resolve():
        return package
    return packages.write(
        out,
        config=packages.portable_config(package),
        weights=(
            packages.to_half(packages.read_weights(package), package.weights_path)
            if half
            else package.weights_path.read_bytes()
        ),
        recipe_text=package.recipe_text,
        card=None,
    )
