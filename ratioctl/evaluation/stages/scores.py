"""Stage "scores": OOD detection by further OOD scores, unchanged and under attacks on each score."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ratioctl import scores
from ratioctl.attacks.registry import default_method
from ratioctl.data.in_distribution import Images
from ratioctl.evaluation import attack_batches, measurements, suites
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import stratified_indices, take
from ratioctl.evaluation.progress import Phase
from ratioctl.scores import OodScore
from ratioctl.utils.result_cache import Arrays


def _scores(context: Context) -> list[OodScore]:
    return [scores.by_name(name, network=True) for name in context.suite.scores]


def plan(context: Context) -> Iterator[Phase]:
    suite = context.suite
    for score in _scores(context):
        step = score.passes * context.step_seconds
        if score.near is not None:
            for name, images in context.data.all().items():
                yield context.phase(f"{score.name}, {name}", "clean", len(images), step)
        if not suite.attacks_ood:
            continue
        each = suite.outside_steps * suite.outside_restarts * 2 * step
        for name, images in context.data.outside.items():
            count = len(stratified_indices(images, suite.outside, 0))
            yield context.phase(f"worst case by {score.name}, {name}", "search", count, each)


def compute(context: Context) -> None:
    for score in _scores(context):
        if score.near is not None:
            for name, images in context.data.all().items():
                _near(context, score, name, images)
        if context.suite.attacks_ood:
            for name in context.data.outside:
                _search(context, score, name)


def run(context: Context, results: Results) -> None:
    temperature = context.subject.temperature
    for score in _scores(context):
        thresholds = context.package.thresholds_of(score.name) if score.near is None else {}
        inside = score.acceptance(
            _logits(context, score, context.data.name, context.data.inside, results.clean.logits), temperature
        )
        source = context.source(context.data.name, context.data.inside, [])
        bounds = {name: score.bounds(t, results.clean.predicted) for name, t in thresholds.items()}
        results.measurements += measurements.score_operating(source, score.name, inside, thresholds, bounds)
        for name, images in context.data.outside.items():
            found = _logits(context, score, name, images, results.outside_logits[name])
            outside = score.acceptance(found, temperature)
            source = context.source(name, images, [])
            predicted = results.outside_logits[name].argmax(1)
            bounds = {name: score.bounds(t, predicted) for name, t in thresholds.items()}
            results.measurements += measurements.score_detection(source, score.name, inside, outside)
            results.measurements += measurements.score_operating(
                source, score.name, outside, thresholds, bounds
            )
            if context.suite.attacks_ood:
                _worst_case(context, results, score, name, inside)


def _near(context: Context, score: OodScore, name: str, images: Images) -> list[Arrays]:
    """Batches of the logits near the images."""
    return context.batches.run(
        f"{score.name}, {name}",
        images.pixels,
        lambda at: attack_batches.score_logits(context.subject, images.pixels[at], score),
        settings=[score.name, score.description],
    )


def _logits(context: Context, score: OodScore, name: str, images: Images, clean: np.ndarray) -> np.ndarray:
    """Logits (N, K) that the score is computed from: `clean`, or those near the images."""
    return clean if score.near is None else joined(_near(context, score, name, images))["logits"]


def _search(context: Context, score: OodScore, name: str) -> list[Arrays]:
    """One OOD set attacked towards a low score."""
    suite, images = context.suite, context.data.outside[name]
    ball = suites.outside_ball(context.package, suite)
    pixels = take(images.pixels, stratified_indices(images, suite.outside, context.seed))
    return context.batches.run(
        f"worst case by {score.name}, {name}",
        pixels,
        lambda at: attack_batches.worst_case_score(
            *(context.subject, pixels[at], ball, score),
            steps=suite.outside_steps,
            restarts=suite.outside_restarts,
        ),
        settings=[score.name, ball.model_dump(mode="json"), suite.outside_steps, suite.outside_restarts],
    )


def _worst_case(context: Context, results: Results, score: OodScore, name: str, inside: np.ndarray) -> None:
    """Measurements of one OOD set under attack; `inside` are the acceptances of unchanged ID images."""
    suite, images = context.suite, context.data.outside[name]
    ball = suites.outside_ball(context.package, suite)
    parts = _search(context, score, name)
    worst = joined(parts)["acceptance"]
    method = default_method(ball.p).upper()
    how = f"{method} on {score.name}, {suite.outside_steps} steps x {suite.outside_restarts}, or the image"
    source = context.source(name, images, parts)
    results.measurements += measurements.score_detection(source, score.name, inside, worst, ball, attack=how)
