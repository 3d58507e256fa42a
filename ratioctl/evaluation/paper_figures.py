"""What the figures of the RATIO paper show, of any models: counterfactuals, features, radius curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl import counterfactuals, metrics
from ratioctl import package as packages
from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import UsageError
from ratioctl.evaluation.datasets import stratified_indices
from ratioctl.evaluation.driver import run
from ratioctl.evaluation.suites import Suite
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.types import Explanation, Target

POOL = 500  # test images among which those of the figures are chosen
CURVE, CURVE_STEPS = 32, 20  # images of each kind, and steps per radius, of Figure 5
_CURVES = Suite(
    name="figures",
    stages=("clean", "radius"),
    inside=CURVE,
    outside=CURVE,
    curve=CURVE,
    curve_steps=CURVE_STEPS,
    exact=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a panel: a model's counterfactuals of its image towards a class, budgets ascending."""

    model: str
    explanation: Explanation
    target: Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """An image, uint8 (H, W, C), and what becomes of it. `label` is its class, None for an OOD image."""

    image: np.ndarray
    label: str | None
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperFigures:
    """Contents of the figures.

    Attributes:
        failure: Figure 1: a counterfactual of a plain model; None without one.
        counterfactuals: Figure 2 (3 and 4 for other data and models): true and predicted class of images that
            the models misclassify, where there are some.
        features: Figures 6 and 7: OOD images changed towards the class that is predicted on them.
        curves: Figure 5: confidence over the radius, by model (`figures["radius"]` of an evaluation).
        about: data, numbers of images, steps and seed, and digests; plain JSON values.
    """

    failure: Panel | None
    counterfactuals: tuple[Panel, ...]
    features: tuple[Panel, ...]
    curves: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]


def collect(
    models: Sequence[str | Path | ModelPackage] = (),
    *,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    eps: str | None = None,
    steps: int = 100,
    count: int = 2,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callable[[float, str], None] | None = None,
) -> PaperFigures:
    """Compute the figures of the paper for `models` (none: the default model).

    Args:
        data: a labelled SOURCE; ood: "NAME=SOURCE", whose first set gives the OOD images of the panels.
        eps: budgets, as of `counterfactual`; None takes the ladder of the first model.
        steps: of the searches; the paper took 500.
        count: images per kind of panel.
        callback: called with the share done and what is next.

    Raises:
        UsageError: models of different labels or input sizes, or a bad number.
    """
    if count < 1:
        raise UsageError(f"--count {count}", "must be positive", "For example --count 2.")
    loaded = [packages.resolve(model) for model in (models or (packages.DEFAULT_MODEL,))]
    _check_alike(loaded)
    tell = callback or (lambda share, what: None)
    first, names = loaded[0], packages.names(loaded)
    outside = dict(out_distribution.named(ood, data))
    pool, odd = _images(first, data, next(iter(outside.values())), count, seed, download)
    logits = np.stack([predictor(package).predict(pool.pixels) for package in loaded])
    labels = pool.labels
    assert labels is not None
    chosen = _misclassified(logits, labels, [p.temperature for p in loaded], count)
    plain = next((n for n, package in enumerate(loaded) if _is_plain(package)), None)
    search = _Search(eps=eps, steps=steps, seed=seed, device=device, precision=precision)
    work = (plain is not None) + len(chosen) + len(odd)
    done = iter(range(work + 1))

    def panel(image: np.ndarray, label: int | None, of: Sequence[int]) -> Panel:
        tell(0.8 * next(done) / work, "counterfactuals")
        rows = tuple(row for n in of for row in search.rows(loaded[n], names[n], image, label))
        return Panel(image=image, label=None if label is None else first.label_names[label], rows=rows)

    everyone = range(len(loaded))
    failure = None if plain is None else panel(pool.pixels[chosen[0]], int(labels[chosen[0]]), [plain])
    shown = tuple(panel(pool.pixels[k], int(labels[k]), everyone) for k in chosen)
    features = tuple(panel(image, None, everyone) for image in odd)
    tell(0.8, "confidence over the radius")
    options: dict[str, Any] = {"device": device, "precision": precision, "seed": seed, "download": download}
    measured = run(loaded, data=data, ood=ood, suite=_CURVES, limit=POOL, **options)
    return PaperFigures(
        failure=failure,
        counterfactuals=shown,
        features=features,
        curves={model.name: model.figures["radius"] for model in measured.models},
        about={
            "data": [dict(entry) for entry in measured.data],
            "ood_images_of": next(iter(outside)),
            "chosen_among": len(pool),
            "steps": steps,
            "curve": {"images": CURVE, "steps": CURVE_STEPS},
            "seed": seed,
            "models": [{"name": n, "digest": p.digest} for n, p in zip(names, loaded, strict=True)],
        },
    )


def _images(
    package: ModelPackage, data: str, outside: str, count: int, seed: int, download: bool
) -> tuple[Images, list[np.ndarray]]:
    """Labelled images to choose from, and `count` OOD images (H, W, C)."""
    channels, frame = package.input_size[0], package.frame
    test = in_distribution.load_labelled(data, frame, channels, package.label_names, download=download)
    far = out_distribution.load([outside], frame, channels, seed=seed, download=download)
    picked = stratified_indices(far, count, seed)
    return test.subset(stratified_indices(test, POOL, seed)), [far.pixels[k] for k in picked]


def _is_plain(package: ModelPackage) -> bool:
    """Whether it was trained on unchanged labelled images alone, as its config says."""
    objective = package.config["ratio"].get("objective")
    if not isinstance(objective, Mapping) or objective.get("outside") or objective.get("energy"):
        return False
    return not (objective.get("inside") or {}).get("robust", 0)


def _check_alike(loaded: Sequence[ModelPackage]) -> None:
    first = loaded[0]
    for package in loaded[1:]:
        if (package.input_size, package.label_names) != (first.input_size, first.label_names):
            reason = f"has other labels or another input size than {first.name}"
            raise UsageError(package.name, reason, "Draw the figures of these models separately.")


def _misclassified(
    logits: np.ndarray, labels: np.ndarray, temperatures: Sequence[float], count: int
) -> list[int]:
    """Indices of `count` images that most models misclassify; among equals, the least confident in the label.

    Args:
        logits: (models, N, K).
    """
    wrong = (logits.argmax(2) != labels).sum(0)
    rows = np.arange(len(labels))
    found = zip(logits, temperatures, strict=True)
    own = np.stack([metrics.softmax(f, t)[rows, labels] for f, t in found])
    order = np.lexsort((own.mean(0), -wrong))
    picked: list[int] = []
    for k in order:  # of different classes, while there are some
        if len(picked) < count and labels[k] not in labels[picked]:
            picked.append(int(k))
    return (picked + [int(k) for k in order if int(k) not in picked])[:count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """How counterfactuals are searched, as of `ratioctl.counterfactual`."""

    eps: str | None
    steps: int
    seed: int
    device: str
    precision: str

    def rows(self, package: ModelPackage, name: str, image: np.ndarray, label: int | None) -> Iterator[Row]:
        """The counterfactuals of one image: towards its class and the predicted one, or (OOD) the latter.

        Where the image is predicted as its class, the second row is towards the second most likely class.
        """
        logits = predictor(package).predict(image[None])[0]
        ranked = [int(k) for k in np.argsort(-logits, kind="stable")]
        targets = ranked[:1] if label is None else [label, next(k for k in ranked if k != label)]
        prepared = counterfactuals.prepare(
            [image],
            target=[package.label_names[k] for k in targets],
            eps=self.eps,
            model=package.path,
            steps=self.steps,
            seed=self.seed,
        )
        found = counterfactuals.explain(prepared, device=self.device, precision=self.precision)
        for explanation in found:
            for target in explanation.targets:
                yield Row(model=name, explanation=explanation, target=target)
