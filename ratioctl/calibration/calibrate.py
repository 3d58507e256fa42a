"""Calibration of a package on held-out images: its temperature and thresholds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ratioctl import metrics, scores
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.calibration import named, rules
from ratioctl.calibration.temperature import calibration_errors, find_temperature, improves_held_out
from ratioctl.data import in_distribution, loader
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError
from ratioctl.models.device import select_device
from ratioctl.models.network import from_package
from ratioctl.models.normalization import other_order
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.package.config import SCORE
from ratioctl.recipe import Calibration, Recipe
from ratioctl.scores import Threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Results of a calibration.

    Attributes:
        package: the calibrated package.
        temperature: logits are divided by it.
        thresholds: "tpr95", "tpr99" and further names to confidences.
        score, score_thresholds: name of the package's OOD score, and its thresholds.
        records: of each threshold of `score`, its rule and its acceptance rates, see `thresholds.record`.
        acceptance: quantiles of the images' acceptances, see `thresholds.acceptance_record`.
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
    records: tuple[dict[str, Any], ...]
    acceptance: dict[str, Any]
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
    ood: Sequence[str] | Mapping[str, str] = (),
    thresholds: Sequence[str] | Mapping[str, str] = (),
    per_class: bool = False,
    keep_temperature: bool = False,
    weights: Literal["fp16"] | None = None,
    device: str = "auto",
    download: bool = False,
    on_search: Callable[[int], object] | None = None,
) -> Calibrated:
    """Choose the temperature and thresholds of a package on held-out labelled images and write them to it.

    `tpr95` and `tpr99` are always chosen. Thresholds of earlier calibrations under other names stay where the
    temperature stays the same; with another one they would mean something else and are removed.

    Args:
        model: a package, its folder, or a bundled model's name.
        data: a labelled SOURCE; None takes the split that the package's recipe held out.
        objective: what the temperature minimises; None takes the recipe's (ece).
        out: write a new package there and leave the old one unchanged.
        score: name of an OOD score (`ratioctl.scores`) to calibrate and make the package's own; None keeps
            the package's. Confidences and their thresholds are stored in any case.
        ood: OOD sets for the rules, "NAME=SOURCE" or SOURCE each, or a mapping.
        thresholds: "NAME=RULE" each, or a mapping; see `ratioctl.calibration.rules`.
        per_class: choose the thresholds of the rules for every predicted class too.
        keep_temperature: leave the package's temperature as it is.
        on_search: called with the number of images before they are attacked, for the rule "worst-pass".
        weights: "fp16" stores the weights of the new package, which needs `out`, in half the bytes; they are
            computed with in fp32.

    Raises:
        SourceError: no data, or class folders that are no labels of the model.
        UsageError: a rule that cannot be read, lacks its OOD set or images, or that no threshold satisfies.
        OutputError: a bundled model, and no `out`. PackageError: the package cannot be read.
    """
    package = packages.resolve(model)
    _check_out(package, out, weights)
    recipe = None if package.recipe_text is None else recipes.loads(package.recipe_text, str(package.path))
    spec = _spec(recipe, objective)
    sets = named.ood_sources(ood, data)
    wanted = rules.parse_all(thresholds, sets, per_class=per_class)
    images, source = _images(package, recipe, data, download)
    compute = select_device(device, "fp32", reason="scores always are")
    network = predictor(from_package(package, compute.device, weights_as=weights or "fp32"), compute.device)
    logits = network.predict(images.pixels)
    temperature, before, after, warnings = _temperature(package, logits, images, spec, keep_temperature)
    labels = np.asarray(images.labels)
    scored = named.ScoredSets(
        package=package,
        kind=scores.by_name(score or package.score),
        temperature=temperature,
        network=network,
        logits=logits,
        inside=images,
        outside=named.ood_sets(package, sets, download),
    )
    chosen = scored.choose(wanted, per_class, on_search)
    result = Calibrated(
        package=package,
        temperature=temperature,
        thresholds=chosen.confidences,
        score=scored.kind.name,
        score_thresholds=chosen.thresholds,
        records=chosen.records,
        acceptance=chosen.acceptance,
        n=len(images),
        accuracy=float(metrics.accuracy(logits.argmax(1), labels)),
        chance=float(np.bincount(labels).max() / len(images)),
        before=before,
        after=after,
        warnings=(*warnings, *chosen.warnings),
        unreadable=len(images.errors),
    )
    return _write(result, spec, source, images.fingerprint, out, half=weights is not None)


def _spec(recipe: Recipe | None, objective: str | None) -> Calibration:
    spec = recipe.calibration if recipe is not None else Calibration()
    return spec if objective is None else spec.model_copy(update={"objective": objective})


def _check_out(package: ModelPackage, out: Path | None, weights: str | None) -> None:
    """Refuse an output that cannot be written, before the images are scored."""
    if weights is not None and (out is None or out.resolve() == package.path.resolve()):
        step = "Write it to a new folder with --out."
        raise UsageError(f"--weights {weights}", "makes another model", step)
    if out is None:
        packages.check_writable(package)


def _temperature(
    package: ModelPackage, logits: np.ndarray, images: Images, spec: Calibration, keep: bool
) -> tuple[float, dict[str, float], dict[str, float], tuple[str, ...]]:
    """The temperature (the package's with `keep`), the errors before and after it, and warnings."""
    labels = images.labels
    assert labels is not None
    useful = keep or improves_held_out(logits, labels, spec)
    found = find_temperature(logits, labels, spec) if useful and not keep else 1.0
    temperature = package.temperature if keep else found
    before = calibration_errors(logits, labels, 1.0, spec)
    after = calibration_errors(logits, labels, temperature, spec)
    order = other_order(logits.argmax(1), labels, package.label_names)
    warnings = ([] if order is None else [order], _warnings(spec, temperature, before, after, images))
    said = () if useful else ("no temperature improves held-out halves of the images; T = 1 is kept",)
    return temperature, before, after, (*said, *warnings[0], *warnings[1])


def _write(
    result: Calibrated, spec: Calibration, source: str, fingerprint: str, out: Path | None, *, half: bool
) -> Calibrated:
    """Write a calibration to its package, or to a copy of it in `out`."""
    package = result.package
    changes: dict[str, Any] = {
        "temperature": result.temperature,
        "thresholds": {name: float(value) for name, value in result.thresholds.items()},
        "threshold_records": list(result.records),
        "acceptance": result.acceptance,
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
    plain = {name: float(value) for name, value in result.score_thresholds.items()}
    others = {} if kind.name == scores.DEFAULT else {kind.config_name: plain}
    tables = {SCORE: result.thresholds, kind.config_name: result.score_thresholds}
    by_class = {score: _by_class(package, stored) for score, stored in tables.items()}
    by_class = {score: table for score, table in by_class.items() if table}
    if by_class or package.class_thresholds:
        changes["class_thresholds"] = by_class
    if others or package.score != kind.name or package.score_thresholds:
        changes |= {"score": kind.config_name, "score_thresholds": others}
    warnings = result.warnings
    stored = package.thresholds_of(scores.DEFAULT)
    known = {name: result.thresholds.get(name) for name in stored}
    same = (result.temperature, known) == (package.temperature, stored)
    if package.config["ratio"].get("metrics") and (half or not same):
        changes["metrics"] = {}
        what = "weights" if half else "temperature or thresholds"
        warnings += (f"its measurements were made with other {what} and are removed",)
    if out is not None:
        package = _copy(package, out, half=half)
    written = packages.update(package, config_changes={"ratio": changes})
    return dataclasses.replace(result, package=written, warnings=warnings)


def _by_class(package: ModelPackage, stored: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Threshold name -> class -> its own threshold; classes that use the common one are left out."""
    found = {}
    for name, value in stored.items():
        if isinstance(value, Threshold) and value.classes is not None:
            pairs = zip(package.label_names, value.classes, strict=True)
            found[name] = {label: own for label, own in pairs if own != float(value)}
    return found


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
        text = "temperature and thresholds are uncertain; calibrate on more of them with `ratioctl calibrate`"
        warnings.append(f"only {len(images)} held-out images: {text}")
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
