"""Images in, one row each out: confidence, out-of-distribution score and flag. Streams, and needs no torch.

    files, folders, archives -> walk -> [decode -> predict -> softmax] x workers -> rows in their order

Each worker decodes a batch and predicts it, so decoding and inference overlap on every processor without a
hand-over between them. Batches are made of what has arrived: rows of a slow list on stdin appear at once, and
a fast folder fills every batch. Only a few batches are held at a time, however many images there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import BinaryIO, Literal

import numpy as np

from ratioctl import images, metrics, package
from ratioctl.errors import ImageError, PackageError, SourceError, UsageError
from ratioctl.package import Spec
from ratioctl.types import ScoreRow
from ratioctl.utils import resources
from ratioctl.utils.ordered_pool import map_batches

MAX_BATCH = 32
# Images of one batch, in pixels: bounds the network's activations, which every worker holds once.
MAX_BATCH_PIXELS = 2**18
# Encoded bytes that wait for a worker; members of an archive are read before they are decoded.
MAX_WAITING_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Something that predicts, with what is needed to make scores of its logits.

    Attributes:
        spec: labels, input size, temperature, thresholds.
        predict: uint8 (N, H, W, C) -> logits (N, K) before temperature, each image on its own.
        backend: what computes, for the summary.
        parallel: `predict` may run in several threads at once, each on one processor.
        worst_case: uint8 (N, H, W, C) -> (N,) highest confidences that an attack reached, or None.
        worst_case_pace: measures how many seconds `worst_case` takes for each of so many images.
        own_threshold: what the flag inside an exported file compares with; None elsewhere.
    """

    spec: Spec
    predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    backend: Literal["onnx", "torch"]
    parallel: bool
    worst_case: Callable[[np.ndarray], np.ndarray] | None = dataclasses.field(default=None, repr=False)
    worst_case_pace: Callable[[int], float] | None = dataclasses.field(default=None, repr=False)
    own_threshold: float | None = None


def ood_score(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    model: Model,
    *,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    stdin: BinaryIO | None = None,
    workers: int | None = None,
) -> Iterator[ScoreRow]:
    """One row per image, in the order of the paths; what cannot be read is a row with `error`.

    Args:
        paths: as for `ratioctl.images.walk`: images, folders, archives, `-` for a list on stdin.
        threshold: a stored name, or a confidence in [0,1].
        probabilities: fill in `ScoreRow.probabilities`.
        workers: threads; None takes one per processor this process may use.

    Raises (at once, not at the first row):
        SourceError: nothing of `paths` exists or holds images; at the end of an empty list on stdin.
        UsageError: a threshold that is neither a name of the model's nor a confidence.
        UncalibratedError: a name, and the model has no thresholds.
    """
    found = batches(
        paths, model, threshold=threshold, probabilities=probabilities, stdin=stdin, workers=workers
    )

    def rows() -> Iterator[ScoreRow]:
        with contextlib.closing(found):
            for batch in found:
                yield from batch

    return rows()


def batches(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    model: Model,
    *,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    stdin: BinaryIO | None = None,
    workers: int | None = None,
) -> Generator[list[ScoreRow], None, None]:
    """As `ood_score`, in lists as they are finished: a generator, to be closed."""
    limit = package.threshold(model.spec, threshold)
    _, height, width = model.spec.input_size
    if height != width:
        reason = f"takes {height}x{width} pixels, and images are made square"
        raise PackageError(model.spec.name, reason, "Score with a model of square input.")
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise UsageError("paths", "there are none", "Name images, folders or archives.")
    items = items_of(listed, stdin=stdin)

    def work(batch: Sequence[images.Item | Unreadable]) -> list[ScoreRow]:
        return rows_of(batch, model, threshold=limit, probabilities=probabilities)

    return map_batches(
        items,
        work,
        batch=batch_size(height),
        workers=workers or resources.processors(),
        weigh=_bytes_of,
        max_weight=MAX_WAITING_BYTES,
        name="score",
    )


def batch_size(size: int) -> int:
    """Images of one batch at most, for inputs of `size` x `size` pixels."""
    return max(1, min(MAX_BATCH, MAX_BATCH_PIXELS // size**2))


# --- what is scored -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An argument that names nothing to score, beside others that do."""

    path: str
    reason: str


def items_of(
    paths: Sequence[str | os.PathLike[str]], *, stdin: BinaryIO | None = None
) -> Iterator[images.Item | Unreadable]:
    """`images.walk` over all paths; one that names nothing is an item with its reason beside ones that do.

    Raises (at once):
        SourceError: no path names anything; a single one is a slip of the keyboard, not an unreadable image.
            At its end, where the list on stdin is empty and all there is: what wrote it may have failed.
    """
    if stdin is None and any(os.fspath(path) == "-" for path in paths):
        stdin = _unlocked_stdin()
    if all(os.fspath(path) == "-" for path in paths):
        return _listed(stdin, alone=True)
    parts: list[Iterator[images.Item | Unreadable] | Unreadable] = []
    refused: SourceError | None = None
    listed = False
    for path in paths:
        text = os.fspath(path)
        if text == "-" and listed:
            continue  # a list is read once
        if text == "-":
            listed = True
            parts.append(_listed(stdin, alone=False))
            continue
        try:
            parts.append(images.walk([text], stdin=stdin))
        except SourceError as error:
            refused = refused or error
            parts.append(Unreadable(path=images.shown(text), reason=error.reason))
    if refused is not None and all(isinstance(part, Unreadable) for part in parts):
        raise refused

    def chained() -> Iterator[images.Item | Unreadable]:
        for part in parts:
            if isinstance(part, Unreadable):
                yield part
            else:
                yield from part

    return chained()


def _listed(stdin: BinaryIO | None, *, alone: bool) -> Iterator[images.Item | Unreadable]:
    """What the list on stdin names; an empty one is an error, or `Unreadable` where it is not alone."""
    items = images.walk(["-"], stdin=stdin)
    first = next(items, None)
    if first is not None:
        yield first
        yield from items
        return
    reason = "the list of paths on standard input is empty"
    if alone:
        raise SourceError("-", reason, "Check the command that writes it.")
    yield Unreadable(path="-", reason=reason)


def _unlocked_stdin() -> BinaryIO:
    """Standard input without Python's buffer: a thread that still waits there at the end of the process
    would hold the buffer's lock, which the interpreter then reports as a fatal error.
    """
    try:
        return open(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    except (OSError, ValueError, AttributeError):  # replaced by something without a descriptor, or closed
        if sys.stdin is None:
            raise UsageError("-", "there is no standard input", "Name the images as arguments.") from None
        return sys.stdin.buffer


def rows_of(
    batch: Sequence[images.Item | Unreadable], model: Model, *, threshold: float, probabilities: bool
) -> list[ScoreRow]:
    """The rows of some items, in their order, predicted together."""
    channels, size, _ = model.spec.input_size
    pixels = np.empty((len(batch), size, size, channels), dtype=np.uint8)
    readable = 0
    reasons: list[str | None] = []
    for item in batch:
        try:
            if isinstance(item, Unreadable):
                reasons.append(item.reason)
                continue
            pixels[readable] = images.decode(item.read(), size, channels, name=item.path).pixels
        except ImageError as error:
            reasons.append(error.reason)
            continue
        readable += 1
        reasons.append(None)
    if not readable:
        return [ScoreRow(path=item.path, error=reason) for item, reason in zip(batch, reasons, strict=True)]
    pixels = pixels[:readable]
    logits = model.predict(pixels)
    try:
        p = metrics.softmax(logits, model.spec.temperature)
    except ValueError as error:
        step = "The model is broken; train or export it again."
        raise PackageError(model.spec.name, f"computed no usable numbers: {error}", step) from None
    confidences = p.max(axis=1)
    labels = [model.spec.label_names[k] for k in logits.argmax(axis=1).tolist()]
    scored = zip(
        labels,
        confidences.tolist(),
        (1.0 - confidences).tolist(),
        (confidences < threshold).tolist(),
        [tuple(row) for row in p.tolist()] if probabilities else [None] * readable,
        _attacked(model, pixels, confidences, readable),
        strict=True,
    )
    rows = []
    for item, reason in zip(batch, reasons, strict=True):
        if reason is not None:
            rows.append(ScoreRow(path=item.path, error=reason))
            continue
        label, confidence, score, is_ood, each, attacked = next(scored)
        rows.append(
            ScoreRow(
                path=item.path,
                label=label,
                confidence=confidence,
                ood_score=score,
                is_ood=is_ood,
                probabilities=each,
                worst_case_confidence=attacked,
                worst_case_is_ood=None if attacked is None else attacked < threshold,
            )
        )
    return rows


def _attacked(
    model: Model, pixels: np.ndarray, confidences: np.ndarray, count: int
) -> Sequence[float | None]:
    if model.worst_case is None:
        return [None] * count
    # The clean image lies in the ball, so it is a candidate too.
    worst: list[float | None] = np.maximum(model.worst_case(pixels), confidences).tolist()
    return worst


def _bytes_of(item: images.Item | Unreadable) -> int:
    return 0 if isinstance(item, Unreadable) else len(item.member.data or b"")
