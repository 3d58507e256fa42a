"""A request from end to end: pictures in, explanations out as they are done."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ratioctl import metrics, recipe
from ratioctl.counterfactuals.request import CounterfactualRequest, Picture, PreparedRequest, Source, load
from ratioctl.counterfactuals.search import Answer, SearchRequest, drive, plain, search_target
from ratioctl.errors import ImageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.types import Explanation, Original, Target

if TYPE_CHECKING:
    from ratioctl.models.device import ComputeConfig


def explain(
    asked: PreparedRequest,
    *,
    device: str = "auto",
    precision: str = "auto",
    on_error: Callable[[str, ImageError], None] | None = None,
    on_picture: Callable[[Picture], None] | None = None,
    callback: Callable[[float], None] | None = None,
    together: int | None = None,
) -> Iterator[Explanation]:
    """Answer a request, image by image as they are done; models in the outer order.

    Args:
        on_error: told once of each image that cannot be read, which is then left out; without it the
            ImageError is raised.
        on_picture: told of each image when it was read for the first time.
        watch: told how many of the images, over all models, are done; fractions while searching.
        together: how many images and targets share a batch; None chooses. With 1 nothing depends on the
            companions, not even by rounding.
    """
    if on_error is None:
        for source in asked.sources:  # now rather than after an hour's search
            load(source, asked.models[0][0], asked.bit_depth)
    unreadable: set[int] = set()

    def pictures(turn: int, spec: Spec) -> Iterator[tuple[Source, Picture]]:
        for index, source in enumerate(asked.sources):
            if index in unreadable:
                continue
            try:
                picture = load(source, spec, asked.bit_depth)
            except ImageError as error:
                if on_error is None:
                    raise
                unreadable.add(index)
                on_error(source.path, error)
                continue
            if on_picture is not None and turn == 0:
                on_picture(picture)
            yield source, picture

    compute: ComputeConfig | None = None
    done = 0
    packages = [id(spec) for spec in asked.packages]
    for turn, (spec, question) in enumerate(asked.models):
        given = pictures(turn, spec)
        norm = recipe.norm_name(question.p) if len(asked.norms) > 1 else None
        first = next(given, None)
        if first is None:
            continue
        if compute is None:
            from ratioctl.models.device import select_device

            compute = select_device(device, precision)
        told = float(done)

        def progress(images: float, before: int = done) -> None:
            nonlocal told
            told = max(told, before + round(images, 6))
            if callback is not None:
                callback(told)

        model = packages.index(id(spec))
        for explanation in _answered(
            itertools.chain([first], given), spec, question, compute, model, progress, together
        ):
            yield explanation if norm is None else dataclasses.replace(explanation, norm=norm)
            done += 1
        if callback is not None:
            callback(float(done))


@dataclasses.dataclass(kw_only=True, eq=False)
class _Open:
    """An image some of whose answers are not there yet."""

    picture: Picture
    probabilities: np.ndarray  # (K,) of the image itself
    classes: list[int]
    targets: list[Target] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One image and target, to be answered."""

    image: _Open
    target: int
    answer: Answer


def _answered(
    pictures: Iterable[tuple[Source, Picture]],
    spec: ModelPackage,
    question: CounterfactualRequest,
    compute: ComputeConfig,
    index: int,
    progress: Callable[[float], None],
    together: int | None,
) -> Iterator[Explanation]:
    """The explanations of one model, in order: images and targets share batches, a few at a time."""
    from ratioctl.counterfactuals.batches import jobs_together, searcher
    from ratioctl.models.predict import predictor

    predict = predictor(spec, compute.device)
    search = searcher(predict, spec, question, compute)
    most = together or jobs_together(compute, question, spec.input_size[1])
    done = 0.0

    def scores(images: np.ndarray) -> np.ndarray:
        return metrics.softmax(predict.predict(images), spec.temperature)

    def answer(batch: Sequence[_Job]) -> None:
        nonlocal done
        weight = sum(1 / len(job.image.classes) for job in batch)

        def find(wishes: Sequence[tuple[int, SearchRequest]]) -> list[np.ndarray]:
            before, after = wishes[0][1].work

            def callback(share: float) -> None:
                progress(done + weight * (before + (after - before) * share))

            return search(
                [((batch[n].image.picture.pixels, batch[n].target), wish) for n, wish in wishes], callback
            )

        for job, target in zip(batch, drive([job.answer for job in batch], find, scores), strict=True):
            job.image.targets.append(target)
        done += weight
        progress(done)

    waiting: deque[_Open] = deque()
    jobs: deque[_Job] = deque()

    def finished(least: int) -> Iterator[Explanation]:
        """Answer while at least so many jobs wait; what is whole then, in order."""
        while len(jobs) >= least:
            answer([jobs.popleft() for _ in range(min(most, len(jobs)))])
            while waiting and len(waiting[0].targets) == len(waiting[0].classes):
                yield _explanation(waiting.popleft(), spec, index)

    for source, picture in pictures:
        probabilities = scores(picture.pixels[None])[0]
        targets = question.targets if source.targets is None else source.targets
        image = _Open(
            picture=picture,
            probabilities=probabilities,
            classes=classes_of(targets, probabilities, spec.label_names),
        )
        waiting.append(image)
        for target in image.classes:
            todo = search_target(
                picture.pixels, target, original=probabilities, labels=spec.label_names, question=question
            )
            jobs.append(_Job(image=image, target=target, answer=todo))
        # With a region a batch keeps to one image.
        yield from finished(most if question.region is None else 1)
    yield from finished(1)


def _explanation(image: _Open, spec: ModelPackage, index: int) -> Explanation:
    threshold = spec.thresholds.get("tpr95")
    confidence = float(image.probabilities.max())
    return Explanation(
        path=image.picture.path,
        sha256=image.picture.sha256,
        model=index,
        input=image.picture.pixels,
        original=Original(
            label=spec.label_names[int(image.probabilities.argmax())],
            confidence=confidence,
            probabilities=plain(image.probabilities),
            is_ood=None if threshold is None else confidence < threshold,
        ),
        targets=tuple(image.targets),
        notes=image.picture.notes,
    )


def classes_of(targets: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]) -> list[int]:
    """Indices of the target classes of one image; a class of the model named like a question goes first."""
    ranked = np.argsort(-probabilities, kind="stable")
    found: list[int] = []
    for target in targets:
        if target in labels:
            found.append(labels.index(target))
        elif target == "predicted":
            found.append(int(ranked[0]))
        elif target == "second":
            found.append(int(ranked[min(1, len(ranked) - 1)]))
        else:
            found.extend(range(len(labels)))
    return list(dict.fromkeys(found))
