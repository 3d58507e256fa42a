"""Stage "ood": OOD detection on unchanged images, and calibration on a mixture with OOD images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ratioctl.evaluation import measurements, suites
from ratioctl.evaluation.context import Context, Results
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase
from ratioctl.evaluation.stages.clean import logits_of


def plan(context: Context) -> Iterator[Phase]:
    forward = context.forward_seconds
    for name, images in context.data.outside.items():
        yield context.phase(f"clean {name}", "clean", len(images), forward)


def compute(context: Context) -> None:
    for name, images in context.data.outside.items():
        logits_of(context, name, images)


def run(context: Context, results: Results) -> None:
    package, data, temperature = context.package, context.data, context.subject.temperature
    everything, logits = list(results.clean.parts), {}
    results.figures["roc"] = {}
    for name, images in data.outside.items():
        parts, found = logits_of(context, name, images)
        everything, logits[name] = everything + parts, found
        results.outside_logits[name] = found
        confidences = results.outside[name] = Confidences.of(found, temperature)
        source = context.source(name, images, parts)
        results.measurements += measurements.detection(source, results.clean.confidences, confidences)
        results.measurements += measurements.operating(
            source, confidences.confidence, found.argmax(1), package.thresholds_of("msp")
        )
        results.figures["roc"][name] = {"clean": measurements.roc(results.clean.confidences, confidences)}
        histogram = measurements.histogram(confidences.confidence, 1 / len(package.label_names))
        results.figures["histograms"][name] = {"clean": histogram}
        index = np.arange(len(images))
        results.examples.add(name, index, "clean", None, found.argmax(1), confidences, None)
    results.measurements += measurements.mixture(
        context.source(data.name, data.inside, everything),
        results.clean.logits,
        logits,
        temperature,
        suites.calibration(package),
        [images.fingerprint for images in data.all().values()],
    )
