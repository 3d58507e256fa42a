"""An evaluation from end to end: load, measure batch by batch, doubt, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl._version import __version__
from ratioctl.attacks.autoattack import Backend, backend_name, ensemble_name
from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import OutputError, PackageError, UsageError
from ratioctl.evaluation import (
    adversarial,
    attack_batches,
    measurements,
    sanity_checks,
    suites,
)
from ratioctl.evaluation.attack_batches import Subject
from ratioctl.evaluation.measurements import Sure
from ratioctl.evaluation.progress import Callback, Phase, Plan
from ratioctl.evaluation.suites import SUITES, Suite
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.device import ComputeConfig, select_device
from ratioctl.models.environment import environment
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.types import Attacked, Evaluated, Evaluation, Measurement, Report
from ratioctl.utils.atomic_files import lock, make_folder
from ratioctl.utils.result_cache import Arrays, ResultCache, key_of

Model = str | Path | ModelPackage
Ood = Sequence[str] | Mapping[str, str]

FORMAT = 4  # of filed batches; grows when their arrays change
GALLERY = 8  # pictures a set
_LOOK, _LOOK_STEPS = 32, 10  # images and steps of the look at how many survive, for the time estimate


def run(
    models: Sequence[Model] = (),
    *,
    data: str,
    ood: Ood = (),
    suite: str | Suite = "quick",
    limit: int | None = None,
    resume: bool = False,
    write: bool = False,
    out: str | Path | None = None,
    backend: Backend | None = None,
    save_adversarial: bool = False,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callback | None = None,
    finish: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """Evaluate models on labelled images and out-distributions.

    Batches that an interrupted run left in `out` are taken up where everything that decides them is the
    same; the result is that of an uninterrupted run.

    Args:
        models: packages, their folders or names of bundled models; none means the default model.
        data: a labelled SOURCE, by names of the models' labels.
        ood: "NAME=SOURCE" each, or a mapping; none means the built-in noise.
        suite: "quick", "paper", "full", or a `Suite`.
        limit: at most so many images of every set, stratified by class where there are labels.
        resume: also take up the batches of a finished run in `out`.
        write: file the measurements in the packages' config and card.
        out: folder of the journal; None keeps nothing.
        backend: of the robust accuracy: "reference" is `pyautoattack`'s standard version, "own" our engine's
            ensemble, checked against it; None takes the suite's. Where the package has no answer (l1.5, fewer
            than 4 classes) it is always our own, and every measurement names which it was.
        save_adversarial: also keep the attacked images, see `adversarial`; needs `out`.
        precision: of the attacks' search; verdicts and confidences are always fp32. "auto" searches in bf16
            where that pays, except in suites that are `exact`.
        watch: called with {"event": "plan", "seconds", "phases"} before long work, {"event": "batch",
            "model", "what", "share", "seconds_left"} after each batch, {"event": "file", "path"}.
        finish: called with the result before the journal is closed; writes the reports.

    Raises:
        UsageError: unknown suite, a bad NAME=SOURCE, a name given twice, a reference for a suite that is not
            AutoAttack's standard one.
        SourceError: data that is missing or has class folders that are no labels of a model.
        PackageError: a model that cannot be read; with `write` one that was changed meanwhile.
        OutputError: with `write`, a package that cannot be written; before anything is computed.
    """
    chosen = _with_backend(_suite(suite), backend)
    if save_adversarial and out is None:
        raise UsageError("save_adversarial", "needs a folder to save into", "Give out.")
    named = out_distribution.named(ood, data)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be positive", "For example --limit 1000.")
    loaded = [packages.resolve(model) for model in (models or (packages.DEFAULT_MODEL,))]
    for package in loaded if write else ():
        if not os.access(package.path, os.W_OK):
            raise OutputError(
                package.path,
                "cannot be written, and the measurements are to go there",
                "Leave --write out, or evaluate a copy.",
            )
    exact = precision == "auto" and chosen.exact
    compute = (
        select_device(device, "fp32", reason="this suite searches in it")
        if exact
        else select_device(device, precision)
    )
    folder = None if out is None else make_folder(Path(out))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(lock(folder))
        results = ResultCache(None if folder is None else folder / ".journal", keep=resume)
        sets = _Sets(data, named, limit, seed, download)
        names = packages.names(loaded)
        packs = [sets.of(package) for package in loaded]
        subjects = [_subject(package, compute, seed) for package in loaded]
        plan = Plan(
            [
                phase
                for subject, name, pack in zip(subjects, names, packs, strict=True)
                for phase in _phases(subject, name, pack, chosen)
            ],
            callback or (lambda event: None),
        )
        plan.announce()
        saved = None
        if save_adversarial and folder is not None:
            saved = make_folder(folder / "adversarial")
        parts: list[Evaluated] = []
        for subject, name, pack in zip(subjects, names, packs, strict=True):
            plan.start(name)
            parts.append(_one(subject, name, pack, chosen, results, plan, saved))
        evaluation = Evaluation(
            suite=chosen.name,
            protocol=str(chosen) + ("" if limit is None else f"; at most {limit:,} images of a set"),
            data=tuple(in_distribution.described(packs[0].all())),
            environment=environment(compute, "attack_precision", "verdict_precision"),
            models=tuple(parts),
        )
        if finish is not None:
            finish(evaluation)
        if write:
            for package, part, pack in zip(loaded, parts, packs, strict=True):
                _file(package, part.report, evaluation, pack)
        results.finish()
    return evaluation


# --- data --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pack:
    """The images one model is evaluated on."""

    name: str  # of the in-images, in reports: their SOURCE without its folder
    inside: Images
    outside: dict[str, Images]
    whole: dict[str, str]  # fingerprints before --limit

    def all(self) -> dict[str, Images]:
        return {self.name: self.inside, **self.outside}


class _Sets:
    """Loads every set once per input size and labels."""

    def __init__(
        self, data: str, ood: Mapping[str, str], limit: int | None, seed: int, download: bool
    ) -> None:
        self.data, self.ood, self.limit, self.seed, self.download = data, ood, limit, seed, download
        self.loaded: dict[Any, _Pack] = {}

    def of(self, package: ModelPackage) -> _Pack:
        key = (package.input_size, package.label_names)
        if key not in self.loaded:
            channels, size, _ = package.input_size
            test = in_distribution.load_labelled(
                self.data, size, channels, package.label_names, download=self.download
            )
            found = {
                name: out_distribution.load([source], size, channels, seed=self.seed, download=self.download)
                for name, source in self.ood.items()
            }
            own = in_distribution.short_name(self.data)
            self.loaded[key] = _Pack(
                name=own,
                whole={name: images.fingerprint for name, images in {own: test, **found}.items()},
                inside=self._limited(test),
                outside={name: self._limited(images) for name, images in found.items()},
            )
        return self.loaded[key]

    def _limited(self, images: Images) -> Images:
        if self.limit is None or self.limit >= len(images):
            return images
        return images.subset(choice(images, self.limit, self.seed))


def choice(images: Images, count: int | None, seed: int) -> np.ndarray:
    """Ascending indices of `count` images, stratified by class where there are labels; None takes all.

    A smaller choice is part of a larger one.
    """
    n = len(images)
    if count is None or count >= n:
        return np.arange(n)
    order = np.random.default_rng([seed, 0xC401CE]).permutation(n)
    if images.labels is None:
        return np.sort(order[:count])
    position = np.empty(n)
    for label in np.unique(images.labels):
        mine = order[images.labels[order] == label]
        position[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return np.sort(np.lexsort((np.argsort(order), position))[:count])


def _at(pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The images at ascending, distinct indices; no copy where these are all of them."""
    return pixels if len(index) == len(pixels) else pixels[index]


def spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, from end to end: sets are sorted by class, and their first are of one."""
    n = len(indices)
    return indices if n <= count else indices[(np.arange(count) * n) // max(count, 1)]


def _suite(suite: str | Suite) -> Suite:
    if isinstance(suite, Suite):
        return suite
    if suite == "explanations":
        raise UsageError(
            "suite explanations", "is measured elsewhere", "Call ratioctl.evaluation.explanations.run."
        )
    if suite not in SUITES:
        raise UsageError(f"--suite {suite}", "no such suite", f"Available: {', '.join(SUITES)}.")
    return SUITES[suite]


def _with_backend(suite: Suite, backend: Backend | None) -> Suite:
    if backend is None or backend == suite.backend:
        return suite
    if backend not in ("own", "reference"):
        raise UsageError(f"--backend {backend}", "no such backend", "Use own or reference.")
    if backend == "reference" and not suite.standard:
        raise UsageError(
            "--backend reference",
            f"runs AutoAttack's standard version, which the suite {suite.name} is not",
            "Use --suite paper (--limit N shortens it).",
        )
    return dataclasses.replace(suite, backend=backend)


# --- the plan ----------------------------------------------------------------------------------------------


def _phases(subject: Subject, model: str, pack: _Pack, suite: Suite) -> list[Phase]:
    """What is ahead and how long it will take, from a measured step and a look at how many survive."""
    package, classes, inside = subject.package, len(subject.package.label_names), pack.inside
    size = _batch(subject.compute)
    forward, step = attack_batches.paces(subject, inside.pixels[:size])
    found: list[Phase] = []

    def add(what: str, kind: str, images: float, seconds_each: float) -> None:
        found.append(Phase(model=model, what=what, kind=kind, seconds=images * seconds_each))

    for name, images in pack.all().items():
        add(f"clean {name}", "clean", len(images), forward)
    count, radii = len(choice(inside, suite.inside, 0)), len(suites.radii(package))
    look = choice(inside, _LOOK, subject.seed)
    assert inside.labels is not None
    for ball in suites.robust_balls(package, suite):
        standing = attack_batches.survivors(
            subject, inside.pixels[look], inside.labels[look], ball, _LOOK_STEPS
        )
        budget, targets = suite.budget_for(ball), min(suite.budget_for(ball).targets, classes - 1)
        searches = {
            # FAB looks at every point twice and projects by sorting; Square's own arithmetic is half a pass.
            "apgd-ce": step * budget.steps * budget.restarts,
            "apgd-t": step * budget.steps * targets,
            "fab-t": (step + 2 * forward) * budget.steps * targets,
            "square": 1.5 * forward * budget.queries,
        }
        for k, attack in enumerate(suite.attacks_for(ball)):
            what = f"robust accuracy, {ball}, {attack}"
            add(what, attack, count * (standing if k else max(standing, 0.7)), searches[attack])
        add(f"self-check, {ball}", "search", min(suite.probe, standing * count), step * _longer(budget.steps))
    picked = len(choice(inside, suite.outside, 0))
    add(
        f"lowest confidence, {suites.robust_balls(package, suite)[0]}",
        "search",
        picked,
        2 * suite.outside_steps * step,
    )
    goals = 2 + min(suite.outside_targets, classes - 1)
    for name, images in pack.outside.items():
        picked = len(choice(images, suite.outside, 0))
        each = suite.outside_steps * suite.outside_restarts * goals * step
        add(f"worst case, {name}", "search", picked, each)
        add(f"self-check, {name}", "search", min(suite.probe, picked), step * _longer(suite.outside_steps))
    for key in ("inside", "outside"):
        shown = min(suite.curve, len(inside))
        add(f"confidence over the radius, {key}", "search", shown, radii * suite.curve_steps * step)
    return found


def _longer(steps: int) -> int:
    """Steps of the self-check's search: enough to do better than a search that was too short."""
    return max(4 * steps, 50)


def _batch(compute: ComputeConfig) -> int:
    """Images a batch."""
    return 128 if compute.device.type == "cpu" else 512


# --- one model ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
    """Runs batches through the journal: `each` cuts a set into batches and files what `compute` returns."""

    subject: Subject
    results: ResultCache
    plan: Plan
    saved: Path | None  # where attacked images are kept
    facts: dict[str, Any]
    size: int  # images a batch

    def each(
        self,
        what: str,
        pixels: np.ndarray,
        compute: Callable[[slice], Arrays],
        *,
        labels: np.ndarray | None = None,
        **facts: Any,
    ) -> list[Arrays]:
        """`compute` on every batch; `facts` is what decides its result besides model and images."""
        parts = []
        if not len(pixels):
            self.plan.skip(what)
        for start in range(0, len(pixels), self.size):
            at = slice(start, min(start + self.size, len(pixels)))
            digest = hashlib.sha256(np.ascontiguousarray(pixels[at]).tobytes())
            if labels is not None:
                digest.update(np.ascontiguousarray(labels[at], dtype="<i8").tobytes())
            key = key_of({**self.facts, **facts, "what": what, "images": digest.hexdigest()})
            before = self.results.reused
            arrays = self.results.get_or_compute(key, lambda at=at: compute(at))  # type: ignore[misc]
            taken = self.results.reused > before
            seconds = None if taken else float(arrays["seconds"])
            self.plan.advance(what, (at.stop - at.start) / len(pixels), seconds)
            parts.append(arrays)
        return parts

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """File attacked images."""
        assert self.saved is not None
        path = adversarial.save(self.saved, f"{self.plan.model} {name}", **arrays)
        self.plan.tell({"event": "file", "path": str(path)})


@dataclasses.dataclass(kw_only=True)
class _Found:
    """What the parts of a model's evaluation add to, and what later ones need of earlier ones."""

    rows: list[Measurement] = dataclasses.field(default_factory=list)
    doubts: list[str | None] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"histograms": {}, "roc": {}, "radius": {}}
    )
    gallery: list[Attacked] = dataclasses.field(default_factory=list)
    examples: _Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Clean:
    """Clean results that attacked ones are set against."""

    inside: Sure
    outside: dict[str, Sure]
    predicted: np.ndarray  # (N,) of the in-images


def _subject(package: ModelPackage, compute: ComputeConfig, seed: int) -> Subject:
    network = fold_batchnorm(from_package(package)).to(compute.device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    predictor = Predictor(network=network, device=compute.device)
    return Subject(package=package, network=network, predictor=predictor, compute=compute, seed=seed)


def _one(
    subject: Subject,
    name: str,
    pack: _Pack,
    suite: Suite,
    results: ResultCache,
    plan: Plan,
    saved: Path | None,
) -> Evaluated:
    package, compute, seed = subject.package, subject.compute, subject.seed
    facts = {
        "format": FORMAT,
        "model": package.digest,
        "seed": seed,
        "device": compute.device.type,
        "bf16": compute.bf16,
        "torch": torch.__version__,
        "ratioctl": __version__,
        "pyautoattack": importlib.metadata.version("pyautoattack"),  # FAB-T and Square are its own
    }
    steps = _Steps(
        subject=subject, results=results, plan=plan, saved=saved, facts=facts, size=_batch(compute)
    )
    found = _Found(examples=_Examples(name))
    clean = _clean(steps, pack, found)
    _robust(steps, pack, suite, clean, found)
    _worst_case(steps, pack, suite, clean, found)
    _radius(steps, pack, suite, found)
    found.rows += measurements.mean_over_sets(found.rows, list(pack.outside), pack.name, seed)
    found.doubts += [
        sanity_checks.uncalibrated(package),
        sanity_checks.temperature_at_end(
            package.temperature, suites.calibration(package), package.calibrated
        ),
        *sanity_checks.trained_on(package, pack.whole),
        *sanity_checks.duplicates(pack.all()),
        *in_distribution.unreadable(pack.all()),
        sanity_checks.few(_counts(pack, suite)),
    ]
    report = Report(
        package_digest=package.digest,
        seed=seed,
        measurements=tuple(found.rows),
        warnings=tuple(dict.fromkeys(text for text in found.doubts if text is not None)),
    )
    return Evaluated(
        name=name,
        report=report,
        figures=found.figures,
        gallery=tuple(found.gallery),
        examples=found.examples.columns(),
    )


def _counts(pack: _Pack, suite: Suite) -> dict[str, int]:
    counts = {}
    for name, images in pack.all().items():
        attacked = suite.inside if images.labels is not None else suite.outside
        counts[f"{name}, clean"] = len(images)
        counts[f"{name}, attacked"] = len(choice(images, attacked, 0))
    return counts


def _source(name: str, images: Images, steps: _Steps, parts: Sequence[Arrays]) -> measurements.Source:
    """What stands beside measurements on these batches."""
    return measurements.Source(name=name, images=images, seed=steps.subject.seed).timed(parts)


def _clean(steps: _Steps, pack: _Pack, found: _Found) -> _Clean:
    """Every image as it is: forward passes only."""
    subject, inside = steps.subject, pack.inside
    package, temperature = subject.package, subject.temperature
    spec, low = suites.calibration(package), 1 / len(package.label_names)
    labels = inside.labels
    assert labels is not None
    bulk = dataclasses.replace(steps, size=1024)
    logits: dict[str, np.ndarray] = {}
    sure: dict[str, Sure] = {}
    everything: list[Arrays] = []
    for name, images in pack.all().items():
        parts = bulk.each(
            f"clean {name}",
            images.pixels,
            lambda at, images=images: attack_batches.clean(subject, images.pixels[at]),  # type: ignore[misc]
        )
        everything += parts
        source = _source(name, images, steps, parts)
        f = logits[name] = np.concatenate([part["logits"] for part in parts])
        c = metrics.confidence(f, temperature)
        sure[name] = Sure(confidence=c, odds=metrics.log_odds(f, temperature))
        if images is inside:
            found.rows += measurements.clean(source, f, temperature, spec)
            found.figures["reliability"] = measurements.reliability(f, labels, temperature, spec.report_bins)
        else:
            found.rows += measurements.detection(source, sure[pack.name], sure[name])
            found.figures["roc"][name] = {"clean": measurements.roc(sure[pack.name], sure[name])}
        found.rows += measurements.operating(source, c, package.thresholds)
        found.figures["histograms"][name] = {"clean": measurements.histogram(c, low)}
        right = f.argmax(1) == labels if images is inside else None
        found.examples.add(name, np.arange(len(c)), "clean", images.labels, f.argmax(1), sure[name], right)
    f = logits.pop(pack.name)
    source = _source(pack.name, inside, steps, everything)
    fingerprints = [images.fingerprint for images in pack.all().values()]
    found.rows += measurements.mixture(source, f, logits, temperature, spec, fingerprints)
    twice = attack_batches.steadiness(subject, inside.pixels[:64])
    found.doubts += [
        sanity_checks.randomised(twice["first"], twice["second"]),
        sanity_checks.probabilities(f),
    ]
    return _Clean(inside=sure.pop(pack.name), outside=sure, predicted=f.argmax(1))


def _robust(steps: _Steps, pack: _Pack, suite: Suite, clean: _Clean, found: _Found) -> None:
    """Robust accuracy in every ball, and a longer search on some survivors.

    Every attack meets the survivors of those before it, packed into full batches.
    """
    subject, inside = steps.subject, pack.inside
    picked, classes = choice(inside, suite.inside, subject.seed), len(subject.package.label_names)
    assert inside.labels is not None
    x, y = _at(inside.pixels, picked), inside.labels[picked]
    for ball in suites.robust_balls(subject.package, suite):
        attacks, budget = suite.attacks_for(ball), suite.budget_for(ball)
        backend = suite.backend_for(ball, classes)
        predicted, distance = clean.predicted[picked].copy(), np.zeros(len(picked))
        by, sure = np.where(predicted == y, 0, -1), clean.inside.at(picked)
        points = None if steps.saved is None else adversarial.floats(x)
        everything: list[Arrays] = []
        for number, attack in enumerate(attacks, 1):
            alive = np.flatnonzero(by == 0)
            parts = steps.each(
                f"robust accuracy, {ball}, {attack}",
                x[alive],
                lambda at, of=(x[alive], y[alive], ball, attack, budget), by=backend: attack_batches.robust(  # type: ignore[misc]
                    subject, of[0][at], of[1][at], *of[2:], backend=by, keep=steps.saved is not None
                ),
                labels=y[alive],
                settings=[
                    *(ball.model_dump(mode="json"), dataclasses.asdict(budget)),
                    *(backend_name(backend), steps.saved is not None),
                ],
            )
            if not parts:
                continue
            everything += parts
            joined = _joined(parts)
            broken = joined["broken"]
            by[alive[broken]] = number
            predicted[alive[broken]] = joined["predicted"][broken]
            distance[alive[broken]] = joined["distance"][broken]
            sure.confidence[alive[broken]] = joined["confidence"][broken]
            sure.odds[alive[broken]] = joined["odds"][broken]
            if points is not None:
                points[alive[broken]] = joined["x"]
            stuck = int(joined["stuck"].sum())
            found.doubts.append(
                sanity_checks.zero_gradients(f"robust accuracy ({ball}), {attack}", stuck, len(alive))
            )
            now = sure.at(alive), ~broken, distance[alive]
            found.examples.add(
                pack.name, picked[alive], f"{ball}: {attack}", y[alive], predicted[alive], *now
            )
        how = ensemble_name(attacks, budget, ball.p, classes, backend)
        source = _source(pack.name, inside, steps, everything)
        found.rows += measurements.robust(
            source, by, ball, attacks, how, batch_size=steps.size, backend=backend_name(backend)
        )
        found.doubts.append(sanity_checks.square_wins(ball, by, attacks))
        verdict = by == 0
        found.examples.add(pack.name, picked, f"{ball}: {how}", y, predicted, sure, verdict, distance)
        if steps.saved is not None and points is not None:
            steps.keep(
                f"{pack.name} {ball}",
                x=points,
                index=picked,
                label=y,
                predicted=predicted,
                broken_by=by,
                distance=distance,
            )
        alive = spread(np.flatnonzero(verdict), suite.probe)
        if not len(alive):
            steps.plan.skip(f"self-check, {ball}")
            continue
        survivors, theirs, longer = x[alive], y[alive], _longer(suite.budget_for(ball).steps)
        parts = steps.each(
            f"self-check, {ball}",
            survivors,
            lambda at, of=(survivors, theirs, ball, longer): attack_batches.probe_inside(  # type: ignore[misc]
                subject, of[0][at], of[1][at], *of[2:]
            ),
            labels=theirs,
            settings=[ball.model_dump(mode="json"), longer],
        )
        probed = _joined(parts)
        found.doubts.append(sanity_checks.not_converged_inside(ball, probed["broken"], longer))
        if backend == "reference":  # whose gradient attacks do not tell
            stuck = int(probed["stuck"].sum())
            found.doubts.append(
                sanity_checks.zero_gradients(f"self-check of the robust accuracy ({ball})", stuck, len(alive))
            )


def _worst_case(steps: _Steps, pack: _Pack, suite: Suite, clean: _Clean, found: _Found) -> None:
    """Out-images attacked to look familiar, in-images attacked to look outlying."""
    subject, inside, package = steps.subject, pack.inside, steps.subject.package
    low, seed = 1 / len(package.label_names), steps.subject.seed
    picked, inner = choice(inside, suite.outside, seed), suites.robust_balls(package, suite)[0]
    assert inside.labels is not None
    x = _at(inside.pixels, picked)
    keep = steps.saved is not None
    parts = steps.each(
        f"lowest confidence, {inner}",
        x,
        lambda at: attack_batches.lowest(subject, x[at], inner, steps=suite.outside_steps, keep=keep),
        settings=[inner.model_dump(mode="json"), suite.outside_steps, keep],
    )
    lowered = _joined(parts)
    attacked = _sure(lowered)
    source = _source(pack.name, inside, steps, parts)
    inwards = f"APGD, {suite.outside_steps} steps, 2 goals, or the image"
    found.rows += measurements.operating(
        source, lowered["confidence"], package.thresholds, inner, attack=inwards
    )
    found.figures["histograms"][pack.name]["attacked"] = measurements.histogram(lowered["confidence"], low)
    found.examples.add(
        pack.name,
        picked,
        f"{inner}: lowest confidence",
        inside.labels[picked],
        lowered["predicted"],
        attacked,
        None,
        lowered["distance"],
    )
    if keep:
        steps.keep(f"{pack.name} {inner} lowest confidence", index=picked, **_kept(lowered))
    ball, targets = suites.outside_ball(package), min(suite.outside_targets, len(package.label_names) - 1)
    how = f"APGD, {suite.outside_steps} steps x {suite.outside_restarts}, {2 + targets} goals, or the image"
    for name, images in pack.outside.items():
        chosen = choice(images, suite.outside, seed)
        pixels = _at(images.pixels, chosen)
        parts = steps.each(
            f"worst case, {name}",
            pixels,
            lambda at, pixels=pixels: attack_batches.worst_case(  # type: ignore[misc]
                subject,
                pixels[at],
                ball,
                steps=suite.outside_steps,
                restarts=suite.outside_restarts,
                targets=targets,
                keep=keep,
            ),
            settings=[
                *(ball.model_dump(mode="json"), suite.outside_steps, suite.outside_restarts, targets),
                keep,
            ],
        )
        joined, source = _joined(parts), _source(name, images, steps, parts)
        worst = joined["confidence"]
        found.rows += measurements.detection(source, clean.inside, _sure(joined), ball, attack=how)
        for suffix, against, where, by in (
            ("_inside_attacked", clean.outside[name], inner, inwards),
            ("_both_attacked", _sure(joined), ball, how),
        ):
            details = {"attack": by, "inside_ball": str(inner), "inside_attack": inwards}
            found.rows += measurements.detection(source, attacked, against, where, suffix, **details)
        found.rows += measurements.operating(source, worst, package.thresholds, ball, attack=how)
        found.figures["roc"][name]["attacked"] = measurements.roc(clean.inside, _sure(joined))
        found.figures["histograms"][name]["attacked"] = measurements.histogram(worst, low)
        found.examples.add(
            name,
            chosen,
            f"{ball}: worst case",
            None,
            joined["predicted"],
            _sure(joined),
            None,
            joined["distance"],
        )
        if keep:
            steps.keep(f"{name} {ball} worst case", index=chosen, **_kept(joined))
        found.gallery += [
            Attacked(
                dataset=name,
                image=pixels[k].copy(),  # a view would keep all of them in memory
                attacked=joined["picture"][k].copy(),
                before=float(joined["clean"][k]),
                after=float(worst[k]),
                label=package.label_names[int(joined["predicted"][k])],
            )
            for k in np.argsort(-joined["odds"], kind="stable")[:GALLERY]
        ]
        found.doubts += [
            sanity_checks.zero_gradients(f"worst case on {name}", int(joined["stuck"].sum()), len(worst)),
            sanity_checks.below_clean(name, joined["clean"], worst),
        ]
        if not suite.probe:
            continue
        probed = spread(np.arange(len(pixels)), suite.probe)
        some, longer = pixels[probed], _longer(suite.outside_steps)
        parts = steps.each(
            f"self-check, {name}",
            some,
            lambda at, some=some, longer=longer: attack_batches.probe_outside(  # type: ignore[misc]
                subject, some[at], ball, longer
            ),
            settings=[ball.model_dump(mode="json"), longer],
        )
        reached = _joined(parts)["confidence"]
        found.doubts.append(sanity_checks.not_converged_outside(name, ball, worst[probed], reached, longer))


def _radius(steps: _Steps, pack: _Pack, suite: Suite, found: _Found) -> None:
    """Figure 5, on some in-images and as many out-images of all sets together."""
    if not suite.curve:
        return
    subject, inside = steps.subject, pack.inside
    assert inside.labels is not None
    radii, some = suites.radii(subject.package), choice(inside, suite.curve, subject.seed)
    share = math.ceil(suite.curve / len(pack.outside))
    outer = [images.pixels[choice(images, share, subject.seed)] for images in pack.outside.values()]
    cut = dataclasses.replace(steps, size=max(1, steps.size // len(radii)))
    for key, pixels, labels in (
        ("inside", inside.pixels[some], inside.labels[some]),
        ("outside", np.concatenate(outer)[: suite.curve], None),
    ):
        parts = cut.each(
            f"confidence over the radius, {key}",
            pixels,
            lambda at, pixels=pixels, labels=labels: attack_batches.curve(  # type: ignore[misc]
                subject, pixels[at], None if labels is None else labels[at], radii, suite.curve_steps
            ),
            labels=labels,
            settings=[radii, suite.curve_steps],
        )
        found.figures["radius"][key] = measurements.radius_curve(_joined(parts)["values"], radii)


def _kept(joined: Arrays) -> Arrays:
    return {key: joined[key] for key in ("x", "predicted", "confidence", "distance")}


def _sure(joined: Arrays) -> Sure:
    return Sure(confidence=joined["confidence"], odds=joined["odds"])


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of batches put together."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if parts[0][key].ndim}


class _Examples:
    """Columns of `examples.parquet`."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        dataset: str,
        index: np.ndarray,
        attack: str,
        labels: np.ndarray | None,
        predicted: np.ndarray,
        sure: Sure,
        verdict: np.ndarray | None,
        distance: np.ndarray | None = None,
    ) -> None:
        """`verdict`: the decision is (still) right; -1 where there is no right one."""
        n = len(index)
        columns = {
            "model": np.full(n, self.model, dtype=object),
            "dataset": np.full(n, dataset, dtype=object),
            "index": np.asarray(index, np.int64),
            "attack": np.full(n, attack, dtype=object),
            "label": np.full(n, -1, np.int64) if labels is None else np.asarray(labels, np.int64),
            "predicted": np.asarray(predicted, np.int64),
            "confidence": np.asarray(sure.confidence, np.float64),
            "log_odds": np.asarray(sure.odds, np.float64),
            "verdict": np.full(n, -1, np.int8) if verdict is None else np.asarray(verdict, np.int8),
            "distance": np.zeros(n) if distance is None else np.asarray(distance, np.float64),
        }
        for key, column in columns.items():
            self.parts.setdefault(key, []).append(column)

    def columns(self) -> dict[str, np.ndarray]:
        return {key: np.concatenate(parts) for key, parts in self.parts.items()}


# --- what stands beside the numbers ------------------------------------------------------------------------


def _file(package: ModelPackage, report: Report, evaluation: Evaluation, pack: _Pack) -> None:
    """The measurements into the package's config and, where it was rendered, its card."""
    if packages.read(package.path, verify=False).digest != package.digest:
        raise PackageError(
            package.path,
            "was changed while it was evaluated, so the measurements are not its own",
            "Evaluate it again. The reports are written and hold for what it was.",
        )
    packages.update(
        package,
        config_changes={
            "ratio": {
                "metrics": {
                    "suite": evaluation.suite,
                    "protocol": evaluation.protocol,
                    "seed": report.seed,
                    "versions": evaluation.environment["versions"],
                    "hardware": evaluation.environment["hardware"],
                    "data": [
                        {key: value for key, value in entry.items() if key != "source"}  # somebody's path
                        for entry in in_distribution.described(pack.all())
                    ],
                    "measurements": [row.to_json() for row in report.measurements if _headline(row)],
                    "warnings": list(report.warnings),
                }
            }
        },
    )


def _headline(row: Measurement) -> bool:
    """Measurements that belong on a card: no breakdowns, no variants."""
    left_out = ("_attacked", "_uncalibrated", "accuracy_after_", "accuracy_before_", "conservative_", "aupr_")
    return not any(part in row.name for part in left_out)
