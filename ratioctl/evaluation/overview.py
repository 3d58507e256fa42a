"""What a domain expert asks after training, of one model on one data set: the numbers, and which images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl import images as pixels_of
from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.counterfactuals import CounterfactualRequest, PreparedRequest, Source, explain
from ratioctl.data import out_distribution
from ratioctl.data.image_set import Images
from ratioctl.evaluation import suites
from ratioctl.evaluation.datasets import Datasets
from ratioctl.evaluation.driver import run
from ratioctl.evaluation.progress import Callback
from ratioctl.models.device import select_device
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.types import Evaluation, Explanation

SHOWN = 12  # images in each gallery
EXPLAINED = 6  # typical and wrong cases with counterfactuals, each
STEPS = 100  # of a search
SUITE = dataclasses.replace(
    suites.SUITES["quick"], name="report", stages=("clean", "ood", "robust", "worst_case")
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One image and what the model says about it.

    Attributes:
        image: uint8 (H, W, C). name: inside its source. truth: its label, None for an OOD image.
        is_ood: None without a threshold.
    """

    dataset: str
    name: str
    image: np.ndarray
    truth: str | None
    predicted: str
    confidence: float
    is_ood: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ByClass:
    """One class: its images, recall, precision (None where never predicted), acceptance rate by threshold."""

    label: str
    n: int
    recall: float
    precision: float | None
    accepted: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Overview:
    """Everything on the page of `ratioctl report`.

    Attributes:
        confusion: (K, K) counts, true classes in rows.
        accepted: acceptance rates of the OOD sets, by set and threshold.
        wrong: misclassified images, the most confident first; outlying: ID images, the least confident first.
        accepted_ood: OOD images, the most confident first.
        typical, mistakes: explanations towards the second class, of correct and of misclassified images.
        training: facts from the package: its data, its start, and duplicates found before training.
    """

    package: ModelPackage
    evaluation: Evaluation
    confusion: np.ndarray
    classes: tuple[ByClass, ...]
    accepted: Mapping[str, Mapping[str, float]]
    wrong: tuple[Case, ...]
    outlying: tuple[Case, ...]
    accepted_ood: tuple[Case, ...]
    typical: tuple[tuple[Case, Explanation], ...]
    mistakes: tuple[tuple[Case, Explanation], ...]
    training: Mapping[str, Any]


def overview(
    model: str | Path | ModelPackage,
    *,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    limit: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callback | None = None,
) -> Overview:
    """Evaluate a model and choose the images that say most about it; arguments and errors as `run`."""
    package = packages.resolve(model)
    evaluation = run(
        [package],
        data=data,
        ood=ood,
        suite=SUITE,
        limit=limit,
        device=device,
        precision=precision,
        seed=seed,
        download=download,
        callback=callback,
    )
    named = out_distribution.named(ood, data)
    sets = Datasets(data=data, ood=named, suite=SUITE, limit=limit, seed=seed, download=download).of(package)
    compute = select_device(device, precision)
    predict = predictor(package, compute.device).predict
    probabilities = {
        name: metrics.softmax(predict(found.pixels), package.temperature)
        for name, found in sets.all().items()
    }
    inside = sets.inside
    assert inside.labels is not None
    p = probabilities[sets.name]
    cases = functools.partial(_cases, package)
    confidence, right = p.max(1), p.argmax(1) == inside.labels
    order = np.argsort(confidence, kind="stable")
    mistakes = order[::-1][~right[order[::-1]]]
    outside = [
        case
        for name, found in sets.outside.items()
        for case in cases(name, found, probabilities[name], np.argsort(-probabilities[name].max(1))[:SHOWN])
    ]
    explained = [
        tuple(
            zip(
                cases(sets.name, inside, p, some),
                _explained(package, inside, some, device, seed),
                strict=True,
            )
        )
        for some in (_typical(inside.labels, confidence, right), mistakes[:EXPLAINED])
    ]
    return Overview(
        package=package,
        evaluation=evaluation,
        confusion=_confusion(inside.labels, p.argmax(1), len(package.label_names)),
        classes=tuple(_by_class(package, inside.labels, p)),
        accepted={
            name: {key: float((q.max(1) >= t).mean()) for key, t in package.thresholds.items()}
            for name, q in probabilities.items()
            if name != sets.name
        },
        wrong=tuple(cases(sets.name, inside, p, mistakes[:SHOWN])),
        outlying=tuple(cases(sets.name, inside, p, order[:SHOWN])),
        accepted_ood=tuple(sorted(outside, key=lambda case: -case.confidence)[:SHOWN]),
        typical=explained[0],
        mistakes=explained[1],
        training=package.config["ratio"].get("provenance", {}),
    )


def _cases(
    package: ModelPackage, dataset: str, found: Images, p: np.ndarray, index: np.ndarray
) -> list[Case]:
    threshold = package.thresholds.get("tpr95")
    return [
        Case(
            dataset=dataset,
            name=_name(found, int(k)),
            image=found.pixels[int(k)],
            truth=None if found.labels is None else package.label_names[int(found.labels[k])],
            predicted=package.label_names[int(p[k].argmax())],
            confidence=float(p[k].max()),
            is_ood=None if threshold is None else bool(p[k].max() < threshold),
        )
        for k in index
    ]


def _confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) counts, true classes in rows."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return counts


def _by_class(package: ModelPackage, truth: np.ndarray, p: np.ndarray) -> Iterator[ByClass]:
    predicted, confidence = p.argmax(1), p.max(1)
    for c, label in enumerate(package.label_names):
        own = truth == c
        if not own.any():
            continue
        called = predicted == c
        yield ByClass(
            label=label,
            n=int(own.sum()),
            recall=float((predicted[own] == c).mean()),
            precision=float((truth[called] == c).mean()) if called.any() else None,
            accepted={key: float((confidence[own] >= t).mean()) for key, t in package.thresholds.items()},
        )


def _typical(truth: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each of the first classes the correct image with the median confidence."""
    found = []
    for c in np.unique(truth):
        own = np.flatnonzero((truth == c) & right)
        if len(own):
            found.append(own[np.argsort(confidence[own], kind="stable")[len(own) // 2]])
    return np.array(found[:EXPLAINED], dtype=np.int64)


def _explained(
    package: ModelPackage, found: Images, index: np.ndarray, device: str, seed: int
) -> list[Explanation]:
    """Counterfactuals towards the second class, in l2."""
    if not len(index):
        return []
    request = CounterfactualRequest(
        targets=("second",),
        p=2.0,
        eps=suites.radii(package)[1:],
        steps=STEPS,
        restarts=1,
        seed=seed,
        threshold=package.thresholds.get("tpr95"),
    )
    sources = tuple(
        Source(path=_name(found, int(k)), read=functools.partial(pixels_of.encoded, found.pixels[int(k)]))
        for k in index
    )
    prepared = PreparedRequest(models=((package, request),), sources=sources)
    return list(explain(prepared, device=device))


def _name(found: Images, k: int) -> str:
    return found.names[k] if found.names else f"number {k}"
