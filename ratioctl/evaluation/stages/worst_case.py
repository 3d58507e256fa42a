"""Stage "worst_case": OOD images attacked towards high confidence, ID images towards low confidence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ratioctl.attacks.registry import default_method
from ratioctl.data.in_distribution import Images
from ratioctl.evaluation import attack_batches, measurements, sanity_checks, suites
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import evenly_spaced, stratified_indices, take
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase
from ratioctl.recipe import Ball
from ratioctl.types import Attacked
from ratioctl.utils.result_cache import Arrays

GALLERY = 8  # pictures per set


def plan(context: Context) -> Iterator[Phase]:
    suite, data = context.suite, context.data
    step = context.step_seconds
    ball = suites.robust_balls(context.package, suite)[0]
    picked = len(stratified_indices(data.inside, suite.outside, 0))
    yield context.phase(f"lowest confidence, {ball}", "search", picked, 2 * suite.outside_steps * step)
    each = suite.outside_steps * suite.outside_restarts * (2 + _targets(context)) * step
    for name, images in data.outside.items():
        picked = len(stratified_indices(images, suite.outside, 0))
        yield context.phase(f"worst case, {name}", "search", picked, each)
        seconds = step * attack_batches.longer(suite.outside_steps)
        yield context.phase(f"self-check, {name}", "search", min(suite.probe, picked), seconds)


def run(context: Context, results: Results) -> None:
    lowest = _lowest(context, results)
    for name, images in context.data.outside.items():
        index = stratified_indices(images, context.suite.outside, context.seed)
        pixels = take(images.pixels, index)
        parts = _attack(context, name, pixels)
        _report(context, results, name, images, index, pixels, parts, lowest)
        _self_check(context, results, name, pixels, joined(parts)["confidence"])


def compute(context: Context) -> None:
    _search_lowest(context)
    for name, images in context.data.outside.items():
        pixels = take(images.pixels, stratified_indices(images, context.suite.outside, context.seed))
        _attack(context, name, pixels)
        if context.suite.probe:
            _probe(context, name, pixels)


def _targets(context: Context) -> int:
    return min(context.suite.outside_targets, len(context.package.label_names) - 1)


def _attack_name(context: Context) -> str:
    suite, goals = context.suite, 2 + _targets(context)
    method = (
        suite.outside_method or default_method(suites.outside_ball(context.package, context.suite).p)
    ).upper()
    return f"{method}, {suite.outside_steps} steps x {suite.outside_restarts}, {goals} goals, or the image"


def _lowest_name(context: Context) -> str:
    method = default_method(_inner_ball(context).p)
    return f"{method.upper()}, {context.suite.outside_steps} steps, 2 goals, or the image"


def _inner_ball(context: Context) -> Ball:
    """The ball of the attacked ID images."""
    return suites.robust_balls(context.package, context.suite)[0]


def _search_lowest(context: Context) -> tuple[np.ndarray, list[Arrays]]:
    """ID images attacked towards low confidence: their indices, and the batches."""
    data, steps, ball = context.data, context.suite.outside_steps, _inner_ball(context)
    index, keep = stratified_indices(data.inside, context.suite.outside, context.seed), bool(context.saved)
    x = take(data.inside.pixels, index)
    return index, context.batches.run(
        f"lowest confidence, {ball}",
        x,
        lambda at: attack_batches.lowest(context.subject, x[at], ball, steps=steps, keep=keep),
        settings=[ball.model_dump(mode="json"), steps, keep],
    )


def _lowest(context: Context, results: Results) -> Confidences:
    """Measurements, figures, examples and saved images of ID images attacked towards low confidence."""
    data, ball = context.data, _inner_ball(context)
    index, parts = _search_lowest(context)
    found = joined(parts)
    confidences = Confidences(confidence=found["confidence"], log_odds=found["log_odds"])
    results.measurements += measurements.operating(
        context.source(data.name, data.inside, parts),
        found["confidence"],
        found["predicted"],
        context.package.thresholds_of("msp"),
        ball,
        attack=_lowest_name(context),
    )
    histogram = measurements.histogram(found["confidence"], 1 / len(context.package.label_names))
    results.figures["histograms"][data.name]["attacked"] = histogram
    results.examples.add(
        *(data.name, index, f"{ball}: lowest confidence", data.labels[index], found["predicted"]),
        *(confidences, None, found["distance"]),
    )
    if context.saved is not None:
        context.save_attacked(f"{data.name} {ball} lowest confidence", index=index, **_saved(found))
    return confidences


def _attack(context: Context, name: str, pixels: np.ndarray) -> list[Arrays]:
    """One OOD set attacked towards high confidence."""
    suite, ball, targets = (
        context.suite,
        suites.outside_ball(context.package, context.suite),
        _targets(context),
    )
    keep = bool(context.saved)
    return context.batches.run(
        f"worst case, {name}",
        pixels,
        lambda at: attack_batches.worst_case(
            *(context.subject, pixels[at], ball),
            steps=suite.outside_steps,
            restarts=suite.outside_restarts,
            targets=targets,
            method=suite.outside_method,
            keep=keep,
        ),
        settings=[
            ball.model_dump(mode="json"), suite.outside_steps, suite.outside_restarts, targets, keep,
            suite.outside_method,
        ],
    )  # fmt: skip


def _report(
    context: Context,
    results: Results,
    name: str,
    images: Images,
    index: np.ndarray,
    pixels: np.ndarray,
    parts: list[Arrays],
    lowest: Confidences,
) -> None:
    """Measurements, figures, examples and saved images of one OOD set."""
    package, ball, inner = (
        context.package,
        suites.outside_ball(context.package, context.suite),
        _inner_ball(context),
    )
    found, source = joined(parts), context.source(name, images, parts)
    clean, how, lowest_how = results.clean.confidences, _attack_name(context), _lowest_name(context)
    worst = Confidences(confidence=found["confidence"], log_odds=found["log_odds"])
    results.measurements += measurements.detection(source, clean, worst, ball, attack=how)
    for suffix, outside, where, by in (
        ("_inside_attacked", results.outside[name], inner, lowest_how),
        ("_both_attacked", worst, ball, how),
    ):
        details = {"attack": by, "inside_ball": str(inner), "inside_attack": lowest_how}
        results.measurements += measurements.detection(source, lowest, outside, where, suffix, **details)
    results.measurements += measurements.operating(
        source, worst.confidence, found["predicted"], package.thresholds_of("msp"), ball, attack=how
    )
    results.figures["roc"][name]["attacked"] = measurements.roc(clean, worst)
    histogram = measurements.histogram(worst.confidence, 1 / len(package.label_names))
    results.figures["histograms"][name]["attacked"] = histogram
    results.examples.add(
        *(name, index, f"{ball}: worst case", None, found["predicted"], worst, None, found["distance"])
    )
    if context.saved is not None:
        context.save_attacked(f"{name} {ball} worst case", index=index, **_saved(found))
    results.gallery += [
        Attacked(
            dataset=name,
            image=pixels[k].copy(),  # a view would keep all of them in memory
            attacked=found["picture"][k].copy(),
            before=float(found["clean"][k]),
            after=float(worst.confidence[k]),
            label=package.label_names[int(found["predicted"][k])],
        )
        for k in np.argsort(-worst.log_odds, kind="stable")[:GALLERY]
    ]
    results.warnings += [
        sanity_checks.zero_gradients(f"worst case on {name}", int(found["stuck"].sum()), len(pixels)),
        sanity_checks.below_clean(name, found["clean"], worst.confidence),
    ]


def _self_check(
    context: Context, results: Results, name: str, pixels: np.ndarray, reached: np.ndarray
) -> None:
    """A longer attack must not raise the worst-case confidence much."""
    suite, ball = context.suite, suites.outside_ball(context.package, context.suite)
    if not suite.probe:
        return
    probed = evenly_spaced(np.arange(len(pixels)), suite.probe)
    steps = attack_batches.longer(suite.outside_steps)
    longer = joined(_probe(context, name, pixels))["confidence"]
    results.warnings.append(sanity_checks.not_converged_outside(name, ball, reached[probed], longer, steps))


def _probe(context: Context, name: str, pixels: np.ndarray) -> list[Arrays]:
    """A longer attack on some images of one OOD set."""
    suite, ball = context.suite, suites.outside_ball(context.package, context.suite)
    some = pixels[evenly_spaced(np.arange(len(pixels)), suite.probe)]
    steps = attack_batches.longer(suite.outside_steps)
    return context.batches.run(
        f"self-check, {name}",
        some,
        lambda at: attack_batches.probe_outside(context.subject, some[at], ball, steps),
        settings=[ball.model_dump(mode="json"), steps],
    )


def _saved(found: Arrays) -> Arrays:
    return {key: found[key] for key in ("x", "predicted", "confidence", "distance")}
