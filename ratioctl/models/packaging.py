"""From a checkpoint of another training to a package, checked on images where there are some."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.errors import OutputError, UsageError
from ratioctl.models import import_checkpoint, normalization
from ratioctl.models.checkpoint_file import read
from ratioctl.models.network import Classifier
from ratioctl.models.registry import find_architecture, parse_option
from ratioctl.package import ModelPackage
from ratioctl.utils.frame import Frame

MAX_SIDE = 2048  # pixels
MAX_LABEL = 200  # characters of a class name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What images say about an imported classifier.

    Attributes:
        mean, std: of the normalized input, one per channel.
        n: how many images were used.
        accuracy: of the classifier on them; None without labels.
        warnings: a normalization or an order of labels that looks wrong.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    n: int
    accuracy: float | None
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
    """A package that was made of a checkpoint; it is not calibrated.

    Attributes:
        package: as written.
        prefix: what was removed from the names of the weights; renamed: how many other names were changed.
        notes: what was decided for the user, such as the input size.
        checked: None without `data`.
    """

    package: ModelPackage
    prefix: str
    renamed: int
    notes: tuple[str, ...]
    checked: Checked | None

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.checked is None else self.checked.warnings


def package_checkpoint(
    weights: str | os.PathLike[str],
    *,
    arch: str,
    labels: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | str | None = None,
    resize: Literal["crop", "pad"] = "crop",
    data: str | None = None,
    arch_options: Sequence[str] = (),
    ema: bool | None = None,
    force: bool = False,
    download: bool = False,
) -> Packaged:
    """Make a package of a classifier trained elsewhere; see `ratioctl.package_checkpoint`.

    Raises:
        OutputError: `out` holds a package, or cannot be written.
        UsageError: weights that do not fit, an unknown architecture or option, labels that are no class
            names, a missing normalization, or an input size that is missing or that the network cannot take.
        PackageError: a damaged checkpoint, or one whose logits are not finite.
        SourceError: `data` cannot be read, or its labels are not the model's.
    """
    path, folder = Path(weights), Path(out)
    if not force and (folder / "config.json").exists():
        raise OutputError(folder, "holds a package", "Name another folder, or replace it with --force.")
    names = _labels(labels)
    checkpoint = read(path, ema=ema)
    notes = []
    given = _values(mean), _values(std)
    if find_architecture(arch).normalizes:
        given = _of_pixels(arch, given)
        notes.append(f"Normalization: {arch} takes pixels in [0,1] and normalizes them itself.")
    elif given == (None, None) and (stored := import_checkpoint.stored_normalization(checkpoint)) is not None:
        given = stored
        notes.append("Normalization: taken from the checkpoint, which holds it.")
    normalization.check_normalization(*given)
    options = dict(parse_option(arch, text) for text in arch_options)
    if input_size is None:
        input_size, note = import_checkpoint.resolve_size(checkpoint, arch, len(names), options)
        notes.append(note)
    frame = _frame(str(input_size), resize)
    fitted = import_checkpoint.fit(
        checkpoint,
        arch,
        num_classes=len(names),
        mean=given[0] or (),
        std=given[1] or (),
        input_size=frame.built_for,
        options=options,
    )
    import_checkpoint.check_forward(fitted, checkpoint, arch, len(names), frame)
    checked = None if data is None else _checked(fitted.classifier, data, frame, names, download)
    written = import_checkpoint.write(fitted, checkpoint, arch, names, folder, input_size=frame)
    return Packaged(
        package=written,
        prefix=fitted.prefix,
        renamed=fitted.renamed,
        notes=(*notes, *(f"{path.name}: {note}." for note in fitted.notes)),
        checked=checked,
    )


def _of_pixels(
    arch: str, given: tuple[tuple[float, ...] | None, tuple[float, ...] | None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean 0 and standard deviation 1. Raises UsageError if others are given."""
    for name, values, neutral in zip(("--mean", "--std"), given, (0.0, 1.0), strict=True):
        if values is not None and any(v != neutral for v in values):
            reason = f"{arch} normalizes its pixels itself, which would happen twice"
            raise UsageError(name, reason, f"Leave {name} out.")
    return (0.0,), (1.0,)


def _frame(text: str, resize: str) -> Frame:
    """`N` or `HEIGHTxWIDTH`, each 1 to 2048."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        reason = f"is not a size of 1 to {MAX_SIDE} pixels"
        raise UsageError(f"--input-size {text}", reason, "For example 224, or 224x128 (height x width).")
    return Frame(height, width, resize == "pad")


def _values(given: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    return tuple(float(v) for v in np.atleast_1d(np.asarray(given, np.float64)))


def _checked(classifier: Classifier, data: str, side: Frame, names: list[str], download: bool) -> Checked:
    """Check the normalization and the labels' order on images of a SOURCE."""
    channels = classifier.mean.numel()
    images = in_distribution.load(data, side, channels, download=download)
    if images.labels is not None:
        images = in_distribution.load_labelled(data, side, channels, names, download=download)
    # A thousand images, spread over the classes, tell a right normalization from a wrong one.
    index = np.unique(np.linspace(0, len(images) - 1, 1000).astype(int))
    labels = None if images.labels is None else images.labels[index]
    statistics, trials = normalization.measure(classifier, images.pixels[index], labels)
    order = None
    if labels is not None and trials[0].predicted is not None:
        order = normalization.other_order(trials[0].predicted, labels, names)
    problems = normalization.find_problems(statistics, trials) if order is None else []
    accuracy = trials[0].accuracy
    warnings = [f"The normalization may be wrong: {problem}." for problem in problems]
    if order is not None:
        warnings.append(f"{order[0].upper()}{order[1:]}.")
    elif accuracy is not None and normalization.near_chance(accuracy, len(names), len(index)):
        warnings.append(f"Its accuracy, {accuracy:.1%}, is no better than chance with {len(names)} classes.")
    mean, std = statistics
    return Checked(mean=mean, std=std, n=len(index), accuracy=accuracy, warnings=tuple(warnings))


def _labels(given: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The names given, those in a file, one a line, or those of a text, separated by commas."""
    if not isinstance(given, str | os.PathLike):
        return _check_labels([str(name).strip() for name in given], "--labels")
    path, text = Path(given), os.fspath(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a list too long for a file name
        is_file = False
    if is_file:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UsageError(text, "is not UTF-8 text", "Write one class name a line.") from None
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [name.strip() for name in text.split(",")]
    if len(names) == 1 and ("/" in text or "." in text):
        raise UsageError(f"--labels {text}", "no such file", "Check the spelling of the path.")
    return _check_labels(names, f"--labels {text}")


def _check_labels(names: list[str], shown: str) -> list[str]:
    if any(len(name) > MAX_LABEL for name in names):
        longest = max(names, key=len)
        reason = f'holds a name of {len(longest)} characters, "{longest[:20]}..."; the most are {MAX_LABEL}'
        raise UsageError("--labels", reason, "Shorten it: every row of results repeats it.")
    if len(names) < 2 or not all(names):
        raise UsageError(shown, "names fewer than two classes", "For example: cat,dog,frog.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(shown, f'names "{twice}" twice', "Labels are matched by name.")
    return names
