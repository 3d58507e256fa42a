"""Stage "scores": OOD detection by further OOD scores, unchanged and under attacks on each score."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ratioctl import scores
from ratioctl.attacks.registry import default_method
from ratioctl.evaluation import attack_batches, measurements, suites
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import stratified_indices, take
from ratioctl.evaluation.progress import Phase
from ratioctl.scores import OodScore


def plan(context: Context) -> Iterator[Phase]:
    suite = context.suite
    if not suite.attacks_ood:
        return
    step = context.step_seconds
    each = suite.outside_steps * suite.outside_restarts * 2 * step
    for score in suite.scores:
        for name, images in context.data.outside.items():
            count = len(stratified_indices(images, suite.outside, 0))
            yield context.phase(f"worst case by {score}, {name}", "search", count, each)


def run(context: Context, results: Results) -> None:
    temperature = context.subject.temperature
    for score in map(scores.by_name, context.suite.scores):
        thresholds = context.package.thresholds_of(score.name)
        inside = score.acceptance(results.clean.logits, temperature)
        source = context.source(context.data.name, context.data.inside, [])
        bounds = {name: score.bounds(t, results.clean.predicted) for name, t in thresholds.items()}
        results.measurements += measurements.score_operating(source, score.name, inside, thresholds, bounds)
        for name, images in context.data.outside.items():
            outside = score.acceptance(results.outside_logits[name], temperature)
            source = context.source(name, images, [])
            predicted = results.outside_logits[name].argmax(1)
            bounds = {name: score.bounds(t, predicted) for name, t in thresholds.items()}
            results.measurements += measurements.score_detection(source, score.name, inside, outside)
            results.measurements += measurements.score_operating(
                source, score.name, outside, thresholds, bounds
            )
            if context.suite.attacks_ood:
                _worst_case(context, results, score, name, inside)


def _worst_case(context: Context, results: Results, score: OodScore, name: str, inside: np.ndarray) -> None:
    """One OOD set attacked towards a low score; `inside` are the acceptances of unchanged ID images."""
    suite, ball, images = (
        context.suite,
        suites.outside_ball(context.package, context.suite),
        context.data.outside[name],
    )
    pixels = take(images.pixels, stratified_indices(images, suite.outside, context.seed))
    parts = context.batches.run(
        f"worst case by {score.name}, {name}",
        pixels,
        lambda at: attack_batches.worst_case_score(
            *(context.subject, pixels[at], ball, score),
            steps=suite.outside_steps,
            restarts=suite.outside_restarts,
        ),
        settings=[score.name, ball.model_dump(mode="json"), suite.outside_steps, suite.outside_restarts],
    )
    worst = joined(parts)["acceptance"]
    method = default_method(ball.p).upper()
    how = f"{method} on {score.name}, {suite.outside_steps} steps x {suite.outside_restarts}, or the image"
    source = context.source(name, images, parts)
    results.measurements += measurements.score_detection(source, score.name, inside, worst, ball, attack=how)
