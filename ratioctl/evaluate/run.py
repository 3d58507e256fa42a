"""An evaluation from end to end: load, measure batch by batch, doubt, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ratioctl
from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.data import inside, outside
from ratioctl.data.inside import Images
from ratioctl.errors import UsageError
from ratioctl.evaluate import doubts, suites, summary, work
from ratioctl.evaluate.suites import SUITES, Suite
from ratioctl.evaluate.summary import Sure
from ratioctl.evaluate.work import Subject
from ratioctl.files import lock, make_folder
from ratioctl.journal import Arrays, Journal, key_of
from ratioctl.nets import from_package, frozen
from ratioctl.nets.hardware import Place, choose
from ratioctl.nets.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball
from ratioctl.results import Attacked, Evaluated, Evaluation, Measurement, Report

Watch = Callable[[dict[str, Any]], None]
Model = str | Path | ModelPackage
Ood = Sequence[str] | Mapping[str, str]

BUILT_IN = {"uniform noise": "noise:uniform", "smooth noise": "noise:smooth"}
FORMAT = 2  # of filed batches; grows when their arrays change
GALLERY = 8  # pictures a set
_FORWARD = 0.4  # cost of a forward pass in forward-and-gradient passes, measured on a ResNet-18


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
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    watch: Watch | None = None,
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
        precision: of the attacks' search; verdicts and confidences are always fp32. "auto" searches in bf16
            where that pays, except in suites that are `exact`.
        watch: called with {"event": "plan", "seconds", "batches"} before long work, {"event": "batch",
            "what", "done", "of", "seconds_left"} after each batch, {"event": "note", "text"}.
        finish: called with the result before the journal is closed; writes the reports.

    Raises:
        UsageError: unknown suite, a bad NAME=SOURCE, a name given twice.
        SourceError: data that is missing or has class folders that are no labels of a model.
        PackageError: a model that cannot be read.
    """
    chosen = _suite(suite)
    named = _named(ood, data)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be positive", "For example --limit 1000.")
    loaded = [
        model if isinstance(model, ModelPackage) else packages.read(packages.find(str(model)))
        for model in (models or (packages.DEFAULT_MODEL,))
    ]
    place = choose(device, "fp32" if precision == "auto" and chosen.exact else precision)
    tell = watch or (lambda event: None)
    folder = None if out is None else make_folder(Path(out))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(lock(folder))
        journal = Journal(None if folder is None else folder / ".journal", keep=resume)
        sets = _Sets(data, named, limit, seed, download)
        packs = [sets.of(package) for package in loaded]
        plan = _Plan(
            sum(
                passes
                for package, pack in zip(loaded, packs, strict=True)
                for passes in _passes(package, pack, chosen)
            ),
            tell,
        )
        parts: list[Evaluated] = []
        for package, pack, name in zip(loaded, packs, _names(loaded), strict=True):
            plan.start(name)
            parts.append(_one(package, name, pack, chosen, place, seed, journal, plan))
        evaluation = Evaluation(
            suite=chosen.name,
            protocol=str(chosen),
            data=tuple(packs[0].described()),
            environment=_environment(place),
            models=tuple(parts),
        )
        if write:
            for package, part in zip(loaded, parts, strict=True):
                _file(package, part.report, evaluation)
        if finish is not None:
            finish(evaluation)
        journal.finish()
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

    def described(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "source": images.source,
                "role": "inside" if images.labels is not None else "outside",
                "n": len(images),
                "fingerprint": images.fingerprint,
            }
            for name, images in self.all().items()
        ]


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
            test = inside.load_labelled(
                self.data, size, channels, package.label_names, download=self.download
            )
            found = {
                name: outside.load([source], size, channels, seed=self.seed, download=self.download)
                for name, source in self.ood.items()
            }
            own = _own_name(self.data)
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
    place = np.empty(n)
    for label in np.unique(images.labels):
        mine = order[images.labels[order] == label]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return np.sort(np.lexsort((np.argsort(order), place))[:count])


def _suite(suite: str | Suite) -> Suite:
    if isinstance(suite, Suite):
        return suite
    if suite == "explanations":
        raise UsageError(
            "--suite explanations", "comes with a later version", f"Available: {', '.join(SUITES)}."
        )
    if suite not in SUITES:
        raise UsageError(f"--suite {suite}", "no such suite", f"Available: {', '.join(SUITES)}.")
    return SUITES[suite]


def _own_name(data: str) -> str:
    """How reports and cards name the in-images: a path's folders are nobody's business."""
    return re.split(r"[/\\]", data.rstrip("/\\"))[-1] or data


def _named(ood: Ood, data: str) -> dict[str, str]:
    """Names to SOURCEs; the built-in noise where none is given."""
    pairs = list(ood.items()) if isinstance(ood, Mapping) else [_pair(text) for text in ood]
    taken = {"mean": "is the name of the average", _own_name(data): "is the name of the in-images"}
    for name, _ in pairs:
        if name in taken:
            raise UsageError(f"--ood {name}", taken[name], "Choose another name.")
        taken[name] = "is given twice"
    return dict(pairs) or dict(BUILT_IN)


def _pair(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not equals or not name.strip() or not source:
        raise UsageError(f"--ood {text}", "is not NAME=SOURCE", "For example --ood svhn=svhn:test.")
    return name, source


def _names(loaded: Sequence[ModelPackage]) -> list[str]:
    """The packages' names, numbered where one occurs again."""
    names: list[str] = []
    for package in loaded:
        name, k = package.name, 2
        while name in names:
            name, k = f"{package.name}-{k}", k + 1
        names.append(name)
    return names


# --- the plan ----------------------------------------------------------------------------------------------


def _passes(package: ModelPackage, pack: _Pack, suite: Suite) -> list[float]:
    """Forward-and-gradient passes of all images together, at most: survivors are not known beforehand."""
    classes, balls = len(package.label_names), suites.robust_balls(package, suite)
    n = len(choice(pack.inside, suite.inside, 0))
    outside_each = (
        suite.outside_steps * suite.outside_restarts * (2 + min(suite.outside_targets, classes - 1))
    )
    curve = min(suite.curve, n) * len(suites.radii(package)) * suite.curve_steps
    costs = [len(images) * _FORWARD for images in pack.all().values()]
    costs += [n * _each(suite, ball, classes) for ball in balls]
    costs += [min(suite.probe, n) * _longer(suite.budget_for(ball).steps) for ball in balls]
    lowered = len(choice(pack.inside, suite.outside, 0))
    costs += [lowered * 2 * suite.outside_steps, curve, curve]
    for images in pack.outside.values():
        count = len(choice(images, suite.outside, 0))
        costs += [count * outside_each, min(suite.probe, count) * _longer(suite.outside_steps)]
    return costs


def _longer(steps: int) -> int:
    """Steps of the self-check's search: enough to do better than a search that was too short."""
    return max(4 * steps, 50)


def _each(suite: Suite, ball: Ball, classes: int) -> float:
    """Passes of one image that survives the whole ensemble."""
    budget = suite.budget_for(ball)
    targets = min(budget.targets, classes - 1)
    costs = {
        "apgd-ce": budget.steps * budget.restarts,
        "apgd-t": budget.steps * targets,
        "fab-t": 1.3 * budget.steps * targets,
        "square": budget.queries * _FORWARD,
    }
    return sum(costs[attack] for attack in suite.attacks_for(ball))


class _Plan:
    """How much is to do, how fast it goes, and who wants to know."""

    def __init__(self, passes: float, tell: Watch) -> None:
        self.passes, self.tell = passes, tell
        self.done = self.computed = self.seconds = 0.0
        self.model = ""
        self.pace: float | None = None  # passes a second

    def start(self, model: str) -> None:
        self.model = model

    def measure(self, subject: Subject, pixels: np.ndarray) -> None:
        """Time one pass of a batch and say what is ahead."""
        if self.pace is not None or not len(pixels):
            return
        work.one_pass(subject, pixels)
        started = time.monotonic()
        work.one_pass(subject, pixels)
        self.pace = len(pixels) * (1 + _FORWARD) / max(time.monotonic() - started, 1e-6)
        self.tell({"event": "plan", "seconds": self.passes / self.pace})

    def advance(self, what: str, passes: float, seconds: float | None) -> None:
        """A batch is done; `seconds` None where it was taken from the journal."""
        self.done += passes
        if seconds is not None:
            self.computed, self.seconds = self.computed + passes, self.seconds + seconds
        pace = self.computed / self.seconds if self.computed > 0.02 * self.passes else self.pace
        left = None if not pace else max(self.passes - self.done, 0.0) / pace
        share = min(self.done / max(self.passes, 1e-9), 1.0)
        self.tell({"event": "batch", "model": self.model, "what": what, "share": share, "seconds_left": left})


# --- one model ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
    """Runs batches through the journal: `each` cuts a set into batches and files what `compute` returns."""

    subject: Subject
    journal: Journal
    plan: _Plan
    facts: dict[str, Any]
    size: int  # images a batch

    def each(
        self,
        what: str,
        pixels: np.ndarray,
        compute: Callable[[slice], Arrays],
        *,
        passes: float,
        labels: np.ndarray | None = None,
        **facts: Any,
    ) -> list[Arrays]:
        """`compute` on every batch; `facts` is what decides its result besides model and images."""
        parts = []
        for start in range(0, len(pixels), self.size):
            at = slice(start, min(start + self.size, len(pixels)))
            digest = hashlib.sha256(np.ascontiguousarray(pixels[at]).tobytes())
            if labels is not None:
                digest.update(np.ascontiguousarray(labels[at], dtype="<i8").tobytes())
            key = key_of({**self.facts, **facts, "what": what, "images": digest.hexdigest()})
            before = self.journal.reused
            arrays = self.journal.fetch(key, lambda at=at: compute(at))  # type: ignore[misc]
            taken = self.journal.reused > before
            seconds = None if taken else float(arrays["seconds"])
            self.plan.advance(what, passes * (at.stop - at.start), seconds)
            parts.append(arrays)
        return parts


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


def _one(
    package: ModelPackage,
    name: str,
    pack: _Pack,
    suite: Suite,
    place: Place,
    seed: int,
    journal: Journal,
    plan: _Plan,
) -> Evaluated:
    network = frozen(from_package(package)).to(place.device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    predictor = Predictor(network=network, device=place.device)
    subject = Subject(package=package, network=network, predictor=predictor, place=place, seed=seed)
    facts = {
        "format": FORMAT,
        "model": package.digest,
        "seed": seed,
        "device": place.device.type,
        "bf16": place.bf16,
        "torch": torch.__version__,
        "ratioctl": ratioctl.__version__,
    }
    size = 128 if place.device.type == "cpu" else 512
    steps = _Steps(subject=subject, journal=journal, plan=plan, facts=facts, size=size)
    plan.measure(subject, pack.inside.pixels[:size])

    found = _Found(examples=_Examples(name))
    clean = _clean(steps, pack, found)
    _robust(steps, pack, suite, found)
    _worst_case(steps, pack, suite, clean, found)
    _radius(steps, pack, suite, found)
    found.rows += summary.mean_over_sets(found.rows, list(pack.outside), seed)
    found.doubts += [
        doubts.uncalibrated(package),
        doubts.temperature_at_end(package.temperature, suites.calibration(package), package.calibrated),
        *doubts.trained_on(package, pack.whole),
        *doubts.duplicates(pack.all()),
        *doubts.unreadable(pack.all()),
        doubts.few(_counts(pack, suite)),
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


def _source(name: str, images: Images, steps: _Steps, parts: Sequence[Arrays]) -> summary.Source:
    """What stands beside measurements on these batches."""
    return summary.Source(name=name, images=images, seed=steps.subject.seed).timed(parts)


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
            lambda at, images=images: work.clean(subject, images.pixels[at]),  # type: ignore[misc]
            passes=_FORWARD,
        )
        everything += parts
        source = _source(name, images, steps, parts)
        f = logits[name] = np.concatenate([part["logits"] for part in parts])
        c = metrics.confidence(f, temperature)
        sure[name] = Sure(confidence=c, odds=metrics.log_odds(f, temperature))
        if images is inside:
            found.rows += summary.clean(source, f, temperature, spec)
            found.figures["reliability"] = summary.reliability(f, labels, temperature, spec.report_bins)
        else:
            found.rows += summary.detection(source, sure[pack.name], sure[name])
            found.figures["roc"][name] = {"clean": summary.roc(sure[pack.name], sure[name])}
        found.rows += summary.operating(source, c, package.thresholds)
        found.figures["histograms"][name] = {"clean": summary.histogram(c, low)}
        right = f.argmax(1) == labels if images is inside else None
        found.examples.add(name, np.arange(len(c)), "clean", images.labels, f.argmax(1), c, right)
    f = logits.pop(pack.name)
    source = _source(pack.name, inside, steps, everything)
    found.rows += summary.mixture(source, f, logits, temperature, spec)
    twice = work.steadiness(subject, inside.pixels[:64])
    found.doubts += [doubts.randomised(twice["first"], twice["second"]), doubts.probabilities(f)]
    return _Clean(inside=sure.pop(pack.name), outside=sure)


def _robust(steps: _Steps, pack: _Pack, suite: Suite, found: _Found) -> None:
    """Robust accuracy in every ball, and a longer search on some survivors."""
    subject, inside = steps.subject, pack.inside
    picked = choice(inside, suite.inside, subject.seed)
    assert inside.labels is not None
    x, y = inside.pixels[picked], inside.labels[picked]
    for ball in suites.robust_balls(subject.package, suite):
        attacks = suite.attacks_for(ball)
        parts = steps.each(
            f"robust accuracy, {ball}",
            x,
            lambda at, ball=ball: work.robust(subject, x[at], y[at], ball, suite),  # type: ignore[misc]
            passes=_each(suite, ball, len(subject.package.label_names)),
            labels=y,
            settings=[ball.model_dump(mode="json"), attacks, dataclasses.asdict(suite.budget_for(ball))],
        )
        how = str(parts[0]["name"])
        source = _source(pack.name, inside, steps, parts)
        found.rows += summary.robust(source, parts, ball, attacks, how, batch_size=steps.size)
        joined = _joined(parts)
        for k, attack in enumerate(attacks):
            attacked, stuck = (int(sum(part[key][k] for part in parts)) for key in ("attacked", "stuck"))
            found.doubts.append(doubts.zero_gradients(f"robust accuracy ({ball}), {attack}", stuck, attacked))
        found.doubts.append(doubts.square_wins(joined["broken_by"], attacks))
        verdict = joined["broken_by"] == 0
        found.examples.add(
            pack.name,
            picked,
            f"{ball}: {how}",
            y,
            joined["predicted"],
            joined["confidence"],
            verdict,
            joined["distance"],
        )
        alive = np.flatnonzero(verdict)[: suite.probe]
        if not len(alive):
            continue
        survivors, theirs, longer = x[alive], y[alive], _longer(suite.budget_for(ball).steps)
        parts = steps.each(
            f"self-check, {ball}",
            survivors,
            lambda at, of=(survivors, theirs, ball, longer): work.probe_inside(  # type: ignore[misc]
                subject, of[0][at], of[1][at], *of[2:]
            ),
            passes=longer,
            labels=theirs,
            settings=[ball.model_dump(mode="json"), longer],
        )
        found.doubts.append(doubts.not_converged_inside(ball, _joined(parts)["broken"], longer))


def _worst_case(steps: _Steps, pack: _Pack, suite: Suite, clean: _Clean, found: _Found) -> None:
    """Out-images attacked to look familiar, in-images attacked to look outlying."""
    subject, inside, package = steps.subject, pack.inside, steps.subject.package
    low, seed = 1 / len(package.label_names), steps.subject.seed
    picked, inner = choice(inside, suite.outside, seed), suites.robust_balls(package, suite)[0]
    assert inside.labels is not None
    x = inside.pixels[picked]
    parts = steps.each(
        f"lowest confidence, {inner}",
        x,
        lambda at: work.lowest(subject, x[at], inner, steps=suite.outside_steps),
        passes=2 * suite.outside_steps,
        settings=[inner.model_dump(mode="json"), suite.outside_steps],
    )
    lowered = _joined(parts)
    attacked = _sure(lowered)
    source = _source(pack.name, inside, steps, parts)
    how = f"APGD, {suite.outside_steps} steps, 2 goals, or the image"
    found.rows += summary.operating(source, lowered["confidence"], package.thresholds, inner, attack=how)
    found.figures["histograms"][pack.name]["attacked"] = summary.histogram(lowered["confidence"], low)
    found.examples.add(
        pack.name,
        picked,
        f"{inner}: lowest confidence",
        inside.labels[picked],
        lowered["predicted"],
        lowered["confidence"],
        None,
        lowered["distance"],
    )
    ball, targets = suites.outside_ball(package), min(suite.outside_targets, len(package.label_names) - 1)
    how = f"APGD, {suite.outside_steps} steps x {suite.outside_restarts}, {2 + targets} goals, or the image"
    for name, images in pack.outside.items():
        chosen = choice(images, suite.outside, seed)
        pixels = images.pixels[chosen]
        parts = steps.each(
            f"worst case, {name}",
            pixels,
            lambda at, pixels=pixels: work.worst_case(  # type: ignore[misc]
                subject,
                pixels[at],
                ball,
                steps=suite.outside_steps,
                restarts=suite.outside_restarts,
                targets=targets,
            ),
            passes=suite.outside_steps * suite.outside_restarts * (2 + targets),
            settings=[ball.model_dump(mode="json"), suite.outside_steps, suite.outside_restarts, targets],
        )
        joined, source = _joined(parts), _source(name, images, steps, parts)
        worst = joined["confidence"]
        found.rows += summary.detection(source, clean.inside, _sure(joined), ball, attack=how)
        for suffix, against, where in (
            ("_inside_attacked", clean.outside[name], inner),
            ("_both_attacked", _sure(joined), ball),
        ):
            found.rows += summary.detection(source, attacked, against, where, suffix, inside_ball=str(inner))
        found.rows += summary.operating(source, worst, package.thresholds, ball, attack=how)
        found.figures["roc"][name]["attacked"] = summary.roc(clean.inside, _sure(joined))
        found.figures["histograms"][name]["attacked"] = summary.histogram(worst, low)
        found.examples.add(
            name,
            chosen,
            f"{ball}: worst case",
            None,
            joined["predicted"],
            worst,
            None,
            joined["distance"],
        )
        found.gallery += [
            Attacked(
                dataset=name,
                image=pixels[k],
                attacked=joined["picture"][k],
                before=float(joined["clean"][k]),
                after=float(worst[k]),
                label=package.label_names[int(joined["predicted"][k])],
            )
            for k in np.argsort(-joined["odds"], kind="stable")[:GALLERY]
        ]
        found.doubts += [
            doubts.zero_gradients(f"worst case on {name}", int(joined["stuck"].sum()), len(worst)),
            doubts.below_clean(name, joined["clean"], worst),
        ]
        if not suite.probe:
            continue
        some, longer = pixels[: suite.probe], _longer(suite.outside_steps)
        parts = steps.each(
            f"self-check, {name}",
            some,
            lambda at, some=some, longer=longer: work.probe_outside(  # type: ignore[misc]
                subject, some[at], ball, longer
            ),
            passes=longer,
            settings=[ball.model_dump(mode="json"), longer],
        )
        reached = _joined(parts)["confidence"]
        found.doubts.append(doubts.not_converged_outside(name, ball, worst[: len(reached)], reached, longer))


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
            lambda at, pixels=pixels, labels=labels: work.curve(  # type: ignore[misc]
                subject, pixels[at], None if labels is None else labels[at], radii, suite.curve_steps
            ),
            passes=len(radii) * suite.curve_steps,
            labels=labels,
            settings=[radii, suite.curve_steps],
        )
        found.figures["radius"][key] = summary.radius_curve(_joined(parts)["values"], radii)


def _sure(joined: Arrays) -> Sure:
    return Sure(confidence=joined["confidence"], odds=joined["odds"])


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of batches put together."""
    return {
        key: np.concatenate([part[key] for part in parts])
        for key in parts[0]
        if parts[0][key].ndim and key != "attacked"
    }


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
        confidence: np.ndarray,
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
            "confidence": np.asarray(confidence, np.float64),
            "verdict": np.full(n, -1, np.int8) if verdict is None else np.asarray(verdict, np.int8),
            "distance": np.zeros(n) if distance is None else np.asarray(distance, np.float64),
        }
        for key, column in columns.items():
            self.parts.setdefault(key, []).append(column)

    def columns(self) -> dict[str, np.ndarray]:
        return {key: np.concatenate(parts) for key, parts in self.parts.items()}


# --- what stands beside the numbers ------------------------------------------------------------------------


def _environment(place: Place) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"model name\s*:\s*(.+)", text)
        processor = found[1].strip() if found else processor
    gpu = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None
    return {
        "versions": {
            "ratioctl": ratioctl.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"processor": processor, "threads": torch.get_num_threads(), "gpu": gpu},
        "device": str(place.device),
        "attack_precision": "bf16" if place.bf16 else "fp32",
        "verdict_precision": "fp32",
    }


def _file(package: ModelPackage, report: Report, evaluation: Evaluation) -> None:
    """The measurements into the package's config and, where it was rendered, its card."""
    packages.update(
        package,
        config_changes={
            "ratio": {
                "metrics": {
                    "suite": evaluation.suite,
                    "protocol": evaluation.protocol,
                    "seed": report.seed,
                    "versions": evaluation.environment["versions"],
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
