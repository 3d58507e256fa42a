"""`config.json`: its schema, its checks and its digest.

**Digest.** The SHA-256 of the JSON (sorted keys, no spaces, ASCII) of `architecture`,
`architecture_options`, `label_names`, `input_size`, `mean`, `std`, `interpolation`, `temperature`,
`thresholds` and `weights`, the SHA-256 of the weights file, and of `score` and `score_thresholds` where
another score than the maximum softmax probability is stored, and of `class_thresholds` where there are any;
numbers that may be fractional are written as
floats. Metrics, cards and exports do not change it. It is recorded as `ratio.digest`, so that a manual edit
of those parts is noticed (`ModelPackage.edited`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ratioctl import scores
from ratioctl.errors import PackageError, UncalibratedError, UsageError
from ratioctl.utils.defaults import CERTIFIED
from ratioctl.utils.frame import Frame
from ratioctl.utils.text import safe_text

FORMAT = 1
SCORE = "max-softmax"  # `ratio.score` where none is given: the config name of the score "msp"
CERTIFIED_RADIUS = 0.01  # linf, where `ratio.certified` gives none
MAX_CONFIG_BYTES = 32 * 2**20
MAX_DEPTH = 64
MAX_SIDE = 2048  # pixels: at 4096 one image of a ResNet-18 needs 5 GB of activations
MAX_LADDER = 100
LARGEST = 1e6  # of temperatures and normalizations, and its inverse the smallest: float32 computes with them
AGAIN = "Get the package again, or package it again from its checkpoint."

ROLES = WEIGHTS, RECIPE, CARD, ONNX = "model.safetensors", "recipe.toml", "README.md", "model.onnx"
STAGED = re.compile(r"(model|recipe|README)-[0-9a-f]{8}(\.safetensors|\.toml|\.md|\.onnx)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A checked `config.json`, or the same block in an ONNX file's metadata.

    Attributes:
        config: the whole document, plain JSON values.
        name: `ratio.name`, or the name of the folder or file.
        label_names: K different names, in the order of the logits.
        input_size: (C, H, W).
        mean, std: C values each, of pixels in [0,1].
        temperature: above 0; logits are divided by it before the softmax.
        thresholds: name ("tpr95") to confidence in [0,1]; empty where the model is not calibrated.
        score: the OOD score that is used where none is requested, a name of `ratioctl.scores`.
        score_thresholds: score name to thresholds, for the calibrated scores other than "msp".
        class_thresholds: score name to the names of thresholds that differ by class, to class to value; a
            class that is absent uses the common threshold.
        ladders: counterfactual budgets by norm name ("1", "1.5", "2", "inf"), ascending.
    """

    config: dict[str, Any] = dataclasses.field(repr=False)
    name: str
    architecture: str
    architecture_options: dict[str, Any]
    label_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    temperature: float
    thresholds: dict[str, float]
    score: str
    score_thresholds: dict[str, dict[str, float]]
    ladders: dict[str, tuple[float, ...]]
    class_thresholds: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)

    @property
    def frame(self) -> Frame:
        """Height and width of the input, whether images are padded to its shape or cut, and their bits."""
        pad = self.config["pretrained_cfg"].get("crop_mode", "center") == "border"
        return Frame(self.input_size[1], self.input_size[2], pad, self.config["ratio"].get("bit_depth"))

    @property
    def calibrated(self) -> bool:
        return bool(self.thresholds)

    @property
    def certified(self) -> float | None:
        """The linf radius at which the confidence of OOD images is bounded; None without a certified head."""
        if not self.architecture.startswith(CERTIFIED):
            return None
        return float(self.config["ratio"].get("certified", {}).get("eps", CERTIFIED_RADIUS))

    @property
    def ood_score(self) -> scores.OodScore:
        """The score by which images are flagged."""
        return scores.by_name(self.score)

    def thresholds_of(self, score: str) -> dict[str, scores.Threshold]:
        """Stored thresholds of a score; empty where it has not been calibrated.

        Values are `scores.Threshold`, with one for each class where they were calibrated per class.
        """
        stored = self.thresholds if score == scores.DEFAULT else self.score_thresholds.get(score, {})
        own = self.class_thresholds.get(score, {})
        return {
            name: scores.Threshold(
                value,
                tuple(own[name].get(label, value) for label in self.label_names) if name in own else None,
            )
            for name, value in stored.items()
        }


def threshold(spec: Spec, which: str | float = "tpr95", score: str | None = None) -> float:
    """The threshold of an OOD score: for "msp" the confidence below which an image is flagged, for every
    other score the value above which it is flagged.

    Args:
        which: a stored name such as "tpr95", or a number (also as text). A `scores.Threshold` is returned as
            it is.
        score: a name of `ratioctl.scores`; None takes the package's.

    Returns:
        A number; for a stored name a `scores.Threshold`, which also holds thresholds per class.

    Raises:
        UncalibratedError: a name, and the model has no thresholds for this score.
        UsageError: a name that the model does not have (its own are listed), or a number out of range.
    """
    kind = scores.by_name(score or spec.score)
    stored = spec.thresholds_of(kind.name)
    if isinstance(which, str) and which in stored:
        return stored[which]
    if isinstance(which, scores.Threshold):
        return which
    try:
        number = float(which)
    except ValueError:
        number = None
    low, high = kind.threshold_range
    if number is not None:
        if low <= number <= high and math.isfinite(number):
            return number
        what = "a confidence in [0,1]" if kind.name == "msp" else f"a value of the score {kind.name}"
        raise UsageError(f"threshold {which}", f"is not {what}", "For example: 0.35.")
    named = re.fullmatch(r"tpr[0-9.]+", str(which))
    if not stored and named:
        other = "" if kind.name == "msp" else f" for the score {kind.name}"
        option = "" if kind.name == "msp" else f" with --score {kind.name}"
        raise UncalibratedError(
            spec.name,
            f"has no threshold {which}{other}: it is not calibrated",
            f"Run `ratioctl calibrate {spec.name}{option} --data SOURCE --out DIR`.",
        )
    listed = ", ".join(sorted(stored)) or "none"
    reason = f"{spec.name} has no such threshold" if named else "is neither a name nor a number"
    number_too = (
        "a confidence in [0,1] works too, for example 0.35" if kind.name == "msp" else "a number works too"
    )
    raise UsageError(f"threshold {str(which)!r:.40}", reason, f"{spec.name} has {listed}; {number_too}.")


def certified_radius(spec: Spec) -> float:
    """The linf radius at which the confidence of OOD images is bounded. Raises UsageError without a head."""
    if spec.certified is None:
        raise UsageError(
            spec.name,
            f"has no certified head, so nothing bounds its confidence (its architecture is "
            f"{spec.architecture})",
            "Train one on it, for example: ratioctl train cifar10-prood-head --init MODEL.",
        )
    return spec.certified


def portable_config(spec: Spec) -> dict[str, Any]:
    """The config without `ratio.files`: the block an ONNX file carries in its metadata."""
    ratio = {key: value for key, value in spec.config["ratio"].items() if key != "files"}
    return {**spec.config, "ratio": {"name": spec.name, **ratio}}


def parse_config(config: object, where: object, *, name: str) -> Spec:
    """Check a config document, from a package or from an ONNX file's metadata.

    Args:
        config: plain JSON values.
        where: what messages call it.
        name: the model's name where `ratio.name` is absent.

    Raises:
        PackageError: not ours, an unknown format, or an impossible value.
    """
    if not isinstance(config, dict) or not isinstance(config.get("ratio"), dict):
        raise PackageError(
            where, 'has no "ratio" part, so ratioctl did not write it', "Use `ratioctl package`."
        )
    ratio = config["ratio"]
    version = ratio.get("format")
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        raise PackageError(
            where,
            f"has format {version!r:.40}; this ratioctl reads format {FORMAT}",
            "Update ratioctl." if newer else AGAIN,
        )
    check = _Checks(where)
    labels = check.labels(config)
    check.certified(ratio.get("certified"), config.get("architecture"))
    return Spec(
        config=config,
        name=ratio["name"] if isinstance(ratio.get("name"), str) and ratio["name"] else name,
        label_names=labels,
        class_thresholds=check.class_thresholds(ratio.get("class_thresholds", {}), labels),
        **check.architecture(config),
        **check.input(config.get("pretrained_cfg")),
        **check.calibration(ratio),
        ladders=check.ladders(ratio.get("ladders", {})),
    )


@dataclasses.dataclass(frozen=True)
class _Checks:
    """The parts of a config document, each checked and converted; `where` is what messages call it."""

    where: object

    def bad(self, key: str, what: str) -> NoReturn:
        raise PackageError(self.where, f'"{key}" {what}', AGAIN)

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        labels = config.get("label_names")
        if (
            not isinstance(labels, list)
            or len(labels) < 2
            or not all(isinstance(x, str) and x for x in labels)
        ):
            self.bad("label_names", "must be a list of two or more names")
        if any("\ud800" <= ch <= "\udfff" for label in labels for ch in label):
            self.bad("label_names", "is not valid Unicode")
        if len(set(labels)) != len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            self.bad("label_names", f'holds "{twice}" twice, and labels are matched by name')
        count = config.get("num_classes", len(labels))
        if count != len(labels):
            self.bad("num_classes", f"is {count!r:.40}, but there are {len(labels)} label names")
        return tuple(labels)

    def architecture(self, config: Mapping[str, Any]) -> dict[str, Any]:
        architecture, options = config.get("architecture"), config.get("architecture_options", {})
        if not isinstance(architecture, str) or not architecture:
            self.bad("architecture", "must be a name")
        if not isinstance(options, dict):
            self.bad("architecture_options", "must be a table of options")
        return {"architecture": architecture, "architecture_options": options}

    def certified(self, stated: object, architecture: object) -> None:
        if stated is None:
            return
        if not isinstance(architecture, str) or not architecture.startswith(CERTIFIED):
            self.bad("ratio.certified", f"needs an architecture {CERTIFIED}NAME, which has a certified head")
        eps = _number(stated.get("eps")) if isinstance(stated, dict) else None
        if not isinstance(stated, dict) or stated.get("norm") != "inf" or eps is None or not 0 < eps <= 1:
            self.bad("ratio.certified", 'must hold "norm": "inf" and "eps", a radius above 0 and at most 1')

    def input(self, pixels: object) -> dict[str, Any]:
        if not isinstance(pixels, dict):
            self.bad("pretrained_cfg", "is missing")
        size = pixels.get("input_size")
        if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)):
            self.bad("pretrained_cfg.input_size", "must be [channels, height, width]")
        if size[0] not in (1, 3) or max(size[1:]) > MAX_SIDE:
            self.bad("pretrained_cfg.input_size", f"is {size}; channels are 1 or 3, sides at most {MAX_SIDE}")
        mean = _numbers(pixels.get("mean"), size[0])
        if mean is None or max(map(abs, mean)) > LARGEST:
            self.bad("pretrained_cfg.mean", f"must be {size[0]} number(s) of at most {LARGEST:g} in size")
        std = _numbers(pixels.get("std"), size[0])
        if std is None or not 1 / LARGEST <= min(std) <= max(std) <= LARGEST:
            self.bad("pretrained_cfg.std", f"must be {size[0]} number(s) from {1 / LARGEST:g} to {LARGEST:g}")
        interpolation = pixels.get("interpolation", "bicubic")
        if pixels.get("crop_mode", "center") not in ("center", "border"):
            self.bad("pretrained_cfg.crop_mode", 'must be "center" (cut) or "border" (padded)')
        if not isinstance(interpolation, str):
            self.bad("pretrained_cfg.interpolation", "must be a name")
        return {"input_size": tuple(size), "mean": mean, "std": std, "interpolation": interpolation}

    def calibration(self, ratio: Mapping[str, Any]) -> dict[str, Any]:
        score = scores.by_config_name(ratio.get("score", SCORE))
        if score is None:
            known = ", ".join(f'"{scores.by_name(name).config_name}"' for name in scores.names())
            self.bad("ratio.score", f"is {ratio['score']!r:.40}; this ratioctl knows {known}")
        depth = ratio.get("bit_depth")
        if depth is not None and not (type(depth) is int and 9 <= depth <= 16):
            self.bad("ratio.bit_depth", "must be a whole number from 9 to 16")
        temperature = _number(ratio.get("temperature", 1.0))
        if temperature is None or not 1 / LARGEST <= temperature <= LARGEST:
            self.bad("ratio.temperature", f"must be a number from {1 / LARGEST:g} to {LARGEST:g}")
        thresholds = ratio.get("thresholds", {})
        if not isinstance(thresholds, dict):
            self.bad("ratio.thresholds", "must be a table")
        checked = {key: _number(value) for key, value in thresholds.items()}
        if any(value is None or not 0 <= value <= 1 for value in checked.values()):
            self.bad("ratio.thresholds", "must be confidences in [0,1]")
        others = self.score_thresholds(ratio.get("score_thresholds", {}))
        return {
            "temperature": temperature,
            "thresholds": checked,
            "score": score.name,
            "score_thresholds": others,
        }

    def score_thresholds(self, table: object) -> dict[str, dict[str, float]]:
        if not isinstance(table, dict) or not all(isinstance(stored, dict) for stored in table.values()):
            self.bad("ratio.score_thresholds", "must hold one table for each score")
        found = {}
        for name, stored in table.items():
            kind = scores.by_config_name(name)
            checked = {key: _number(value) for key, value in stored.items()}
            if kind is None or kind.name == scores.DEFAULT:
                self.bad("ratio.score_thresholds", f"has no score {name!r:.40}")
            if any(value is None for value in checked.values()):
                self.bad(f"ratio.score_thresholds.{name}", "must be finite numbers")
            found[kind.name] = {key: value for key, value in checked.items() if value is not None}
        return found

    def class_thresholds(
        self, table: object, labels: Sequence[str]
    ) -> dict[str, dict[str, dict[str, float]]]:
        key = "ratio.class_thresholds"
        if not isinstance(table, dict) or not all(isinstance(stored, dict) for stored in table.values()):
            self.bad(key, "must hold one table for each score")
        found: dict[str, dict[str, dict[str, float]]] = {}
        for score, stored in table.items():
            kind = scores.by_config_name(score)
            if kind is None:
                self.bad(key, f"has no score {score!r:.40}")
            low, high = kind.threshold_range
            for name, own in stored.items():
                values = {x: _number(y) for x, y in own.items()} if isinstance(own, dict) else {"": None}
                if not set(values) <= set(labels):
                    self.bad(f"{key}.{score}.{name:.40}", "must hold thresholds by class")
                if any(value is None or not low <= value <= high for value in values.values()):
                    self.bad(f"{key}.{score}.{name:.40}", f"must hold numbers from {low:g} to {high:g}")
                kept = {x: y for x, y in values.items() if y is not None}
                found.setdefault(kind.name, {})[name] = kept
        return found

    def ladders(self, table: object) -> dict[str, tuple[float, ...]]:
        if not isinstance(table, dict):
            self.bad("ratio.ladders", "must be a table")
        ladders = {}
        for norm, budgets in table.items():
            ladder = _numbers(budgets, None)
            if norm not in ("1", "1.5", "2", "inf") or not ladder or min(ladder) <= 0:
                self.bad("ratio.ladders", "must hold lists of radii above 0 for the norms 1, 1.5, 2 and inf")
            ladders[norm] = tuple(sorted(set(ladder)))
            if len(ladders[norm]) > MAX_LADDER:
                self.bad("ratio.ladders", f"holds {len(ladders[norm])} radii; {MAX_LADDER} are allowed")
        return ladders


def _number(value: object) -> float | None:
    """A finite number as a float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(value: object, count: int | None) -> tuple[float, ...] | None:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return None
    numbers = [_number(item) for item in value]
    return tuple(n for n in numbers if n is not None) if None not in numbers else None


def parse_document(raw: bytes, where: object) -> Any:
    """JSON without duplicate keys, NaN or infinity, at most MAX_DEPTH deep.

    Raises:
        PackageError: anything else; `where` is what the message calls it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f'the key "{key}" occurs twice')
            table[key] = value
        return table

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is not a finite number")
        return number

    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
        if _deeper_than(document, MAX_DEPTH):
            raise RecursionError
        return document
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except ValueError as error:  # includes JSONDecodeError
        reason = str(error)
    raise PackageError(where, f"is not valid JSON: {reason}", AGAIN)


def _deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True


def recorded_files(config: Mapping[str, Any], where: object) -> dict[str, str]:
    """`ratio.files`, checked: plain names inside the folder, one per role, weights among them."""
    files = config["ratio"].get("files")
    if not isinstance(files, dict):
        raise PackageError(where, '"ratio.files" is missing', AGAIN)
    for name, recorded in files.items():
        inside = name and not name.startswith(".") and not any(ch in "/\\:\0" for ch in name)
        if not inside or name == "config.json" or name != safe_text(name) or len(os.fsencode(name)) > 255:
            raise PackageError(where, f'"ratio.files" holds {name!r:.80}, not a file name', AGAIN)
        if not isinstance(recorded, str) or not re.fullmatch(r"[0-9a-f]{64}", recorded):
            raise PackageError(where, f'"ratio.files" has no SHA-256 for {name}', AGAIN)
    roles = [plain_name(name) for name in files]
    if len(set(roles)) != len(roles):
        raise PackageError(where, '"ratio.files" names two files for the same role', AGAIN)
    if WEIGHTS not in roles:
        raise PackageError(where, f'"ratio.files" does not name {WEIGHTS}', AGAIN)
    return files


def plain_name(name: str) -> str:
    """ "README.md" for "README-1a2b3c4d.md"; other names unchanged."""
    staged = STAGED.fullmatch(name)
    return staged[1] + staged[2] if staged else name


def digest_of(spec: Spec, files: Mapping[str, str]) -> str:
    """The model's digest, see the module; `files` maps file names to their SHA-256."""
    decisive = {
        "architecture": spec.architecture,
        "architecture_options": spec.architecture_options,
        "label_names": spec.label_names,
        "input_size": spec.input_size,
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "temperature": spec.temperature,
        "thresholds": spec.thresholds,
        "weights": next(recorded for name, recorded in files.items() if plain_name(name) == WEIGHTS),
    }
    if spec.frame.pad:
        decisive["crop_mode"] = "border"
    if spec.frame.bit_depth is not None:
        decisive["bit_depth"] = spec.frame.bit_depth
    if spec.score != scores.DEFAULT or spec.score_thresholds:
        decisive |= {"score": spec.score, "score_thresholds": spec.score_thresholds}
    if spec.class_thresholds:
        decisive["class_thresholds"] = spec.class_thresholds
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def names(specs: Sequence[Spec]) -> list[str]:
    """The models' names, numbered where one occurs again."""
    found: list[str] = []
    for spec in specs:
        name, k = spec.name, 2
        while name in found:
            name, k = f"{spec.name}-{k}", k + 1
        found.append(name)
    return found
