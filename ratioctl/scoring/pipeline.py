"""The scoring pipeline: a stream of images to a stream of rows. Loads no torch.

    files, folders, archives -> items -> [decode -> predict -> score] x workers -> rows in order

Each worker decodes a batch and predicts it, so decoding and inference overlap without a queue between them.
A batch is made of the images that are available: rows of a slow list on stdin appear at once, a fast folder
fills every batch. Memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, BinaryIO, Literal, ParamSpec

import numpy as np

from ratioctl import images, metrics, package
from ratioctl import scores as registry
from ratioctl.errors import ImageError, PackageError, UsageError
from ratioctl.package import Spec
from ratioctl.scoring.details import Explainer, input_checks, with_duplicates
from ratioctl.scoring.listing import Listing
from ratioctl.scoring.prefetch import prefetched
from ratioctl.scoring.sources import Images, Unreadable, items_of
from ratioctl.types import ScoreRow
from ratioctl.utils import resources
from ratioctl.utils.ordered_pool import map_batches

P = ParamSpec("P")

MAX_BATCH = 32
# Images of one batch, in pixels: bounds the network's activations, which every worker holds once.
MAX_BATCH_PIXELS = 2**18
# Encoded bytes that wait for a worker; members of an archive are read before they are decoded.
MAX_WAITING_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A function to logits, and what is needed to score them.

    Attributes:
        spec: labels, input size, temperature, thresholds.
        predict: uint8 (N, H, W, C), or float32 (N, C, H, W) in [0,1] -> logits (N, K) before temperature.
        backend: the library that computes.
        parallel: whether `predict` may run in several threads at once, each on one processor.
        score: name of the OOD score that flags images, see `ratioctl.scores`.
        worst_case: uint8 (N, H, W, C) -> confidence (N,) and is_ood (N,) of the point with the lowest OOD
            score that an attack found around each image; or None.
        worst_case_pace: number of images -> measured seconds that `worst_case` takes for each.
        guaranteed: uint8 (N, H, W, C) -> logits as of `predict`, and the confidence (N,) that nothing in the
            linf ball of radius `spec.certified` around each image exceeds; or None.
        own_threshold: the confidence that the flag inside an exported file compares with, if it is one.
    """

    spec: Spec
    predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    backend: Literal["onnx", "torch"]
    parallel: bool
    score: str = registry.DEFAULT
    worst_case: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(
        default=None, repr=False
    )
    worst_case_pace: Callable[[int], float] | None = dataclasses.field(default=None, repr=False)
    guaranteed: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(
        default=None, repr=False
    )
    own_threshold: registry.Threshold | None = None


def batches(
    paths: Images,
    model: Model,
    *,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    explain: bool = False,
    checks: bool = False,
    limit: int | None = None,
    bit_depth: int | None = None,
    listing: Listing | None = None,
    stdin: BinaryIO | None = None,
    workers: int | None = None,
) -> Generator[list[ScoreRow], None, None]:
    """One row per image, in the order of the paths, in lists as they are finished.

    An image that cannot be read is a row with `error`. Close the generator to end its threads.

    Args:
        paths: images, folders, archives, or `-` for a list on stdin, as for `ratioctl.images.walk`; or
            PIL images, encoded bytes and arrays, whose rows have the paths "image-0", "image-1", ...
        threshold: a stored name, or a number: a confidence in [0,1], or for another OOD score than "msp" a
            value of that score.
        probabilities: fill in `ScoreRow.probabilities`.
        explain, checks: fill in the fields of `ScoreRow` that it lists under these names.
        limit: score the first so many images only.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel.
        listing: numbers the images and keeps those of a shard; None keeps all, without `ScoreRow.index`.
        workers: threads; None takes one per processor this process may use.

    Raises (at once, not at the first row):
        SourceError: nothing of `paths` exists or holds images; at the end of an empty list on stdin.
        UsageError: a threshold that is neither a name of the model's nor a confidence.
        UncalibratedError: a name, and the model has no thresholds.
    """
    package.threshold(model.spec, threshold, model.score)  # refused at once
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be at least 1", "Leave it out to score all images.")
    items: Iterator[images.Item | Unreadable] = itertools.islice(items_of(paths, stdin=stdin), limit)
    if listing is not None:
        items = listing.numbered(items)
    return score_items(
        items,
        model,
        threshold=threshold,
        probabilities=probabilities,
        explain=explain,
        checks=checks,
        bit_depth=bit_depth,
        workers=workers,
    )


def score_items(
    items: Iterator[images.Item | Unreadable],
    model: Model,
    *,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    explain: bool = False,
    checks: bool = False,
    bit_depth: int | None = None,
    workers: int | None = None,
) -> Generator[list[ScoreRow], None, None]:
    """`batches` of items that are listed already."""
    bound = package.threshold(model.spec, threshold, model.score)
    explainer = Explainer.of(model.spec, bound, model.score) if explain else None

    def work(batch: Sequence[images.Item | Unreadable]) -> list[ScoreRow]:
        return rows_of(
            batch,
            model,
            threshold=bound,
            probabilities=probabilities,
            explainer=explainer,
            checks=checks,
            bit_depth=bit_depth,
        )

    found = map_batches(
        prefetched(items),
        work,
        batch=batch_size(model.spec.frame.area),
        workers=workers or resources.processors(),
        weigh=_bytes_of,
        max_weight=MAX_WAITING_BYTES,
        name="score",
    )
    return _marked(found) if checks else found


def _marked(found: Generator[list[ScoreRow], None, None]) -> Generator[list[ScoreRow], None, None]:
    """The batches with `ScoreRow.duplicate`, which needs the image before."""
    previous = None
    with contextlib.closing(found):
        for batch in found:
            rows, previous = with_duplicates(batch, previous)
            yield rows


def _one_by_one(
    in_lists: Callable[P, Generator[list[ScoreRow], None, None]],
) -> Callable[P, Iterator[ScoreRow]]:
    @functools.wraps(in_lists)
    def ood_score(*args: P.args, **kwargs: P.kwargs) -> Iterator[ScoreRow]:
        found = in_lists(*args, **kwargs)  # errors are raised here, not at the first row

        def rows() -> Iterator[ScoreRow]:
            with contextlib.closing(found):
                yield from itertools.chain.from_iterable(found)

        return rows()

    return ood_score


ood_score = _one_by_one(batches)  # the rows of `batches`, one after the other


def batch_size(area: int) -> int:
    """Images of one batch at most, for inputs of so many pixels."""
    return max(1, min(MAX_BATCH, MAX_BATCH_PIXELS // area))


def rows_of(
    batch: Sequence[images.Item | Unreadable],
    model: Model,
    *,
    threshold: float,
    probabilities: bool,
    explainer: Explainer | None = None,
    checks: bool = False,
    bit_depth: int | None = None,
    max_pixels: int = images.MAX_PIXELS,
) -> list[ScoreRow]:
    """The rows of items that are predicted together, in their order; `duplicate` is not filled in."""
    channels, size = model.spec.input_size[0], model.spec.frame
    pixels = np.empty((len(batch), size.height, size.width, channels), dtype=np.uint8)
    readable = 0
    more: list[dict[str, Any]] = []
    reasons: list[str | None] = []
    for item in batch:
        try:
            if isinstance(item, Unreadable):
                reasons.append(item.reason)
                continue
            decoded = images.decode(
                item.read(), size, channels, name=item.path, bit_depth=bit_depth, max_pixels=max_pixels
            )
            pixels[readable] = decoded.pixels
            more.append(input_checks(decoded) if checks else {})
            for note in decoded.notes:
                if note.startswith(images.NARROW):
                    logging.getLogger(__name__).warning("%s: %s", item.path, note)
        except ImageError as error:
            reasons.append(error.reason)
            continue
        readable += 1
        reasons.append(None)
    if not readable:
        return [_unreadable(item, reason) for item, reason in zip(batch, reasons, strict=True)]
    pixels = pixels[:readable]
    logits, guaranteed = _predicted(model, pixels)
    scores = score_logits(logits, model.spec, threshold, model.score)
    if explainer is not None:
        explained = explainer.fields(logits, scores.probabilities, scores.ood_score, scores.is_ood)
        more = [a | b for a, b in zip(explained, more, strict=True)]
    worst = _attacked(model, pixels, scores)
    rows, k = [], 0
    for item, reason in zip(batch, reasons, strict=True):
        if reason is not None:
            rows.append(_unreadable(item, reason))
            continue
        attacked, attacked_is_ood = worst[k]
        rows.append(
            ScoreRow(
                path=item.path,
                label=scores.labels[k],
                confidence=float(scores.confidence[k]),
                ood_score=float(scores.ood_score[k]),
                is_ood=bool(scores.is_ood[k]),
                probabilities=tuple(scores.probabilities[k].tolist()) if probabilities else None,
                worst_case_confidence=attacked,
                worst_case_is_ood=attacked_is_ood,
                guaranteed_confidence=guaranteed[k],
                index=item.index,
                **more[k],
            )
        )
        k += 1
    return rows


def _unreadable(item: images.Item | Unreadable, reason: str | None) -> ScoreRow:
    return ScoreRow(path=item.path, error=reason, index=item.index)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Scores:
    """Results of N logit vectors: N labels, probabilities (N, K), and (N,) of everything else."""

    labels: list[str]
    probabilities: np.ndarray
    confidence: np.ndarray
    ood_score: np.ndarray
    is_ood: np.ndarray


def score_logits(logits: np.ndarray, spec: Spec, threshold: float, score: str = registry.DEFAULT) -> Scores:
    """Scores of logits (N, K) before temperature.

    Args:
        threshold: of the OOD score named `score`, see `ratioctl.package.threshold`.

    Raises:
        PackageError: logits that are not finite.
    """
    try:
        p = metrics.softmax(logits, spec.temperature)
    except ValueError as error:
        step = "The model is broken; train or export it again."
        raise PackageError(spec.name, f"computed no usable numbers: {error}", step) from None
    confidence, kind = p.max(axis=1), registry.by_name(score)
    return Scores(
        labels=[spec.label_names[k] for k in logits.argmax(axis=1).tolist()],
        probabilities=p,
        confidence=confidence,
        ood_score=1.0 - confidence
        if score == registry.DEFAULT
        else kind.from_logits(logits, spec.temperature),
        is_ood=kind.is_ood(logits, spec.temperature, threshold),
    )


def _predicted(model: Model, pixels: np.ndarray) -> tuple[np.ndarray, Sequence[float | None]]:
    """Logits (N, K), and the bound of each image's confidence, None where the model computes none."""
    if model.guaranteed is None:
        return model.predict(pixels), [None] * len(pixels)
    logits, guaranteed = model.guaranteed(pixels)
    return logits, guaranteed.tolist()


def _attacked(
    model: Model, pixels: np.ndarray, clean: Scores
) -> Sequence[tuple[float, bool] | tuple[None, None]]:
    if model.worst_case is None:
        return [(None, None)] * len(pixels)
    confidence, is_ood = model.worst_case(pixels)
    # The clean image lies in the ball, so it is a candidate too.
    confidence, is_ood = np.maximum(confidence, clean.confidence), is_ood & clean.is_ood
    return list(zip(confidence.tolist(), is_ood.tolist(), strict=True))


def _bytes_of(item: images.Item | Unreadable) -> int:
    return 0 if isinstance(item, Unreadable) else len(item.member.data or b"")
