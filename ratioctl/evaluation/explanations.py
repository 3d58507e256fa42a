"""The evaluation suite "explanations": how good a model's counterfactuals are, on a set of images.

Every in-image is asked for a random other class, every out-image for the class it is seen as; what is
measured is what a user gets, the saved 8-bit pictures. Finished images are kept in a journal, so that a run
that died, whatever killed it, goes on with the next image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ratioctl import images as pixels_of
from ratioctl import metrics, recipe
from ratioctl import package as packages
from ratioctl._version import __version__
from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import NORMS, CounterfactualRequest, PreparedRequest
from ratioctl.counterfactuals.sources import Source, encoded
from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import UsageError
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball
from ratioctl.types import Evaluated, Evaluation, Explanation, Measurement, Report
from ratioctl.utils.atomic_files import lock, make_folder
from ratioctl.utils.result_cache import Arrays, ResultCache, key_of

if TYPE_CHECKING:
    from ratioctl.models.device import ComputeConfig

FORMAT = 1  # of filed images; grows when their arrays change
INSIDE, OUTSIDE, STEPS = 100, 50, 100  # images of a set where --limit names no number, steps of a search
QUANTILES = (0.25, 0.5, 0.75)
_DISTANCES = ("l1", "l2", "linf")


def run(
    models: Sequence[str | Path | ModelPackage] = (),
    *,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    limit: int | None = None,
    resume: bool = False,
    write: bool = False,
    out: str | Path | None = None,
    judge: str | Path | ModelPackage | None = None,
    norm: str = "2",
    steps: int = STEPS,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
    finish: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """Measure the counterfactuals of models on labelled images and out-distributions.

    The target of an image comes from (seed, pixels) and its label, so that all models are asked the same.

    Args:
        models, data, ood, resume, out, download, watch, finish: as in `ratioctl.evaluation.run`.
        write: refused.
        limit: images of every set, stratified by class; None takes 100 in-images and 50 out-images a set.
        judge: another model, which says how much of the target it sees in the pictures (transfer).
        norm, steps: of the search; the budgets are each model's ladder.
    Raises:
        UsageError, SourceError, PackageError.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be positive", "For example --limit 40.")
    if write:
        raise UsageError("--write", "is not for explanations", "A card shows accuracy and detection alone.")
    if norm not in NORMS:
        raise UsageError(f"--norm {norm}", "is unknown", "Known: 2, 1.5, 1, inf.")
    from ratioctl.models.device import select_device
    from ratioctl.models.environment import environment

    loaded = [_package(model) for model in (models or (packages.DEFAULT_MODEL,))]
    compute = select_device(device, precision)
    by = None if judge is None else _Judge.of(_package(judge), loaded, compute)
    named = out_distribution.named(ood, data)
    folder = None if out is None else make_folder(Path(out))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(lock(folder))
        results = ResultCache(None if folder is None else folder / ".journal", keep=resume)
        packs = [_sets(package, data, named, limit, seed, download) for package in loaded]
        told = _Told(sum(len(images) for sets in packs for images in sets.values()), callback)
        parts = []
        for package, sets, name in zip(loaded, packs, packages.names(loaded), strict=True):
            subject = _Subject(
                package=package,
                name=name,
                norm=norm,
                steps=steps,
                seed=seed,
                compute=compute,
                results=results,
                judge=by,
                told=told,
            )
            parts.append(_one(subject, sets))
            evaluation = Evaluation(
                suite="explanations",
                protocol=f"counterfactuals in l{norm} balls, {steps} steps, of in-images towards a random "
                "other class and of out-images towards the class they are seen as"
                + ("" if by is None else f"; judged by {by.package.name}")
                + ("" if limit is None else f"; at most {limit:,} images of a set"),
                data=tuple(in_distribution.described(packs[0])),
                environment=environment(compute, "search_precision", "score_precision"),
                models=tuple(parts),
            )
        if finish is not None:
            finish(evaluation)
        results.finish()
    return evaluation


def _package(model: str | Path | ModelPackage) -> ModelPackage:
    return packages.resolve(model)


def _sets(
    package: ModelPackage,
    data: str,
    ood: Mapping[str, str],
    limit: int | None,
    seed: int,
    download: bool,
) -> dict[str, Images]:
    """The images, in-images first under their own name."""
    channels, size, _ = package.input_size
    test = in_distribution.load_labelled(data, size, channels, package.label_names, download=download)
    sets = {in_distribution.short_name(data): some(test, limit or INSIDE, seed)}
    for name, source in ood.items():
        loaded = out_distribution.load([source], size, channels, seed=seed, download=download)
        sets[name] = some(loaded, limit or OUTSIDE, seed)
    return sets


def some(images: Images, count: int, seed: int) -> Images:
    """`count` images at random, of every class in turn; a smaller choice is part of a larger one."""
    if count >= len(images):
        return images
    order = np.random.default_rng([seed, 0xE8]).permutation(len(images))
    turn = np.zeros(len(images), int)
    if images.labels is not None:
        for label in np.unique(images.labels):
            mine = order[images.labels[order] == label]
            turn[mine] = np.arange(len(mine))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return images.subset(np.sort(chosen))


def target_of(pixels: np.ndarray, label: int, classes: int, seed: int) -> int:
    """A class other than `label`, at random from (seed, pixels)."""
    text = f"{seed}\n{pixels_of.pixels_sha256(pixels)}\ntarget"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % max(classes - 1, 1)
    return (draw + (draw >= label)) % classes


# --- one model ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Judge:
    """Another model's opinion: `at` maps classes of the judged models to its own, by name."""

    package: ModelPackage
    predict: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, package: ModelPackage, judged: Sequence[ModelPackage], compute: ComputeConfig) -> _Judge:
        from ratioctl.models.predict import predictor

        for one in judged:
            unknown = [label for label in one.label_names if label not in package.label_names]
            if unknown:
                raise UsageError(
                    f"--judge {package.name}",
                    f'does not know the class "{unknown[0]}" of {one.name}',
                    "Name a judge that was trained on the same classes.",
                )
        return cls(package=package, predict=predictor(package, compute.device).predict)

    def confidences(self, pictures: np.ndarray, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Of pictures (N, H, W, C) uint8: p of the class (N,), and whether that is the largest (N,)."""
        channels, size, _ = self.package.input_size
        p = metrics.softmax(
            self.predict(in_distribution.resize(pictures, size, channels)), self.package.temperature
        )
        at = self.package.label_names.index(label)
        return p[:, at], p.argmax(1) == at


@dataclasses.dataclass(kw_only=True)
class _Subject:
    """A model and how it is asked."""

    package: ModelPackage
    name: str
    norm: str
    steps: int
    seed: int
    compute: ComputeConfig
    results: ResultCache
    judge: _Judge | None
    told: _Told

    @property
    def precision(self) -> str:
        return "bf16" if self.compute.bf16 else "fp32"

    @property
    def eps(self) -> tuple[float, ...]:
        channels, size, _ = self.package.input_size
        p = NORMS[self.norm]
        return self.package.ladders.get(recipe.norm_name(p)) or recipe.default_ladder(p, size, channels)

    def ball(self, eps: float) -> Ball:
        return Ball(p=NORMS[self.norm], eps=eps)


class _Told:
    """How many images are done, and who wants to know."""

    def __init__(self, images: int, callback: Callable[[dict[str, Any]], None] | None) -> None:
        self.images, self.callback = images, callback
        self.done = self.computed = 0
        self.seconds = 0.0

    def one(self, what: str, model: str, seconds: float | None) -> None:
        """An image is done; `seconds` None where it was taken from the journal."""
        self.done += 1
        if seconds is not None:
            self.computed, self.seconds = self.computed + 1, self.seconds + seconds
        left = (self.images - self.done) * self.seconds / self.computed if self.computed else None
        if self.callback is not None:
            share = self.done / max(self.images, 1)
            event = {"event": "batch", "model": model, "what": what, "share": share, "seconds_left": left}
            self.callback(event)


class _Absent(Exception):  # noqa: N818 - an answer
    """The journal does not have it."""


def _absent() -> Arrays:
    raise _Absent


def _one(subject: _Subject, sets: Mapping[str, Images]) -> Evaluated:
    rows: list[Measurement] = []
    examples: dict[str, list[np.ndarray]] = {}
    for name, images in sets.items():
        parts = _answers(subject, name, images)
        found = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        seconds = float(found.pop("seconds").sum())
        about = {
            "fingerprint": images.fingerprint,
            "seed": subject.seed,
            "duration_s": round(seconds, 3),
            "steps": subject.steps,
        }
        measure = _inside if images.labels is not None else _outside
        rows += measure(subject, name, found, about)
        for key, column in _columns(subject, name, images, found).items():
            examples.setdefault(key, []).append(column)
    warnings = in_distribution.unreadable(sets)
    if subject.judge is not None and subject.judge.package.digest == subject.package.digest:
        warnings.append("the judge is the model itself, so its confidence says nothing about transfer")
    few = {name: len(images) for name, images in sets.items() if len(images) < 100}
    if few:
        counts = ", ".join(f"{name} {n}" for name, n in few.items())
        warnings.append(f"fewer than 100 images: {counts}; the intervals are wide")
    return Evaluated(
        name=subject.name,
        report=Report(
            package_digest=subject.package.digest,
            seed=subject.seed,
            measurements=tuple(rows),
            warnings=tuple(warnings),
        ),
        figures={},
        gallery=(),
        examples={key: np.concatenate(columns) for key, columns in examples.items()},
    )


def _answers(subject: _Subject, name: str, images: Images) -> list[Arrays]:
    """What was found for every image, taken from the journal where it is there."""
    import torch

    package, labels = subject.package, subject.package.label_names
    targets = [
        "predicted"
        if images.labels is None
        else labels[target_of(pixels, int(images.labels[k]), len(labels), subject.seed)]
        for k, pixels in enumerate(images.pixels)
    ]
    facts = {
        "format": FORMAT,
        "what": "explanations",
        "model": package.digest,
        "norm": subject.norm,
        "eps": list(subject.eps),
        "steps": subject.steps,
        "seed": subject.seed,
        "device": subject.compute.device.type,
        "precision": subject.precision,
        "torch": torch.__version__,
        "ratioctl": __version__,
    }
    keys = [
        key_of({**facts, "image": pixels_of.pixels_sha256(pixels), "target": target})
        for pixels, target in zip(images.pixels, targets, strict=True)
    ]
    found: dict[int, Arrays] = {}
    for k, key in enumerate(keys):
        with contextlib.suppress(_Absent):
            found[k] = subject.results.get_or_compute(key, _absent)
            subject.told.one(name, subject.name, None)
    missing = [k for k in range(len(images)) if k not in found]
    question = CounterfactualRequest(
        targets=("predicted",),
        p=NORMS[subject.norm],
        eps=subject.eps,
        steps=subject.steps,
        restarts=1,
        seed=subject.seed,
    )
    sources = tuple(
        Source(path=f"{name}/{k}", read=functools.partial(encoded, images.pixels[k]), targets=(targets[k],))
        for k in missing
    )
    answers = explain(
        PreparedRequest(models=((package, question),), sources=sources),
        device=str(subject.compute.device),
        precision=subject.precision,
        together=1 if subject.compute.device.type == "cpu" else None,
    )
    for k in missing:
        started = time.monotonic()
        found[k] = subject.results.get_or_compute(keys[k], lambda: _arrays(next(answers), labels))
        subject.told.one(name, subject.name, time.monotonic() - started)
    return [found[k] for k in range(len(images))]


def _arrays(explanation: Explanation, labels: Sequence[str]) -> Arrays:
    """One image's answer as arrays (R budgets): everything that is measured on it, pictures included.

    "flip" is NaN, and "flip_picture" the input, where no budget flips.
    """
    (target,) = explanation.targets
    flip = explanation.input if target.flip_image is None else target.flip_image
    budgets = target.budgets
    return {
        "target": np.int64(labels.index(target.target)),  # type: ignore[dict-item]
        "before": np.array(explanation.original.probabilities),
        "confidence": np.array([budget.confidence for budget in budgets]),
        "largest": np.array([max(budget.probabilities) for budget in budgets]),
        "predicted": np.array([labels.index(budget.predicted) for budget in budgets]),
        "distance": np.array([[budget.distance[key] for key in _DISTANCES] for budget in budgets]),
        "changed": np.array([changed(budget.image, explanation.input) for budget in budgets]),
        "pictures": np.stack([budget.image for budget in budgets]),
        "flip": np.float64(np.nan if target.flip_eps is None else target.flip_eps),  # type: ignore[dict-item]
        "flip_changed": np.float64(changed(flip, explanation.input)),  # type: ignore[dict-item]
        "flip_picture": flip,
    }


def changed(picture: np.ndarray, original: np.ndarray) -> float:
    """Share of the pixels of (H, W, C) uint8 that differ by more than 1/255 in some channel."""
    difference = np.abs(picture.astype(np.int64) - original.astype(np.int64))
    return float((difference > 1).any(2).mean())


# --- measurements ------------------------------------------------------------------------------------------


def _inside(
    subject: _Subject, name: str, found: Mapping[str, np.ndarray], about: dict[str, Any]
) -> list[Measurement]:
    target, n = found["target"], len(found["target"])

    def rate(what: str, hits: np.ndarray, ball: Ball | None, **more: Any) -> Measurement:
        k = int(hits.sum())
        interval = metrics.wilson_interval(k, len(hits))
        return Measurement(
            name=what, value=k / len(hits), n=len(hits), interval=interval, dataset=name, ball=ball,
            details={**about, **more},
        )  # fmt: skip

    mean = functools.partial(_mean, name, about)
    before = found["before"][np.arange(n), target]
    rows = [
        rate("validity", (found["before"].argmax(1) == target) & (before > 0.5), None),
        mean("target_confidence", before, None),
    ]
    for r, eps in enumerate(subject.eps):
        ball, p = subject.ball(eps), found["confidence"][:, r]
        rows.append(rate("validity", (found["predicted"][:, r] == target) & (p > 0.5), ball))
        rows.append(mean("target_confidence", p, ball))
        rows.append(mean("changed_pixels", found["changed"][:, r], ball))
        for column, key in enumerate(_DISTANCES):
            rows.append(mean(f"distance_{key}", found["distance"][:, r, column], ball, bounds=(0.0, np.inf)))
        if subject.judge is not None:
            seen = [
                subject.judge.confidences(picture[None], subject.package.label_names[k])
                for picture, k in zip(found["pictures"][:, r], target, strict=True)
            ]
            by = subject.judge.package.digest
            confidences, labelled = (np.concatenate(column) for column in zip(*seen, strict=True))
            rows.append(mean("judge_confidence", confidences, ball, judge=by))
            rows.append(rate("judge_agreement", labelled, ball, judge=by))
            rows.append(rate("judge_validity", labelled & (confidences > 0.5), ball, judge=by))
    flips = found["flip"]
    flipped = np.isfinite(flips)
    rows.append(rate("flipped", flipped, subject.ball(subject.eps[-1])))
    rows += _quantiles(name, about, flips, subject.eps[-1], subject.seed)
    if flipped.any():
        rows.append(mean("flip_changed_pixels", found["flip_changed"][flipped], None))
    return rows


def _outside(
    subject: _Subject, name: str, found: Mapping[str, np.ndarray], about: dict[str, Any]
) -> list[Measurement]:
    """The confidence profile: how sure the model can be made of what it does not know."""
    mean = functools.partial(_mean, name, about)
    threshold = subject.package.thresholds.get("tpr95")
    profile: list[tuple[Ball | None, np.ndarray]] = [(None, found["before"].max(1))]
    profile += [(subject.ball(eps), found["largest"][:, r]) for r, eps in enumerate(subject.eps)]
    rows = []
    for ball, confidences in profile:
        rows.append(mean("confidence", confidences, ball))
        if threshold is not None:
            rows.append(mean("let_through_at_tpr95", (confidences >= threshold).astype(float), ball))
    return rows


def _mean(
    dataset: str,
    about: dict[str, Any],
    what: str,
    values: np.ndarray,
    ball: Ball | None,
    bounds: tuple[float, float] = (0.0, 1.0),
    **more: Any,
) -> Measurement:
    """A mean with its interval; of zeros and ones the score interval of a rate."""
    if bounds == (0.0, 1.0) and np.isin(values, (0.0, 1.0)).all():
        interval = metrics.wilson_interval(int(values.sum()), len(values))
    else:
        interval = metrics.mean_interval(values, bounds=bounds)
    return Measurement(
        name=what,
        value=float(values.mean()),
        n=len(values),
        interval=interval,
        dataset=dataset,
        ball=ball,
        details={**about, **more},
    )


def _quantiles(
    dataset: str, about: dict[str, Any], flips: np.ndarray, top: float, seed: int
) -> Iterator[Measurement]:
    """Quartiles of the flip radius over all images; one that no budget flips lies beyond all that one does.

    A quartile that no budget reaches is left out; an interval's end that none reaches is infinite.
    """
    far = 2 * top
    values = np.where(np.isfinite(flips), flips, far)
    for q in QUANTILES:

        def quantile(v: np.ndarray, q: float = q) -> float:
            return float(np.quantile(v, q, method="inverted_cdf"))

        value = quantile(values)
        if value >= far:
            continue
        low, high = metrics.bootstrap_interval(
            quantile, [[values]], generator=np.random.default_rng([seed, 0xB007]), samples=500
        )
        yield Measurement(
            name=f"flip_radius_q{round(100 * q)}",
            value=value,
            n=len(values),
            interval=(low, high if high <= top else np.inf),
            dataset=dataset,
            details=about,
        )


def _columns(
    subject: _Subject, name: str, images: Images, found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of `examples.parquet`: an image and budget each; the verdict is that the target was reached."""
    n, budgets = found["confidence"].shape
    attacks = [f"counterfactual, {subject.ball(eps)}" for eps in subject.eps]
    hit = (found["predicted"] == found["target"][:, None]) & (found["confidence"] > 0.5)
    column = _DISTANCES.index(f"l{subject.norm}") if f"l{subject.norm}" in _DISTANCES else 1
    labels = np.full(n, -1, np.int64) if images.labels is None else images.labels.astype(np.int64)
    return {
        "model": np.full(n * budgets, subject.name, dtype=object),
        "dataset": np.full(n * budgets, name, dtype=object),
        "index": np.repeat(np.arange(n), budgets),
        "attack": np.array(attacks * n, dtype=object),
        "label": np.repeat(labels, budgets),
        "predicted": found["predicted"].ravel().astype(np.int64),
        "confidence": found["confidence"].ravel(),
        "verdict": hit.ravel().astype(np.int8),
        "distance": found["distance"][:, :, column].ravel(),
    }
