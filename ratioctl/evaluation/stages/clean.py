"""Stage "clean": accuracy and calibration on unchanged ID images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ratioctl.data.in_distribution import Images
from ratioctl.evaluation import attack_batches, measurements, sanity_checks, suites
from ratioctl.evaluation.context import Clean, Context, Results
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase
from ratioctl.utils.result_cache import Arrays

_BATCH = 1024


def plan(context: Context) -> Iterator[Phase]:
    forward = context.forward_seconds
    yield context.phase(f"clean {context.data.name}", "clean", len(context.data.inside), forward)


def run(context: Context, results: Results) -> None:
    package, data, temperature = context.package, context.data, context.subject.temperature
    spec = suites.calibration(package)
    parts, logits = logits_of(context, data.name, data.inside)
    confidences = Confidences.of(logits, temperature)
    predicted = logits.argmax(1)
    source = context.source(data.name, data.inside, parts)
    results.measurements += measurements.clean(source, logits, temperature, spec)
    thresholds = package.thresholds_of("msp")
    results.measurements += measurements.operating(source, confidences.confidence, predicted, thresholds)
    histogram = measurements.histogram(confidences.confidence, 1 / len(package.label_names))
    results.figures["histograms"] = {data.name: {"clean": histogram}}
    results.figures["reliability"] = measurements.reliability(
        logits, data.labels, temperature, spec.report_bins
    )
    right = predicted == data.labels
    results.measurements += measurements.selective(source, confidences.log_odds, right)
    results.figures["risk_coverage"] = measurements.risk_coverage(confidences.log_odds, right)
    index = np.arange(len(logits))
    results.examples.add(data.name, index, "clean", data.labels, predicted, confidences, right)
    first, second = (context.subject.predictor.predict(data.inside.pixels[:64]) for _ in range(2))
    results.warnings += [sanity_checks.randomized(first, second), sanity_checks.probabilities(logits)]
    results.stored_clean = Clean(logits=logits, confidences=confidences, predicted=predicted, parts=parts)


def compute(context: Context) -> None:
    if "robust" not in context.suite.stages:  # which computes them all in every shard: attacks need them
        logits_of(context, context.data.name, context.data.inside)


def predicted(context: Context) -> np.ndarray:
    """(N,) classes of all ID images, in a shard too."""
    alone = dataclasses.replace(context, batches=context.batches.unsharded())
    return logits_of(alone, context.data.name, context.data.inside)[1].argmax(1)


def logits_of(context: Context, name: str, images: Images) -> tuple[list[Arrays], np.ndarray]:
    """The batches of a set's unchanged images, and their logits (N, K) together; a shard's own ones."""
    parts = context.batches.run(
        f"clean {name}",
        images.pixels,
        lambda at: attack_batches.clean(context.subject, images.pixels[at]),
        size=_BATCH,
    )
    none = np.zeros((0, len(context.package.label_names)), np.float32)
    return parts, np.concatenate([part["logits"] for part in parts] or [none])
