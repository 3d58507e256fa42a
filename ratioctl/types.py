"""Results of the commands: frozen values of NumPy arrays and plain Python objects.

Field names are those of the JSON the command line writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ratioctl.recipe import Ball


class _ShortRepr:
    """A `repr` of one line: arrays as type and shape, long containers as their length."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = ", ".join(f"{field.name}={short_repr(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__name__}({shown})"


def short_repr(value: object) -> str:
    """`repr(value)` for a line of text: at most about 60 characters, and no numbers of an array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{value.dtype} {tuple(value.shape)}>" if value.shape else repr(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list | dict) and (
        len(value) > 4 or any(map(dataclasses.is_dataclass, value))
    ):
        return f"<{type(value).__name__} of {len(value)}>"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Measurement(_ShortRepr):
    """One number with its sample size, interval and origin.

    Attributes:
        name: "accuracy", "auroc", "fpr_at_95_tpr", "mmc", "ece", ...
        value: rates and confidences in [0,1].
        n: how many examples it was measured on.
        interval: 95 % confidence interval; None where none is defined.
        dataset: the SOURCE or its name.
        ball: the threat model of an attacked number; None for a clean one.
        details: further facts (attack, bins, fingerprint, duration), plain JSON values.
    """

    name: str
    value: float
    n: int
    interval: tuple[float, float] | None
    dataset: str
    ball: Ball | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in `report.json` and the config's `ratio.metrics`."""
        return {
            "name": self.name,
            "value": self.value,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "dataset": self.dataset,
            "ball": None if self.ball is None else self.ball.model_dump(mode="json"),
            **self.details,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report(_ShortRepr):
    """Measurements of one model, and warnings that limit their meaning."""

    package_digest: str
    seed: int
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "package_digest": self.package_digest,
            "seed": self.seed,
            "measurements": [measurement.to_json() for measurement in self.measurements],
            "warnings": list(self.warnings),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attacked(_ShortRepr):
    """An image and its attacked version, both uint8 (H, W, C), for display.

    Attributes:
        before, after: confidences of the image and of the point found (before rounding to 8 bits).
        label: predicted label of the attacked image.
    """

    dataset: str
    image: np.ndarray
    attacked: np.ndarray
    before: float
    after: float
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluated(_ShortRepr):
    """One model's part of an evaluation.

    Attributes:
        name: of the package; different for every model of one evaluation.
        figures: figure data, plain JSON values.
        gallery: attacked OOD images with the highest confidence.
        examples: columns of equal length, one entry per example and attack.
    """

    name: str
    report: Report
    figures: dict[str, Any]
    gallery: tuple[Attacked, ...]
    examples: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation(_ShortRepr):
    """Result of `ratioctl evaluate`: one or several models on the same data.

    Attributes:
        suite: its name; `protocol` describes it in words.
        data: per set "name", "source", "n", "fingerprint".
        environment: versions, hardware, precision.
        comparison: with a published protocol, its table: our rows and the published ones
            (`evaluation.protocols.comparison`).
    """

    suite: str
    protocol: str
    data: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    models: tuple[Evaluated, ...]
    comparison: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """`report.json`: plain JSON values."""
        return {
            "schema": "ratioctl/evaluation/1",
            "suite": self.suite,
            "protocol": self.protocol,
            "data": [dict(entry) for entry in self.data],
            "environment": dict(self.environment),
            **({} if self.comparison is None else {"comparison": self.comparison}),
            "models": [
                {"name": model.name, **model.report.to_json(), "figures": model.figures}
                for model in self.models
            ],
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ScoreRow(_ShortRepr):
    """One scored image, or why it could not be read (`error`; the rest is then None).

    Attributes:
        confidence: max_k p_k after temperature.
        ood_score: 1 - confidence; higher is more outlying.
        is_ood: confidence < threshold.
        probabilities: (K,), where requested.
        worst_case_confidence, worst_case_is_ood: of the attacked image, where requested.
        guaranteed_confidence: what the confidence cannot exceed in the linf ball of the model's certified
            head, where requested.

    With `explain`:
        margin: acceptance minus its bound, in log-odds for the default score; below 0 for flagged images.
        runner_up: the second most likely class.
        percentile: of the calibration images, the percentage with a lower acceptance.
        reason: of a flagged image, in words.

    With `checks`:
        width, height: of the file, before it is turned and resized.
        blank: all pixels have about the same color.
        saturated: at least half of the pixels are 0 or 255 in all channels.
        duplicate: the model's 8-bit input is that of the image before.
        notes: how the file was converted; pixels_sha256: of the model's 8-bit input.

    Of a shard:
        index: place of the image among those of all shards, from 0.
    """

    path: str
    label: str | None = None
    confidence: float | None = None
    ood_score: float | None = None
    is_ood: bool | None = None
    error: str | None = None
    probabilities: tuple[float, ...] | None = None
    worst_case_confidence: float | None = None
    worst_case_is_ood: bool | None = None
    guaranteed_confidence: float | None = None
    margin: float | None = None
    runner_up: str | None = None
    percentile: float | None = None
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    blank: bool | None = None
    saturated: bool | None = None
    duplicate: bool | None = None
    notes: str | None = None
    pixels_sha256: str | None = None
    index: int | None = None

    def to_json(self, labels: Sequence[str] | None = None) -> dict[str, Any]:
        """The row of `ood-score --format jsonl`; `labels` adds p:<class> each.

        What is filled in of the fields of a worst case, a guarantee, `explain`, `checks` and a shard follows.
        """
        row: dict[str, Any] = {name: getattr(self, name) for name in _FIXED}
        each = self.probabilities or [None] * len(labels or ())
        row |= {f"p:{label}": p for label, p in zip(labels or (), each, strict=bool(labels))}
        row |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return {key: float(f"{v:.9g}") if isinstance(v, float) else v for key, v in row.items()}


_FIXED = ("path", "label", "confidence", "ood_score", "is_ood", "error")
_FIELDS = [field.name for field in dataclasses.fields(ScoreRow)]
_OPTIONAL = [name for name in _FIELDS if name not in (*_FIXED, "probabilities")]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Prediction(_ShortRepr):
    """What a classifier says about one image.

    Attributes:
        label: the class of the largest logit.
        confidence: max_k p_k after temperature.
        ood_score: larger is more outlying; 1 - confidence for the default score.
        is_ood: whether the image is flagged as out of distribution; None where the model has no threshold.
        probabilities: (K,) float64, after temperature, in the order of `labels`.
        labels: K class names.
    """

    label: str
    confidence: float
    ood_score: float
    is_ood: bool | None
    probabilities: np.ndarray
    labels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `probabilities` by class name."""
        return {
            "label": self.label,
            "confidence": self.confidence,
            "ood_score": self.ood_score,
            "is_ood": self.is_ood,
            "probabilities": dict(zip(self.labels, self.probabilities.tolist(), strict=True)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Original(_ShortRepr):
    """How the model sees the unchanged image: its 8-bit input."""

    label: str
    confidence: float
    probabilities: tuple[float, ...]  # (K,), after temperature
    is_ood: bool | None  # None where the model has no threshold


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Counterfactual(_ShortRepr):
    """The counterfactual of one radius, as the 8-bit picture that is saved.

    Attributes:
        eps: radius of the ball.
        image: uint8 (H, W, C); inside the ball around the 8-bit input.
        confidence: p_target of `image`; never falls as eps grows.
        confidence_float: p_target of the best point before rounding to 8 bits.
        predicted: the label of `image`; probabilities: (K,), of `image`.
        is_ood: whether the largest of them is below the default threshold; None without a threshold.
        distance: "l1", "l1.5", "l2" and "linf" of `image` from the 8-bit input, pixels in [0,1].
        png: where it was saved, relative to the output folder; None before that.
    """

    eps: float
    image: np.ndarray
    confidence: float
    confidence_float: float
    predicted: str
    probabilities: tuple[float, ...]
    distance: dict[str, float]
    png: str | None = None
    is_ood: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "png": self.png,
            "confidence": self.confidence,
            "confidence_float": self.confidence_float,
            "predicted": self.predicted,
            "is_ood": self.is_ood,
            "probabilities": list(self.probabilities),
            "distance": dict(self.distance),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Target(_ShortRepr):
    """The counterfactuals for one target class, budgets ascending.

    The two radii are the smallest ones found, so upper bounds.

    Attributes:
        flip_eps: distance of `flip_image`, which is predicted as the target (or reaches --until); 0 if the
            original is; None exactly when no budget flips.
        flip_image: uint8 (H, W, C), None when flip_eps is.
        flip_confidence, flip_is_ood: of `flip_image`.
        in_distribution_eps: smallest radius found at which a picture is predicted as the target and its
            confidence reaches the default threshold; None where no budget does, or without a threshold.
    """

    target: str
    budgets: tuple[Counterfactual, ...]
    flip_eps: float | None
    flip_image: np.ndarray | None
    flip_png: str | None = None
    flip_confidence: float | None = None
    flip_is_ood: bool | None = None
    in_distribution_eps: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "flip_eps": self.flip_eps,
            "flip_png": self.flip_png,
            "flip_confidence": self.flip_confidence,
            "flip_is_ood": self.flip_is_ood,
            "in_distribution_eps": self.in_distribution_eps,
            "budgets": [budget.to_json() for budget in self.budgets],
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Explanation(_ShortRepr):
    """One image explained by one model: an entry of `images` in counterfactuals.json.

    Attributes:
        path: as given; sha256: of the file's bytes.
        model: index into the requested models.
        input: uint8 (H, W, C), the model's 8-bit input.
        input_png: where it was saved, relative to the output folder; None before that.
        notes: how the image was converted (oriented, cropped, resized, ...).
        norm: of its budgets, where several were requested; None where it is that of the document.
    """

    path: str
    sha256: str
    model: int
    input: np.ndarray
    original: Original
    targets: tuple[Target, ...]
    input_png: str | None = None
    notes: tuple[str, ...] = ()
    norm: str | None = None

    def to_json(self) -> dict[str, Any]:
        original = dataclasses.asdict(self.original)
        original["probabilities"] = list(self.original.probabilities)
        return {
            "path": self.path,
            "sha256": self.sha256,
            "model": self.model,
            **({} if self.norm is None else {"norm": self.norm}),
            "input_png": self.input_png,
            "original": original,
            "targets": [target.to_json() for target in self.targets],
        }
