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
from ratioctl.evaluate.journal import Arrays, Journal, key_of
from ratioctl.evaluate.suites import SUITES, Suite
from ratioctl.evaluate.work import Subject
from ratioctl.files import lock, make_folder
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
        watch: called with {"event": "plan", "seconds", "batches"} before long work, {"event": "batch",
            "what", "done", "of", "seconds_left"} after each batch, {"event": "note", "text"}.
        finish: called with the result before the journal is closed; writes the reports.

    Raises:
        UsageError: unknown suite, a bad NAME=SOURCE, a name given twice.
        SourceError: data that is missing or has class folders that are no labels of a model.
        PackageError: a model that cannot be read.
    """
    chosen = _suite(suite)
    named = _named(ood)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be positive", "For example --limit 1000.")
    loaded = [
        model if isinstance(model, ModelPackage) else packages.read(packages.find(str(model)))
        for model in (models or (packages.DEFAULT_MODEL,))
    ]
    place = choose(device, precision)
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

    inside: Images
    outside: dict[str, Images]

    def all(self) -> dict[str, Images]:
        return {self.inside.source: self.inside, **self.outside}

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
            self.loaded[key] = _Pack(
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


def _named(ood: Ood) -> dict[str, str]:
    """Names to SOURCEs; the built-in noise where none is given."""
    if isinstance(ood, Mapping):
        return dict(ood) or dict(BUILT_IN)
    found: dict[str, str] = {}
    for text in ood:
        name, equals, source = text.partition("=")
        if not equals or not name.strip() or not source:
            raise UsageError(f"--ood {text}", "is not NAME=SOURCE", "For example --ood svhn=svhn:test.")
        if name in found or name == "mean":
            reason = "is the name of the average" if name == "mean" else "is given twice"
            raise UsageError(f"--ood {name}", reason, "Choose another name.")
        found[name] = source
    return found or dict(BUILT_IN)


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
    costs += [n * 2 * suite.outside_steps, curve, curve]
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
    subject = Subject(
        package=package,
        network=network,
        predictor=Predictor(network=network, device=place.device),
        place=place,
        seed=seed,
    )
    labels = pack.inside.labels
    assert labels is not None
    steps = _Steps(
        subject=subject,
        journal=journal,
        plan=plan,
        facts={
            "model": package.digest,
            "seed": seed,
            "device": place.device.type,
            "bf16": place.bf16,
            "torch": torch.__version__,
            "ratioctl": ratioctl.__version__,
        },
        size=128 if place.device.type == "cpu" else 512,
    )
    plan.measure(subject, pack.inside.pixels[: steps.size])
    spec, temperature = suites.calibration(package), package.temperature
    low = 1 / len(package.label_names)
    source = summary.Source(name=pack.inside.source, images=pack.inside, seed=seed)
    rows: list[Measurement] = []
    said: list[str | None] = []
    figures: dict[str, Any] = {"histograms": {}, "roc": {}, "radius": {}}
    examples = _Examples(name)

    # Clean: everything, forward passes only.
    bulk = dataclasses.replace(steps, size=1024)
    parts = bulk.each(
        "clean in-images",
        pack.inside.pixels,
        lambda at: work.clean(subject, pack.inside.pixels[at]),
        passes=_FORWARD,
    )
    logits = np.concatenate([part["logits"] for part in parts])
    confident = metrics.confidence(logits, temperature)
    rows += summary.clean(source, logits, temperature, spec, summary.seconds(parts))
    rows += summary.operating(source, confident, package.thresholds)
    examples.add(
        pack.inside.source,
        np.arange(len(logits)),
        "clean",
        labels,
        logits.argmax(1),
        confident,
        logits.argmax(1) == labels,
    )
    figures["reliability"] = summary.reliability(logits, labels, temperature, spec.report_bins)
    figures["histograms"][pack.inside.source] = {"clean": summary.histogram(confident, low)}
    twice = work.steadiness(subject, pack.inside.pixels[:64])
    said += [doubts.randomised(twice["first"], twice["second"]), doubts.probabilities(logits)]

    outside_logits: dict[str, np.ndarray] = {}
    for other, images in pack.outside.items():
        parts = bulk.each(
            f"clean {other}",
            images.pixels,
            lambda at, images=images: work.clean(subject, images.pixels[at]),  # type: ignore[misc]
            passes=_FORWARD,
        )
        outside_logits[other] = np.concatenate([part["logits"] for part in parts])
    clean_out = {other: metrics.confidence(f, temperature) for other, f in outside_logits.items()}
    for other, images in pack.outside.items():
        named = summary.Source(name=other, images=images, seed=seed)
        rows += summary.detection(named, confident, clean_out[other])
        rows += summary.operating(named, clean_out[other], package.thresholds)
        figures["roc"][other] = {"clean": summary.roc(confident, clean_out[other])}
        figures["histograms"][other] = {"clean": summary.histogram(clean_out[other], low)}
        n = len(images)
        predicted = outside_logits[other].argmax(1)
        examples.add(other, np.arange(n), "clean", None, predicted, clean_out[other], None)
    rows += summary.mixture(source, logits, outside_logits, temperature, spec)

    # Attacked in-images.
    picked = choice(pack.inside, suite.inside, seed)
    x_in, y_in = pack.inside.pixels[picked], labels[picked]
    for ball in suites.robust_balls(package, suite):
        attacks = suite.attacks_for(ball)
        parts = steps.each(
            f"robust accuracy, {ball}",
            x_in,
            lambda at, ball=ball: work.robust(subject, x_in[at], y_in[at], ball, suite),  # type: ignore[misc]
            passes=_each(suite, ball, logits.shape[1]),
            labels=y_in,
            settings=[list(attacks), dataclasses.asdict(suite.budget_for(ball))],
        )
        attack_name = str(parts[0]["name"])
        rows += summary.robust(source, parts, ball, attacks, attack_name)
        joined = _joined(parts)
        for k, attack in enumerate(attacks):
            hit = int(sum(part["attacked"][k] for part in parts))
            stuck = int(sum(part["stuck"][k] for part in parts))
            said.append(doubts.zero_gradients(f"robust accuracy ({ball}), {attack}", stuck, hit))
        said.append(doubts.square_wins(joined["broken_by"], attacks))
        examples.add(
            pack.inside.source,
            picked,
            f"{ball}: {attack_name}",
            y_in,
            joined["predicted"],
            joined["confidence"],
            joined["broken_by"] == 0,
            joined["distance"],
        )
        alive = np.flatnonzero(joined["broken_by"] == 0)[: suite.probe]
        if len(alive):
            longer = _longer(suite.budget_for(ball).steps)
            probed = steps.each(
                f"self-check, {ball}",
                x_in[alive],
                lambda at, alive=alive, ball=ball, longer=longer: work.probe_inside(  # type: ignore[misc]
                    subject, x_in[alive][at], y_in[alive][at], ball, longer
                ),
                passes=longer,
                labels=y_in[alive],
                steps=longer,
            )
            said.append(doubts.not_converged_inside(ball, _joined(probed)["broken"], longer))

    # Attacked out-images, and in-images attacked to look outlying.
    first = suites.robust_balls(package, suite)[0]
    lowered = _joined(
        steps.each(
            f"lowest confidence, {first}",
            x_in,
            lambda at: work.lowest(subject, x_in[at], first, steps=suite.outside_steps),
            passes=2 * suite.outside_steps,
            steps=suite.outside_steps,
        )
    )
    rows += summary.operating(source, lowered["confidence"], package.thresholds, first, attack="APGD")
    figures["histograms"][pack.inside.source]["attacked"] = summary.histogram(lowered["confidence"], low)
    examples.add(
        pack.inside.source,
        picked,
        f"{first}: lowest confidence",
        y_in,
        lowered["predicted"],
        lowered["confidence"],
        None,
        lowered["distance"],
    )
    ball = suites.outside_ball(package)
    gallery: list[Attacked] = []
    sample: list[np.ndarray] = []
    targets = min(suite.outside_targets, logits.shape[1] - 1)
    for other, images in pack.outside.items():
        chosen = choice(images, suite.outside, seed)
        pixels = images.pixels[chosen]
        sample.append(pixels[: math.ceil(suite.curve / len(pack.outside))])
        parts = steps.each(
            f"worst case, {other}",
            pixels,
            lambda at, pixels=pixels: work.worst_case(  # type: ignore[misc]
                subject,
                pixels[at],
                ball,
                steps=suite.outside_steps,
                restarts=suite.outside_restarts,
                targets=suite.outside_targets,
            ),
            passes=suite.outside_steps * suite.outside_restarts * (2 + targets),
            settings=[str(ball), suite.outside_steps, suite.outside_restarts, suite.outside_targets],
        )
        found = _joined(parts)
        named = summary.Source(name=other, images=images, seed=seed)
        worst = found["confidence"]
        how = (
            f"APGD, {suite.outside_steps} steps x {suite.outside_restarts}, {2 + targets} goals, or the image"
        )
        rows += summary.detection(
            named, confident, worst, ball, attack=how, duration_s=summary.seconds(parts)
        )
        for suffix, confidences, where in (
            ("_inside_attacked", clean_out[other], first),
            ("_both_attacked", worst, ball),
        ):
            rows += summary.detection(
                named,
                lowered["confidence"],
                confidences,
                where,
                suffix,
                attack="APGD",
                inside_ball=str(first),
            )
        rows += summary.operating(named, worst, package.thresholds, ball, attack=how)
        figures["roc"][other]["attacked"] = summary.roc(confident, worst)
        figures["histograms"][other]["attacked"] = summary.histogram(worst, low)
        examples.add(
            other,
            chosen,
            f"{ball}: worst case",
            None,
            found["predicted"],
            worst,
            None,
            found["distance"],
        )
        for k in np.argsort(-worst, kind="stable")[:GALLERY]:
            gallery.append(
                Attacked(
                    dataset=other,
                    image=pixels[k],
                    attacked=found["picture"][k],
                    before=float(found["clean"][k]),
                    after=float(worst[k]),
                    label=package.label_names[int(found["predicted"][k])],
                )
            )
        stuck = int(found["stuck"].sum())
        said.append(doubts.zero_gradients(f"worst case on {other}", stuck, len(worst)))
        said.append(doubts.below_clean(other, found["clean"], worst))
        longer = _longer(suite.outside_steps)
        if suite.probe:
            probed = steps.each(
                f"self-check, {other}",
                pixels[: suite.probe],
                lambda at, pixels=pixels, longer=longer: work.probe_outside(  # type: ignore[misc]
                    subject, pixels[at], ball, longer
                ),
                passes=longer,
                settings=[str(ball), longer],
            )
            reached = _joined(probed)["confidence"]
            said.append(doubts.not_converged_outside(other, ball, worst[: len(reached)], reached, longer))

    # Figure 5.
    radii = suites.radii(package)
    if suite.curve:
        some, outer = choice(pack.inside, suite.curve, seed), np.concatenate(sample)[: suite.curve]
        cut = dataclasses.replace(steps, size=max(1, steps.size // len(radii)))
        for key, pixels, y in (
            ("inside", pack.inside.pixels[some], labels[some]),
            ("outside", outer, None),
        ):
            parts = cut.each(
                f"confidence over the radius, {key}",
                pixels,
                lambda at, pixels=pixels, y=y: work.curve(  # type: ignore[misc]
                    subject, pixels[at], None if y is None else y[at], radii, suite.curve_steps
                ),
                passes=len(radii) * suite.curve_steps,
                labels=y,
                settings=[list(radii), suite.curve_steps],
            )
            figures["radius"][key] = summary.radius_curve(_joined(parts)["values"], radii)

    rows += summary.mean_over_sets(rows, list(pack.outside), seed)
    counts = {
        f"{pack.inside.source}, clean": len(pack.inside),
        f"{pack.inside.source}, attacked": len(picked),
    }
    for other, images in pack.outside.items():
        counts[f"{other}, clean"] = len(images)
        counts[f"{other}, attacked"] = len(choice(images, suite.outside, seed))
    said += [
        doubts.uncalibrated(package),
        doubts.temperature_at_end(temperature, spec, package.calibrated),
        *doubts.trained_on(package, pack.all()),
        *doubts.duplicates(pack.all()),
        *doubts.unreadable(pack.all()),
        doubts.few(counts),
    ]
    report = Report(
        package_digest=package.digest,
        seed=seed,
        measurements=tuple(rows),
        warnings=tuple(dict.fromkeys(text for text in said if text is not None)),
    )
    return Evaluated(
        name=name, report=report, figures=figures, gallery=tuple(gallery), examples=examples.columns()
    )


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
