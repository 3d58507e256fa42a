"""Stage "robust": robust accuracy in every ball, and a longer attack on some survivors as a check.

Each attack runs on the survivors of those before it, packed into full batches within blocks of images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ratioctl.attacks.autoattack import AttackBudget, Backend, backend_name, ensemble_name
from ratioctl.evaluation import adversarial, attack_batches, measurements, sanity_checks, suites
from ratioctl.evaluation.context import Context, Results, joined
from ratioctl.evaluation.datasets import evenly_spaced, stratified_indices, take
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase
from ratioctl.evaluation.stages import clean
from ratioctl.recipe import Ball
from ratioctl.utils.result_cache import Arrays

BLOCK = 512  # images of which survivors are packed into batches, and the least that a shard attacks
_LOOK, _LOOK_STEPS = 32, 10  # images and steps of the short attack that estimates how many survive


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Selection:
    """The attacked ID images: indices in their set, pixels (N, H, W, C) and labels (N,)."""

    index: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def of(cls, context: Context) -> _Selection:
        index = stratified_indices(context.data.inside, context.suite.inside, context.seed)
        return cls(index=index, x=take(context.data.inside.pixels, index), y=context.data.labels[index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attacked:
    """State of the selected images in one ball.

    Attributes:
        by: (N,) -1 where the clean prediction is wrong, 0 while no attack succeeded, else its number from 1.
        x: (N, C, H, W) float32 points found, the image itself for survivors; None unless they are saved.
        parts: all batches so far.
    """

    by: np.ndarray
    predicted: np.ndarray
    distance: np.ndarray
    confidences: Confidences
    x: np.ndarray | None
    parts: list[Arrays] = dataclasses.field(default_factory=list)

    def update(self, alive: np.ndarray, number: int, found: Arrays) -> None:
        """Record the images among `alive` on which attack `number` succeeded."""
        broken = found["broken"]
        at = alive[broken]
        self.by[at] = number
        self.predicted[at] = found["predicted"][broken]
        self.distance[at] = found["distance"][broken]
        self.confidences.confidence[at] = found["confidence"][broken]
        self.confidences.log_odds[at] = found["log_odds"][broken]
        if self.x is not None:
            self.x[at] = found["x"]


def plan(context: Context) -> Iterator[Phase]:
    suite, data = context.suite, context.data
    forward, step = context.forward_seconds, context.step_seconds
    targets = len(context.package.label_names) - 1
    count = len(stratified_indices(data.inside, suite.inside, 0))
    look = stratified_indices(data.inside, _LOOK, context.seed)
    for ball in suites.robust_balls(context.package, suite):
        surviving = attack_batches.surviving_fraction(
            context.subject, data.inside.pixels[look], data.labels[look], ball, _LOOK_STEPS
        )
        budget = suite.budget_for(ball)
        for k, attack in enumerate(suite.attacks_for(ball)):
            images = count * (surviving if k else max(surviving, 0.7))
            seconds = _seconds(attack, budget, targets, forward, step)
            yield context.phase(f"robust accuracy, {ball}, {attack}", attack, images, seconds)
        seconds = step * attack_batches.longer(budget.steps)
        yield context.phase(f"self-check, {ball}", "search", min(suite.probe, surviving * count), seconds)


def _seconds(attack: str, budget: AttackBudget, targets: int, forward: float, step: float) -> float:
    """Estimated seconds per image of one attack."""
    targets = min(budget.targets, targets)
    known = {
        "apgd-ce": step * budget.steps * budget.restarts,
        "apgd-t": step * budget.steps * targets,
        # FAB evaluates every point twice and projects by sorting; Square itself costs half a forward pass.
        "fab-t": (step + 2 * forward) * budget.steps * targets,
        "square": 1.5 * forward * budget.queries,
    }
    return known.get(attack, step * budget.steps)


def run(context: Context, results: Results) -> None:
    selection = _Selection.of(context)
    for ball in suites.robust_balls(context.package, context.suite):
        backend = context.suite.backend_for(ball, len(context.package.label_names))
        attacked = _attack(context, results, selection, ball, backend)
        _report(context, results, selection, ball, backend, attacked)
        _self_check(context, results, selection, ball, backend, attacked.by == 0)


def compute(context: Context) -> None:
    """The attacks of a shard's blocks. The self-check needs all survivors, so `merge` computes it."""
    selection = _Selection.of(context)
    standing = clean.predicted(context)[selection.index] == selection.y
    for ball in suites.robust_balls(context.package, context.suite):
        backend = context.suite.backend_for(ball, len(context.package.label_names))
        for _ in _rounds(context, selection, standing, ball, backend):
            pass
        context.batches.plan.skip(f"self-check, {ball}")


def _rounds(
    context: Context, selection: _Selection, standing: np.ndarray, ball: Ball, backend: Backend
) -> Iterator[tuple[int, str, np.ndarray, list[Arrays]]]:
    """The suite's attacks in turn, each on the survivors of those before it.

    Survivors are packed into full batches within blocks of `BLOCK` images, which do not depend on each
    other: a shard attacks whole blocks, in the batches of an unsharded run.

    Args:
        standing: (N,) bool, which images of the selection are predicted correctly.

    Yields:
        (number from 1, attack, indices of the attacked images within the selection, batches).
    """
    suite, y = context.suite, selection.y
    budget, unit = suite.budget_for(ball), f"robust accuracy, {ball}"
    settings = [
        *(ball.model_dump(mode="json"), dataclasses.asdict(budget)),
        *(backend_name(backend), context.saved is not None),
    ]
    blocks = np.full(len(standing), -1)
    blocks[standing] = np.arange(standing.sum()) // BLOCK
    mine = [k for k in np.unique(blocks[standing]).tolist() if context.batches.owned(unit, k)]
    standing = standing & np.isin(blocks, mine)
    for number, attack in enumerate(suite.attacks_for(ball), 1):
        alive = np.flatnonzero(standing)

        def attacked(at: slice, attack: str = attack, alive: np.ndarray = alive) -> Arrays:
            rows = alive[at]
            return attack_batches.robust(
                *(context.subject, selection.x[rows], y[rows], ball, attack, budget),
                backend=backend,
                keep=context.saved is not None,
            )

        parts = context.batches.run(
            f"{unit}, {attack}",
            selection.x[alive],
            attacked,
            labels=y[alive],
            settings=settings,
            unit=unit,
            blocks=blocks[alive],
        )
        if parts:
            standing[alive[joined(parts)["broken"]]] = False
            yield number, attack, alive, parts


def _attack(
    context: Context, results: Results, selection: _Selection, ball: Ball, backend: Backend
) -> _Attacked:
    """Run the suite's attacks in turn."""
    index, y = selection.index, selection.y
    predicted = results.clean.predicted[index].copy()
    state = _Attacked(
        by=np.where(predicted == y, 0, -1),
        predicted=predicted,
        distance=np.zeros(len(index)),
        confidences=results.clean.confidences.at(index),
        x=None if context.saved is None else adversarial.floats(selection.x),
    )
    for number, attack, alive, parts in _rounds(context, selection, state.by == 0, ball, backend):
        state.parts.extend(parts)
        found = joined(parts)
        state.update(alive, number, found)
        results.warnings.append(
            sanity_checks.zero_gradients(
                f"robust accuracy ({ball}), {attack}", int(found["stuck"].sum()), len(alive)
            )
        )
        results.examples.add(
            *(context.data.name, index[alive], f"{ball}: {attack}", y[alive], state.predicted[alive]),
            *(state.confidences.at(alive), ~found["broken"], state.distance[alive]),
        )
    return state


def _report(
    context: Context,
    results: Results,
    selection: _Selection,
    ball: Ball,
    backend: Backend,
    attacked: _Attacked,
) -> None:
    """Measurements, examples and saved images of the ensemble."""
    suite, data, by = context.suite, context.data, attacked.by
    attacks = suite.attacks_for(ball)
    name = ensemble_name(attacks, suite.budget_for(ball), ball.p, len(context.package.label_names), backend)
    results.measurements += measurements.robust(
        context.source(data.name, data.inside, attacked.parts),
        by,
        ball,
        attacks,
        name,
        batch_size=context.batches.size,
        backend=backend_name(backend),
    )
    results.warnings.append(sanity_checks.square_wins(ball, by, attacks))
    results.examples.add(
        *(data.name, selection.index, f"{ball}: {name}", selection.y, attacked.predicted),
        *(attacked.confidences, by == 0, attacked.distance),
    )
    if attacked.x is not None:
        context.save_attacked(
            f"{data.name} {ball}",
            x=attacked.x,
            index=selection.index,
            label=selection.y,
            predicted=attacked.predicted,
            broken_by=by,
            distance=attacked.distance,
        )


def _self_check(
    context: Context,
    results: Results,
    selection: _Selection,
    ball: Ball,
    backend: Backend,
    survived: np.ndarray,
) -> None:
    """A longer attack must not succeed on many survivors."""
    what = f"self-check, {ball}"
    alive = evenly_spaced(np.flatnonzero(survived), context.suite.probe)
    if not len(alive):
        context.batches.plan.skip(what)
        return
    x, y = selection.x[alive], selection.y[alive]
    steps = attack_batches.longer(context.suite.budget_for(ball).steps)
    probed = joined(
        context.batches.run(
            what,
            x,
            lambda at: attack_batches.probe_inside(context.subject, x[at], y[at], ball, steps),
            labels=y,
            settings=[ball.model_dump(mode="json"), steps],
            needs_all=True,
        )
    )
    results.warnings.append(sanity_checks.not_converged_inside(ball, probed["broken"], steps))
    if backend == "reference":  # its gradient attacks do not report zero gradients
        stuck = int(probed["stuck"].sum())
        checked = f"self-check of the robust accuracy ({ball})"
        results.warnings.append(sanity_checks.zero_gradients(checked, stuck, len(alive)))
