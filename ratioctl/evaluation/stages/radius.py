"""Stage "radius": confidence over the attack radius (Figure 5 of the RATIO paper)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ratioctl.evaluation import attack_batches, measurements, suites
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import stratified_indices
from ratioctl.evaluation.progress import Phase
from ratioctl.utils.result_cache import Arrays


def plan(context: Context) -> Iterator[Phase]:
    suite, step = context.suite, context.step_seconds
    steps = len(suites.radii(context.package)) * suite.curve_steps
    for key in ("inside", "outside"):
        yield context.phase(_phase(key), "search", min(suite.curve, len(context.data.inside)), steps * step)


def compute(context: Context) -> None:
    for _ in _curves(context):
        pass


def run(context: Context, results: Results) -> None:
    radii = suites.radii(context.package)
    results.figures["radius"] = {
        key: measurements.radius_curve(joined(parts)["values"], radii) for key, parts in _curves(context)
    }


def _curves(context: Context) -> Iterator[tuple[str, list[Arrays]]]:
    """The batches of some ID images, and of as many OOD images of all sets together."""
    suite, data = context.suite, context.data
    if not suite.curve:
        return
    radii = suites.radii(context.package)
    some = stratified_indices(data.inside, suite.curve, context.seed)
    share = math.ceil(suite.curve / len(data.outside))
    outer = [
        images.pixels[stratified_indices(images, share, context.seed)] for images in data.outside.values()
    ]
    for key, pixels, labels in (
        ("inside", data.inside.pixels[some], data.labels[some]),
        ("outside", np.concatenate(outer)[: suite.curve], None),
    ):
        parts = context.batches.run(
            _phase(key),
            pixels,
            lambda at, pixels=pixels, labels=labels: attack_batches.curve(  # type: ignore[misc]
                *(context.subject, pixels[at], None if labels is None else labels[at]),
                *(radii, suite.curve_steps),
            ),
            labels=labels,
            settings=[radii, suite.curve_steps],
            size=max(1, context.batches.size // len(radii)),
        )
        yield key, parts


def _phase(key: str) -> str:
    return f"confidence over the radius, {'ID' if key == 'inside' else 'OOD'}"
