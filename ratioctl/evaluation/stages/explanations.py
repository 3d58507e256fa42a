"""Stage "explanations": quality of a model's counterfactuals on a set of images.

The target of an ID image is a random other class, that of an OOD image the predicted class. Measured are the
saved 8-bit pictures. The result cache holds one entry per image.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl import images as pixels_of
from ratioctl import metrics, recipe
from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import NORMS, CounterfactualRequest, PreparedRequest
from ratioctl.counterfactuals.sources import Source
from ratioctl.data.in_distribution import Images
from ratioctl.evaluation import measurements
from ratioctl.evaluation.context import Context, Results
from ratioctl.evaluation.progress import Phase
from ratioctl.recipe import Ball
from ratioctl.types import Explanation, Measurement
from ratioctl.utils.result_cache import Arrays

QUANTILES = (0.25, 0.5, 0.75)
_DISTANCES = ("l1", "l2", "linf")


def plan(context: Context) -> Iterator[Phase]:
    step = context.step_seconds
    seconds = step * context.suite.explanation_steps * len(_radii(context))
    for name, images in context.data.all().items():
        yield context.phase(_phase(name), "explanation", len(images), seconds)


def compute(context: Context) -> None:
    for name, images in context.data.all().items():
        _search(context, name, images)


def run(context: Context, results: Results) -> None:
    steps = context.suite.explanation_steps
    for name, images in context.data.all().items():
        parts = _search(context, name, images)
        found = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        source = measurements.Source(
            name=name,
            images=images,
            seed=context.seed,
            seconds=round(float(found.pop("seconds").sum()), 3),
            common={"steps": steps},
        )
        measure = _inside if images.labels is not None else _outside
        results.measurements += measure(context, source, found)
        results.examples.extend(_columns(context, name, images, found))
    judge = context.judge
    if judge is not None and judge.package.digest == context.package.digest:
        results.warnings.append("the judge is the model itself, so its confidence does not show transfer")


def _phase(name: str) -> str:
    return f"explanations, {name}"


def _radii(context: Context) -> tuple[float, ...]:
    """The model's ladder of radii for the suite's norm."""
    channels, size = context.package.input_size[0], context.package.frame
    p = NORMS[context.suite.explanation_norm]
    return context.package.ladders.get(recipe.norm_name(p)) or recipe.default_ladder(p, size, channels)


def _ball(context: Context, eps: float) -> Ball:
    return Ball(p=NORMS[context.suite.explanation_norm], eps=eps)


def target_of(pixels: np.ndarray, label: int, classes: int, seed: int) -> int:
    """A random class other than `label`, determined by seed and pixels."""
    text = f"{seed}\n{pixels_of.pixels_sha256(pixels)}\ntarget"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % max(classes - 1, 1)
    return (draw + (draw >= label)) % classes


def _search(context: Context, name: str, images: Images) -> list[Arrays]:
    """The result of every image."""
    labels, suite = context.package.label_names, context.suite
    targets = [
        "predicted"
        if images.labels is None
        else labels[target_of(pixels, int(images.labels[k]), len(labels), context.seed)]
        for k, pixels in enumerate(images.pixels)
    ]
    request = CounterfactualRequest(
        targets=("predicted",),
        p=NORMS[suite.explanation_norm],
        eps=_radii(context),
        steps=suite.explanation_steps,
        restarts=1,
        seed=context.seed,
        threshold=context.package.thresholds.get("tpr95"),
    )

    def compute(missing: list[slice]) -> Iterator[Arrays]:
        sources = tuple(
            Source(
                path=f"{name}/{at.start}",
                read=functools.partial(pixels_of.encoded, images.pixels[at.start]),
                targets=(targets[at.start],),
            )
            for at in missing
        )
        compute = context.subject.compute
        found = explain(
            PreparedRequest(models=((context.package, request),), sources=sources),
            device=str(compute.device),
            precision="bf16" if compute.bf16 else "fp32",
            together=1 if compute.device.type == "cpu" else None,
        )
        return (_arrays(explanation, labels) for explanation in found)

    at = [-1 if target == "predicted" else labels.index(target) for target in targets]
    settings = [suite.explanation_norm, list(_radii(context)), suite.explanation_steps, request.threshold]
    return context.batches.stream(
        _phase(name), images.pixels, compute, labels=np.array(at), settings=settings, size=1
    )


def _arrays(explanation: Explanation, labels: Sequence[str]) -> Arrays:
    """One image's result as arrays (R radii), pictures included.

    "flip" and "in_distribution" are NaN, and "flip_picture" is the input, where no radius reaches the target.
    """
    (target,) = explanation.targets
    flip = explanation.input if target.flip_image is None else target.flip_image
    budgets = target.budgets
    return {
        "target": np.array(labels.index(target.target)),
        "before": np.array(explanation.original.probabilities),
        "confidence": np.array([budget.confidence for budget in budgets]),
        "largest": np.array([max(budget.probabilities) for budget in budgets]),
        "predicted": np.array([labels.index(budget.predicted) for budget in budgets]),
        "distance": np.array([[budget.distance[key] for key in _DISTANCES] for budget in budgets]),
        "changed": np.array([changed(budget.image, explanation.input) for budget in budgets]),
        "pictures": np.stack([budget.image for budget in budgets]),
        "flip": np.array(np.nan if target.flip_eps is None else target.flip_eps),
        "in_distribution": np.array(
            np.nan if target.in_distribution_eps is None else target.in_distribution_eps
        ),
        "flip_changed": np.array(changed(flip, explanation.input)),
        "flip_picture": flip,
    }


def changed(picture: np.ndarray, original: np.ndarray) -> float:
    """Fraction of the pixels of (H, W, C) uint8 that differ by more than 1/255 in some channel."""
    difference = np.abs(picture.astype(np.int64) - original.astype(np.int64))
    return float((difference > 1).any(2).mean())


# --- measurements ------------------------------------------------------------------------------------------


def _inside(
    context: Context, source: measurements.Source, found: Mapping[str, np.ndarray]
) -> list[Measurement]:
    """Counterfactuals of ID images: target reached, distances, judge, smallest radius."""
    target, n, radii = found["target"], len(found["target"]), _radii(context)
    before = found["before"][np.arange(n), target]
    rows = [
        _rate(source, "validity", (found["before"].argmax(1) == target) & (before > 0.5), None),
        _mean(source, "target_confidence", before, None),
    ]
    for r, eps in enumerate(radii):
        ball, p = _ball(context, eps), found["confidence"][:, r]
        rows.append(_rate(source, "validity", (found["predicted"][:, r] == target) & (p > 0.5), ball))
        rows.append(_mean(source, "target_confidence", p, ball))
        rows.append(_mean(source, "changed_pixels", found["changed"][:, r], ball))
        for column, key in enumerate(_DISTANCES):
            values = found["distance"][:, r, column]
            rows.append(measurements.mean(f"distance_{key}", values, source, ball, bounds=(0.0, np.inf)))
        if context.judge is not None:
            rows += _judged(context, source, found["pictures"][:, r], target, ball)
    flips = found["flip"]
    flipped = np.isfinite(flips)
    rows.append(_rate(source, "flipped", flipped, _ball(context, radii[-1])))
    rows += _quantiles("flip_radius", source, flips, radii[-1])
    if context.package.thresholds.get("tpr95") is not None:
        rows += _quantiles("in_distribution_radius", source, found["in_distribution"], radii[-1])
    if flipped.any():
        rows.append(_mean(source, "flip_changed_pixels", found["flip_changed"][flipped], None))
    return rows


def _judged(
    context: Context, source: measurements.Source, pictures: np.ndarray, target: np.ndarray, ball: Ball
) -> list[Measurement]:
    """The judge's confidence in the targets (N,) of pictures (N, H, W, C)."""
    judge = context.judge
    assert judge is not None
    pairs = [
        judge.confidences(picture[None], context.package.label_names[k])
        for picture, k in zip(pictures, target, strict=True)
    ]
    confidences, predicted = (np.concatenate(column) for column in zip(*pairs, strict=True))
    by = judge.package.digest
    return [
        _mean(source, "judge_confidence", confidences, ball, judge=by),
        _rate(source, "judge_agreement", predicted, ball, judge=by),
        _rate(source, "judge_validity", predicted & (confidences > 0.5), ball, judge=by),
    ]


def _outside(
    context: Context, source: measurements.Source, found: Mapping[str, np.ndarray]
) -> list[Measurement]:
    """Confidence in OOD images by radius."""
    threshold = context.package.thresholds.get("tpr95")
    profile: list[tuple[Ball | None, np.ndarray]] = [(None, found["before"].max(1))]
    profile += [(_ball(context, eps), found["largest"][:, r]) for r, eps in enumerate(_radii(context))]
    rows = []
    for ball, confidences in profile:
        rows.append(_mean(source, "confidence", confidences, ball))
        if threshold is not None:
            rows.append(_rate(source, "let_through_at_tpr95", confidences >= threshold, ball))
    return rows


def _rate(
    source: measurements.Source, name: str, hits: np.ndarray, ball: Ball | None, **details: Any
) -> Measurement:
    return measurements.rate(name, int(hits.sum()), len(hits), source, ball, **details)


def _mean(
    source: measurements.Source, name: str, values: np.ndarray, ball: Ball | None, **details: Any
) -> Measurement:
    """A mean of values in [0, 1]; the interval of a rate where all values are 0 or 1."""
    if np.isin(values, (0.0, 1.0)).all():
        return _rate(source, name, values, ball, **details)
    return measurements.mean(name, values, source, ball, **details)


def _quantiles(
    name: str, source: measurements.Source, found: np.ndarray, top: float
) -> Iterator[Measurement]:
    """Quartiles of smallest radii found (N,), NaN where there is none, which counts as beyond `top`.

    A quartile beyond `top` is left out; an interval end beyond it is infinite.
    """
    far = 2 * top
    values = np.where(np.isfinite(found), found, far)
    for q in QUANTILES:

        def quantile(v: np.ndarray, q: float = q) -> float:
            return float(np.quantile(v, q, method="inverted_cdf"))

        value = quantile(values)
        if value >= far:
            continue
        low, high = metrics.bootstrap_interval(
            quantile, [[values]], generator=source.generator(), samples=500
        )
        interval = (low, high if high <= top else np.inf)
        yield measurements.row(f"{name}_q{round(100 * q)}", value, len(values), interval, source)


def _columns(
    context: Context, name: str, images: Images, found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of `examples.parquet`, one per image and radius; the verdict is whether the target was reached."""
    n, budgets = found["confidence"].shape
    norm = f"l{context.suite.explanation_norm}"
    attacks = [f"counterfactual, {_ball(context, eps)}" for eps in _radii(context)]
    reached = (found["predicted"] == found["target"][:, None]) & (found["confidence"] > 0.5)
    column = _DISTANCES.index(norm) if norm in _DISTANCES else 1
    labels = np.full(n, -1, np.int64) if images.labels is None else images.labels.astype(np.int64)
    return {
        "dataset": np.full(n * budgets, name, dtype=object),
        "index": np.repeat(np.arange(n), budgets),
        "attack": np.array(attacks * n, dtype=object),
        "label": np.repeat(labels, budgets),
        "predicted": found["predicted"].ravel().astype(np.int64),
        "confidence": found["confidence"].ravel(),
        "verdict": reached.ravel().astype(np.int8),
        "distance": found["distance"][:, :, column].ravel(),
    }
