"""A request from end to end: images in, explanations out as they are done."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ratioctl import metrics, recipe
from ratioctl.counterfactuals.graph import GraphSearch
from ratioctl.counterfactuals.request import CounterfactualRequest, PreparedRequest
from ratioctl.counterfactuals.search import (
    Preview,
    SearchRequest,
    TargetSearch,
    plain,
    run_searches,
    search_target,
)
from ratioctl.counterfactuals.sources import Picture, Source, load
from ratioctl.counterfactuals.targets import classes_of
from ratioctl.errors import ImageError, UsageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.types import Explanation, Original, Target

if TYPE_CHECKING:
    from ratioctl.models.device import ComputeConfig
    from ratioctl.scoring.backends import Explainer


def explain(
    prepared: PreparedRequest,
    *,
    device: str = "auto",
    precision: str = "auto",
    on_error: Callable[[str, ImageError], None] | None = None,
    on_picture: Callable[[Picture], None] | None = None,
    callback: Callable[[float], None] | None = None,
    on_preview: Callable[[Preview], None] | None = None,
    together: int | None = None,
) -> Iterator[Explanation]:
    """Carry out a request, image by image; models in the outer order.

    Args:
        on_error: called once for each image that cannot be read, which is then left out; without it the
            ImageError is raised.
        on_picture: called with each image when it is read for the first time.
        callback: called with the number of images done, over all models; fractions while searching.
        on_preview: called a few times per second with points of the running searches, for display.
        together: how many images and targets share a batch; None chooses. With 1 nothing depends on the
            companions, not even rounding.
    """
    if on_error is None:
        for source in prepared.sources:  # now rather than after hours of searching
            load(source, prepared.models[0][0], prepared.bit_depth, prepared.models[0][1].box)
    unreadable: set[int] = set()

    def pictures(turn: int, spec: Spec) -> Iterator[tuple[Source, Picture]]:
        for index, source in enumerate(prepared.sources):
            if index in unreadable:
                continue
            try:
                picture = load(source, spec, prepared.bit_depth, prepared.models[turn][1].box)
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
    packages = [id(spec) for spec in prepared.packages]
    for turn, (spec, request) in enumerate(prepared.models):
        readable = pictures(turn, spec)
        first = next(readable, None)
        if first is None:
            continue
        if isinstance(spec, ModelPackage) and compute is None:
            from ratioctl.models.device import select_device

            compute = select_device(device, precision)
        elif not isinstance(spec, ModelPackage) and device.startswith("cuda"):
            raise UsageError(f"--device {device}", "an ONNX file is searched on the CPU", "Leave it out.")
        reported = float(done)

        def progress(images: float, before: int = done) -> None:
            nonlocal reported
            reported = max(reported, before + round(images, 6))
            if callback is not None:
                callback(reported)

        norm = recipe.norm_name(request.p) if len(prepared.norms) > 1 else None
        index = packages.index(id(spec))
        backend = _backend(spec, request, compute, index, on_preview, progress)
        explanations = _Explanations(spec, request, backend, index, progress, together)
        for explanation in explanations.of(itertools.chain([first], readable)):
            yield explanation if norm is None else dataclasses.replace(explanation, norm=norm)
            done += 1
        if callback is not None:
            callback(float(done))


@dataclasses.dataclass(kw_only=True, eq=False)
class _Pending:
    """An image some of whose targets are not done."""

    picture: Picture
    probabilities: np.ndarray  # (K,) of the image itself
    classes: list[int]
    targets: list[Target] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """The search for one image and target."""

    image: _Pending
    target: int
    search: TargetSearch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Backend:
    """What searches.

    Attributes:
        search: carries out requests of one stage for images and targets; see `BatchSearch`.
        search_target: see `ratioctl.counterfactuals.search_target`.
        probabilities: of images, (N, K).
        together: how many images and targets share a batch.
    """

    search: Callable[..., list[np.ndarray]]
    search_target: Callable[..., TargetSearch]
    probabilities: Callable[[np.ndarray], np.ndarray]
    together: int


def _backend(
    spec: ModelPackage | Explainer,
    request: CounterfactualRequest,
    compute: ComputeConfig | None,
    index: int,
    on_preview: Callable[[Preview], None] | None,
    progress: Callable[[float], None],
) -> _Backend:
    """torch for a package, onnxruntime for a file of `export --explain`."""
    if not isinstance(spec, ModelPackage):
        graph = GraphSearch(spec, request, lambda: progress(0.0))  # which may end the search
        return _Backend(
            search=graph, search_target=graph.search_target, probabilities=spec.probabilities, together=1
        )
    from ratioctl.counterfactuals.batches import BatchSearch, jobs_together
    from ratioctl.models.predict import predictor

    def show(target: int, eps: float, image: np.ndarray, confidence: float) -> None:
        if on_preview is not None:
            label = spec.label_names[target]
            on_preview(Preview(model=index, target=label, eps=eps, image=image, confidence=confidence))

    assert compute is not None
    predict, temperature = predictor(spec, compute.device), spec.temperature
    return _Backend(
        search=BatchSearch(predict, spec, request, compute, show if on_preview else None),
        search_target=search_target,
        probabilities=lambda images: metrics.softmax(predict.predict(images), temperature),
        together=jobs_together(compute, request, spec.frame.area),
    )


class _Explanations:
    """The explanations of one model, in order: images and targets share batches, a few at a time."""

    def __init__(
        self,
        spec: Spec,
        request: CounterfactualRequest,
        backend: _Backend,
        index: int,
        progress: Callable[[float], None],
        together: int | None,
    ) -> None:
        self.spec, self.request, self.index, self.progress = spec, request, index, progress
        self.backend = backend
        self.together = together or backend.together
        self.done = 0.0
        self.pending: deque[_Pending] = deque()
        self.jobs: deque[_Job] = deque()

    def of(self, pictures: Iterable[tuple[Source, Picture]]) -> Iterator[Explanation]:
        request, labels = self.request, self.spec.label_names
        for source, picture in pictures:
            probabilities = self.backend.probabilities(picture.pixels[None])[0]
            targets = request.targets if source.targets is None else source.targets
            classes = classes_of(targets, probabilities, labels)
            image = _Pending(picture=picture, probabilities=probabilities, classes=classes)
            self.pending.append(image)
            for target in classes:
                search = self.backend.search_target(
                    picture.pixels, target, original=probabilities, labels=labels, request=request
                )
                self.jobs.append(_Job(image=image, target=target, search=search))
            # With a region a batch keeps to one image.
            free = request.region is None and request.box is None
            yield from self._finished(self.together if free else 1)
        yield from self._finished(1)

    def _finished(self, least: int) -> Iterator[Explanation]:
        """Run jobs while at least `least` wait; yields the images that are complete then, in order."""
        while len(self.jobs) >= least:
            self._run([self.jobs.popleft() for _ in range(min(self.together, len(self.jobs)))])
            while self.pending and len(self.pending[0].targets) == len(self.pending[0].classes):
                yield _explanation(self.pending.popleft(), self.spec, self.index, self.request.threshold)

    def _run(self, batch: Sequence[_Job]) -> None:
        weight = sum(1 / len(job.image.classes) for job in batch)

        def search(requests: Sequence[tuple[int, SearchRequest]]) -> list[np.ndarray]:
            before, after = requests[0][1].work

            def callback(share: float) -> None:
                self.progress(self.done + weight * (before + (after - before) * share))

            return self.backend.search(
                [((batch[n].image.picture.pixels, batch[n].target), request) for n, request in requests],
                callback,
                batch[0].image.picture.region if self.request.box else self.request.region,
            )

        results = run_searches([job.search for job in batch], search, self.backend.probabilities)
        for job, target in zip(batch, results, strict=True):
            job.image.targets.append(target)
        self.done += weight
        self.progress(self.done)


def _explanation(image: _Pending, spec: Spec, index: int, threshold: float | None) -> Explanation:
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
