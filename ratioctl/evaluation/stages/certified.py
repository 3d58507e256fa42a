"""Stage "certified": confidence on OOD images that no change within an linf ball exceeds.

For packages with a certified head, in the ball it was trained for. A short attack on some of the images
checks that the bound holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ratioctl.evaluation import attack_batches, measurements, sanity_checks
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import evenly_spaced, stratified_indices, take
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase
from ratioctl.recipe import Ball
from ratioctl.utils.result_cache import Arrays

CHECKED, STEPS = 32, 40  # images per set that are attacked, and steps of each of two searches


def plan(context: Context) -> Iterator[Phase]:
    if context.package.certified is None:
        return
    for name in context.data.outside:
        count = len(_pixels(context, name))
        yield context.phase(f"guarantee, {name}", "clean", count, 0.1 * context.forward_seconds)
        checked = len(_checked(context, np.arange(count)))
        yield context.phase(
            f"attack on the guarantee, {name}", "search", checked, 2 * STEPS * context.step_seconds
        )


def compute(context: Context) -> None:
    ball = _ball(context)
    if ball is None:
        return
    for name in context.data.outside:
        _bounds(context, name, ball)
        _attack(context, name, ball)


def run(context: Context, results: Results) -> None:
    ball = _ball(context)
    if ball is None:
        return
    for name, images in context.data.outside.items():
        parts = _bounds(context, name, ball)
        found, source = joined(parts), context.source(name, images, parts)
        bounds = Confidences(confidence=found["confidence"], log_odds=found["log_odds"])
        results.measurements += measurements.guaranteed(
            source, results.clean.confidences, bounds, context.package.thresholds_of("msp"), ball
        )
        attacked = _attack(context, name, ball)
        if attacked:
            checked = bounds.at(_checked(context, np.arange(len(bounds.log_odds)))).log_odds
            reached = joined(attacked)["log_odds"]
            results.warnings.append(sanity_checks.exceeds_guarantee(name, ball, reached, checked))


def _ball(context: Context) -> Ball | None:
    eps = context.package.certified
    return None if eps is None else Ball(p=math.inf, eps=eps)


def _pixels(context: Context, name: str) -> np.ndarray:
    """The images whose worst case suites with attacks search, too."""
    images = context.data.outside[name]
    return take(images.pixels, stratified_indices(images, context.suite.outside, context.seed))


def _checked(context: Context, index: np.ndarray) -> np.ndarray:
    return evenly_spaced(index, min(CHECKED, context.suite.probe))


def _bounds(context: Context, name: str, ball: Ball) -> list[Arrays]:
    pixels = _pixels(context, name)
    return context.batches.run(
        f"guarantee, {name}",
        pixels,
        lambda at: attack_batches.guaranteed(context.subject, pixels[at], ball.eps),
        settings=[ball.model_dump(mode="json")],
    )


def _attack(context: Context, name: str, ball: Ball) -> list[Arrays]:
    pixels = _pixels(context, name)
    pixels = take(pixels, _checked(context, np.arange(len(pixels))))
    return context.batches.run(
        f"attack on the guarantee, {name}",
        pixels,
        lambda at: attack_batches.highest(context.subject, pixels[at], ball, STEPS),
        settings=[ball.model_dump(mode="json"), STEPS],
    )
