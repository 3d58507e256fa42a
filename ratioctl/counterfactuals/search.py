"""The search for one image and target: the budgets' pictures, the ladder, the flip radius.

`search_target` is a generator. It yields what it needs (a `SearchRequest` for points of balls, or an array of
images to be scored) and is sent the result, so that the searches of many images and targets share their
batches (`run_searches`) and each is still written from top to bottom.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from ratioctl import images as pixels_of
from ratioctl import recipe
from ratioctl.counterfactuals.request import CounterfactualRequest
from ratioctl.counterfactuals.rounding import distances, into_ball, round_into_ball
from ratioctl.types import Counterfactual, Target
from ratioctl.utils.seeding import seed_from_bytes

# Shares of `steps` per radius: each search of the ball of twice the radius; from each start; from the best.
WIDE, START, REFINE = 0.12, 0.08, 0.52
FLIP_RADII, FLIP = 5, 0.1  # radii of a flip search, and the share of `steps` of each
_NEIGHBORS = 3  # larger radii whose points are tried in a ball
_PROBES = 16  # points per segment
_LEAD = 2.5e-4  # a flip needs this lead: two backends differ by up to 1e-4 in every probability
LADDER_STAGES = 5  # the first stages of a search; the ones after them look for the smallest radius
WIDE_STAGES = 2  # of these, the searches of the ball of twice the radius
SATURATED = 1 - 1e-4  # no further search of a radius whose confidence is this high


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """Request for the best point in each of several balls around an image.

    Attributes:
        stage: requests of one stage agree in steps, restarts, start, and whether they have `init`.
        radii: (R,), of the balls.
        random: start at random points of the balls instead of the image.
        init: points (R, C, H, W) of these balls to start from.
        work: share of the whole search that is done before and after.
    """

    stage: int
    radii: tuple[float, ...]
    steps: int
    restarts: int = 1
    random: bool = False
    init: np.ndarray | None = None
    work: tuple[float, float] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """A point of a search that is still running: neither the best one nor rounded into the ball.

    Attributes:
        model: index into the requested models.
        target: the class; eps: the radius that is searched.
        image: uint8 (H, W, C).
        confidence: p_target at the point, in the precision of the search.
    """

    model: int
    target: str
    eps: float
    image: np.ndarray
    confidence: float


Step = SearchRequest | np.ndarray  # or images (N, H, W, C) uint8 or (N, C, H, W) float32 to be scored
# Is sent points (R, C, H, W) float32 for a SearchRequest, probabilities (N, K) for images.
TargetSearch = Generator[Step, np.ndarray, Target]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flip:
    """When a picture counts as flipped.

    Attributes:
        until: the target's confidence reaches this; None: the target is predicted.
        threshold: the confidence must reach this as well (in distribution); None: any will do.
    """

    target: int
    until: float | None = None
    threshold: float | None = None

    def reached(self, probabilities: np.ndarray, lead: float = 0.0) -> bool:
        """Whether probabilities (K,) flip, by `lead`."""
        confidence = probabilities[self.target]
        if self.until is not None:
            return bool(confidence >= self.until + lead)
        if self.threshold is not None and confidence < self.threshold + min(lead, (1 - self.threshold) / 2):
            return False
        others = np.delete(probabilities, self.target)
        if lead == 0.0:
            return int(probabilities.argmax()) == self.target
        return bool(others.size == 0 or confidence >= others.max() + lead)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchedImage:
    """An image (H, W, C) uint8 and what is searched around it."""

    pixels: np.ndarray
    target: int
    request: CounterfactualRequest

    @property
    def x(self) -> np.ndarray:
        """(C, H, W) float64 in [0,1]."""
        return pixels_of.to_pixels(self.pixels[None])[0].astype(np.float64)

    def steps(self, share: float) -> int:
        return max(round(self.request.steps * share), 1)

    def distance(self, picture: np.ndarray) -> float:
        return distances(picture, self.pixels)[norm_key(self.request.p)]


def search_target(
    pixels: np.ndarray,
    target: int,
    *,
    original: np.ndarray,
    labels: Sequence[str],
    request: CounterfactualRequest,
) -> TargetSearch:
    """All budgets of one image (H, W, C) and target, and the radii of two flips.

    Args:
        original: probabilities (K,) of the image itself.
    """
    image = SearchedImage(pixels=pixels, target=target, request=request)
    radii = (*request.extra_radii, *request.eps)
    ladder = sum(_shares(request.restarts)) * len(radii)
    ladder /= ladder + 2 * FLIP_RADII * FLIP  # the ladder's share of the work
    points, exact = yield from _search_ladder(image, radii, ladder)
    pictures = np.stack(
        [round_into_ball(x, pixels, request.p, eps) for x, eps in zip(points, radii, strict=True)]
    )
    rounded = yield pictures
    best: list[tuple[np.ndarray, np.ndarray, float]] = []  # picture, its probabilities, before rounding
    for n in range(len(radii)):
        last = best[-1] if best else (pixels, original, float(original[target]))
        higher = rounded[n][target] > last[1][target]  # else the smaller budget's picture is better
        best.append((pictures[n], rounded[n], float(exact[n][target])) if higher else last)
    return (yield from finish_target(image, radii, points, best, original, labels, ladder))


def finish_target(
    image: SearchedImage,
    radii: tuple[float, ...],
    points: np.ndarray,
    best: Sequence[tuple[np.ndarray, np.ndarray, float]],
    original: np.ndarray,
    labels: Sequence[str],
    ladder: float,
) -> TargetSearch:
    """The result, after the searches for the radii of two flips.

    Args:
        points: (R, C, H, W), the best points of the radii.
        best: of every radius its picture, that one's probabilities (K,), and the confidence before rounding.
        ladder: share of the work that is done.
    """
    pixels, target, request = image.pixels, image.target, image.request
    flipped, scores, in_distribution = yield from _flips(
        image, radii, points, [(pixels, original), *((b[0], b[1]) for b in best)], ladder
    )

    def is_ood(probabilities: np.ndarray) -> bool | None:
        return None if request.threshold is None else bool(probabilities.max() < request.threshold)

    return Target(
        target=labels[target],
        budgets=tuple(
            Counterfactual(
                eps=eps,
                image=picture,
                confidence=float(probabilities[target]),
                confidence_float=confidence_float,
                predicted=labels[int(probabilities.argmax())],
                is_ood=is_ood(probabilities),
                probabilities=plain(probabilities),
                distance=distances(picture, pixels),
            )
            for eps, (picture, probabilities, confidence_float) in zip(radii, best, strict=True)
        )[len(request.extra_radii) :],
        flip_eps=None if flipped is None else image.distance(flipped),
        flip_image=flipped,
        flip_confidence=None if scores is None else float(scores[target]),
        flip_is_ood=None if scores is None else is_ood(scores),
        in_distribution_eps=None if in_distribution is None else image.distance(in_distribution),
    )


def _flips(
    image: SearchedImage,
    radii: tuple[float, ...],
    points: np.ndarray,
    pictures: Sequence[tuple[np.ndarray, np.ndarray]],
    done: float,
) -> Generator[Step, np.ndarray, tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]]:
    """The flip's picture and probabilities, and the closest picture that is in distribution as well.

    Args:
        points: (R, C, H, W), the best points of the radii.
        pictures: the original and the radii's pictures, each with its probabilities (K,).
        done: share of the work that is done.
    """
    request = image.request

    def search(flip: Flip, stage: int, work: tuple[float, float]) -> Generator[Step, np.ndarray, Any]:
        first = next((n for n, (_, found) in enumerate(pictures) if flip.reached(found)), None)
        if first is None or first == 0:
            return None if first is None else pictures[0][0]
        low = radii[first - 2] if first > 1 else 0.0
        return (
            yield from _smallest_flip(image, flip, points[first - 1], pictures[first][0], low, stage, work)
        )

    half = (done + 1) / 2
    flipped = yield from search(Flip(target=image.target, until=request.until), 5, (done, half))
    scores = None if flipped is None else (yield flipped[None])[0]
    if request.threshold is None:
        return flipped, scores, None
    known = Flip(target=image.target, threshold=request.threshold)
    if request.until is None and scores is not None and known.reached(scores):
        return flipped, scores, flipped
    return flipped, scores, (yield from search(known, 6, (half, 1.0)))


def _search_ladder(
    image: SearchedImage, radii: tuple[float, ...], work: float
) -> Generator[Step, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The best points (R, C, H, W) of the radii and their probabilities (R, K).

    A single search can stay on a plateau, so every radius has several short searches. Two search the ball of
    twice the radius, from the image and from a random point; their results are moved into the ball. Searches
    start from these two points, from the image and from a random point. The best of these, of the larger
    radii's points moved into the ball, and of the smaller radii's points is refined.
    """
    request, target, p = image.request, image.target, image.request.p
    x, count = image.x, len(radii)
    done = np.cumsum([0.0, *_shares(request.restarts)])
    spans = list(itertools.pairwise(float(share) for share in work * done / done[-1]))
    doubled = tuple(2 * eps for eps in radii)
    begin = [np.repeat(x[None].astype(np.float32), count, 0)]
    for stage, random in enumerate((False, True)):
        wide = yield SearchRequest(
            stage=stage, radii=doubled, steps=image.steps(WIDE), random=random, work=spans[stage]
        )
        begin.append(np.stack([into_ball(z, x, p, eps) for z, eps in zip(wide, radii, strict=True)]))
    begun = yield SearchRequest(
        stage=2, radii=radii * 3, steps=image.steps(START), init=np.concatenate(begin), work=spans[2]
    )
    drawn = yield SearchRequest(
        stage=3,
        radii=radii,
        steps=image.steps(START),
        restarts=request.restarts,
        random=True,
        work=spans[3],
    )
    starts = np.concatenate([begun, drawn])
    confidences = (yield starts)[:, target].reshape(4, count)
    points = starts.reshape(4, count, *x.shape)[confidences.argmax(0), np.arange(count)]
    points, exact = yield from _exchange(image, points, radii)
    open_ = [n for n in range(count) if exact[n][target] < SATURATED]
    if open_:
        points[open_] = yield SearchRequest(
            stage=4,
            radii=tuple(radii[n] for n in open_),
            steps=image.steps(REFINE),
            init=points[open_],
            work=spans[4],
        )
        points, exact = yield from _exchange(image, points, radii)
    return points, exact


def _shares(restarts: int) -> list[float]:
    """Shares of `steps` of the ladder's stages, per radius."""
    return [WIDE, WIDE, 3 * START, restarts * START, REFINE]


def _exchange(
    image: SearchedImage, points: np.ndarray, radii: tuple[float, ...]
) -> Generator[Step, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """For every radius the best of its own point, larger radii's moved into its ball, and smaller radii's."""
    x, p, count = image.x, image.request.p, len(radii)
    sources = [range(n, min(n + _NEIGHBORS + 1, count)) for n in range(count)]
    candidates = np.stack(
        [
            points[k] if k == n else into_ball(points[k], x, p, radii[n])
            for n in range(count)
            for k in sources[n]
        ]
    )
    scores = yield candidates
    best: list[int] = []  # indices of candidates
    start = 0
    for n in range(count):
        own = start + int(scores[start : start + len(sources[n]), image.target].argmax())
        smaller = best[-1] if best else own
        best.append(smaller if scores[smaller, image.target] > scores[own, image.target] else own)
        start += len(sources[n])
    return candidates[best], scores[best]


def _smallest_flip(
    image: SearchedImage,
    flip: Flip,
    point: np.ndarray,
    picture: np.ndarray,
    low: float,
    stage: int,
    work: tuple[float, float],
) -> Generator[Step, np.ndarray, np.ndarray]:
    """The closest picture found that flips, at most as far as `picture`, which does: an upper bound.

    First along the segment from the input to the counterfactual; then by short searches at radii between
    the last budget that did not flip and the best so far, from the point moved into these balls; then along
    the segment to the closest of these that flips. Only rounded pictures that were scored count.

    Args:
        point: (C, H, W) float, the point of the first radius that flips.
        picture: (H, W, C) uint8, the picture of that radius.
        low: the last radius that did not flip, or 0.
    """
    pixels, x, p = image.pixels, image.x, image.request.p
    best, radius = picture, image.distance(picture)

    def keep_closest(candidates: Sequence[np.ndarray]) -> Generator[Step, np.ndarray, int | None]:
        """Keep the closest that flips; returns the index of the first that flips."""
        nonlocal best, radius
        scores = yield np.stack(candidates)
        flips = [flip.reached(row, _LEAD) for row in scores]
        for candidate, flipped in zip(candidates, flips, strict=True):
            far = image.distance(candidate)
            if flipped and far < radius:
                best, radius = candidate, far
        return flips.index(True) if True in flips else None

    def along(end: np.ndarray) -> Generator[Step, np.ndarray, None]:
        before, after = 0.0, 1.0
        for _ in range(2):
            shares = [before + (after - before) * (k + 1) / (_PROBES + 1) for k in range(_PROBES)]
            steps = [pixels_of.to_uint8((x + t * (end - x))[None])[0] for t in shares]
            first = yield from keep_closest(steps)
            if first is None:
                before = shares[-1]
            else:
                before, after = (shares[first - 1] if first else before), shares[first]

    yield from along(point)
    low = low if low < radius else 0.75 * radius
    radii = tuple(low + (radius - low) * (k + 1) / (FLIP_RADII + 1) for k in range(FLIP_RADII))
    points = yield SearchRequest(
        stage=stage,
        radii=radii,
        steps=image.steps(FLIP),
        init=np.stack([into_ball(point, x, p, eps) for eps in radii]),
        work=work,
    )
    first = yield from keep_closest(
        [round_into_ball(z, pixels, p, eps) for z, eps in zip(points, radii, strict=True)]
    )
    if first is not None:
        yield from along(points[first])
    return best


Searcher = Callable[[Sequence[tuple[int, SearchRequest]]], list[np.ndarray]]  # (search's number, request)
Scores = Callable[[np.ndarray], np.ndarray]  # images -> probabilities (N, K)


def run_searches(searches: Sequence[TargetSearch], search: Searcher, scores: Scores) -> list[Target]:
    """Run searches to their ends side by side; requests of the same stage are carried out together.

    Args:
        search: is given requests of one stage.
        scores: is given the images of several searches, of one dtype.
    """
    results: dict[int, Target] = {}
    waiting: dict[int, Step] = {}

    def send(number: int, value: np.ndarray | None) -> None:
        try:
            waiting[number] = next(searches[number]) if value is None else searches[number].send(value)
        except StopIteration as stop:
            results[number] = stop.value
            waiting.pop(number, None)

    for number in range(len(searches)):
        send(number, None)
    while waiting:
        images = {number: step for number, step in waiting.items() if isinstance(step, np.ndarray)}
        if images:
            dtype = next(iter(images.values())).dtype
            same = {number: step for number, step in images.items() if step.dtype == dtype}
            probabilities = scores(np.concatenate(list(same.values())))
            ends = np.cumsum([len(step) for step in same.values()])[:-1]
            for number, part in zip(same, np.split(probabilities, ends), strict=True):
                send(number, part)
            continue
        requests = [(number, step) for number, step in waiting.items() if isinstance(step, SearchRequest)]
        stage = min(request.stage for _, request in requests)  # the others wait
        chosen = [(number, request) for number, request in requests if request.stage == stage]
        for (number, _), points in zip(chosen, search(chosen), strict=True):
            send(number, points)
    return [results[number] for number in range(len(searches))]


def seed_of(seed: int, pixels: np.ndarray, target: str, eps: float) -> int:
    """The seed of one search: depends on what is searched, not on its place in the request."""
    text = f"{seed}\n{pixels_of.pixels_sha256(pixels)}\n{target}\n{float(eps)!r}"
    return seed_from_bytes(text.encode())


def norm_key(p: float) -> str:
    """The name of a distance: "l1", "l1.5", "l2" or "linf"."""
    return f"l{recipe.norm_name(p)}"


def plain(probabilities: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in probabilities)
