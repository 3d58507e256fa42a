"""The answer for one image and target: the budgets' pictures, the ladder, the flip radius.

Each answer is a generator that asks for what it needs (`Find`: points of balls; an array: the scores of its
images) and is sent the result, so that the answers of many images and targets share their batches (`drive`)
and each is still written from top to bottom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np

from ratioctl import images as pixels_of
from ratioctl import recipe
from ratioctl.counterfactuals.request import CounterfactualRequest
from ratioctl.counterfactuals.rounding import distances, round_into_ball
from ratioctl.types import Counterfactual, Target
from ratioctl.utils.seeding import seed_from_bytes

_ROADS = 2.5e-4  # lead with which a flip is searched: roads agree to 1e-4 on every probability
_BISECTED, _SHORTER, _PROBES = 6, 10, 16  # radii per flip search, its share of the steps, points per segment
_BEHIND = 5e-3  # confidence by which a search may fall behind that of a smaller radius before it is repeated


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """A wish for the best points of the image's balls.

    Attributes:
        radii: (R,); begin: points (R, C, H, W) of these balls to begin from; None begins at the image.
        work: share of the answer's work that is done before and after.
        stage: of the answer; wishes of one stage have the same steps and restarts and begin alike.
    """

    stage: int

    radii: tuple[float, ...]
    steps: int
    restarts: int = 1
    init: np.ndarray | None = None
    work: tuple[float, float] = (0.0, 1.0)


Ask = SearchRequest | np.ndarray  # or images (N, H, W, C) uint8 or (N, C, H, W) float32 to be scored
Answer = Generator[Ask, np.ndarray, Target]  # is sent points (R, C, H, W) float32, or probabilities (N, K)


def search_target(
    pixels: np.ndarray,
    target: int,
    *,
    original: np.ndarray,
    labels: Sequence[str],
    question: CounterfactualRequest,
) -> Answer:
    """All budgets of one image (H, W, C) and target, and the flip radius.

    A search in a large ball can miss what lies in a smaller one (a CIFAR model, one image, 300 steps: 0.21
    and 0.33 at l2 12 and 50, where l2 3 reaches 0.86). So wherever that shows, the search is repeated from
    the best point of the smaller balls: what is found never falls with the radius.

    Args:
        original: probabilities (K,) of the image itself.
    """
    p, radii = question.p, (*question.beyond, *question.eps)
    flip_steps = max(question.steps // _SHORTER, 1)
    whole = question.steps * question.restarts * len(radii)
    ladder = whole / (whole + flip_steps * _BISECTED)  # of the work that is the ladder's
    points = yield SearchRequest(
        stage=0, radii=radii, steps=question.steps, restarts=question.restarts, work=(0.0, ladder)
    )
    exact = yield points
    behind = behind_smaller(exact[:, target])
    if behind:
        again = yield SearchRequest(
            stage=1,
            radii=tuple(radii[n] for n in behind),
            steps=question.steps,
            init=points[[int(exact[:n, target].argmax()) for n in behind]],
            work=(ladder, ladder),
        )
        points = points.copy()
        points[behind] = again
        exact = yield points
    pictures = np.stack([round_into_ball(x, pixels, p, eps) for x, eps in zip(points, radii, strict=True)])
    rounded = yield pictures

    budgets: list[Counterfactual] = []
    first: int | None = None  # the first radius that flips
    picture, probabilities, confidence_float = pixels, original, float(original[target])
    for n, eps in enumerate(radii):
        if (
            rounded[n][target] > probabilities[target]
        ):  # else the smaller budget's picture is the better answer
            picture, probabilities, confidence_float = pictures[n], rounded[n], float(exact[n][target])
        if n >= len(question.beyond):
            budgets.append(
                Counterfactual(
                    eps=eps,
                    image=picture,
                    confidence=float(probabilities[target]),
                    confidence_float=confidence_float,
                    predicted=labels[int(probabilities.argmax())],
                    probabilities=plain(probabilities),
                    distance=distances(picture, pixels),
                )
            )
        if first is None and reached(probabilities, target, question.until):
            first, flipping = n, picture
    flip: np.ndarray | None = None
    if reached(original, target, question.until):
        flip = pixels
    elif first is not None:
        flip = yield from _flip(
            pixels,
            target,
            points[first],
            flipping,
            low=radii[first - 1] if first else 0.0,
            question=question,
            steps=flip_steps,
            done=ladder,
        )
    return Target(
        target=labels[target],
        budgets=tuple(budgets),
        flip_eps=None if flip is None else distances(flip, pixels)[norm_key(p)],
        flip_image=flip,
    )


def behind_smaller(confidences: np.ndarray) -> list[int]:
    """Indices of the radii, ascending, whose confidence (R,) is clearly below that of a smaller one."""
    best = np.maximum.accumulate(confidences)
    return [n for n in range(1, len(best)) if confidences[n] < best[n - 1] - _BEHIND]


def reached(probabilities: np.ndarray, target: int, until: float | None, lead: float = 0.0) -> bool:
    """Whether the target's of (K,) reaches `until`, or is the largest where that is None; by `lead`."""
    if until is not None:
        return bool(probabilities[target] >= until + lead)
    others = np.delete(probabilities, target)
    if lead == 0.0:
        return int(probabilities.argmax()) == target
    return bool(others.size == 0 or probabilities[target] >= others.max() + lead)


def _flip(
    pixels: np.ndarray,
    target: int,
    point: np.ndarray,
    picture: np.ndarray,
    *,
    low: float,
    question: CounterfactualRequest,
    steps: int,
    done: float,
) -> Generator[Ask, np.ndarray, np.ndarray]:
    """The nearest picture found that the model sees as the target, at most as far as `picture`, which is one.

    First along the segment from the input to the counterfactual; then by short searches at radii between
    the last budget that did not flip and the best so far; then along the segment to the nearest of these
    that flips. Only what was rounded, measured and scored counts.

    Args:
        point: (C, H, W) float, of which `picture` (H, W, C) was made.
        low: the last budget that did not flip, or 0.
        done: share of the answer's work that is done.
    """
    p, key = question.p, norm_key(question.p)
    best, radius = picture, distances(picture, pixels)[key]

    def try_(candidates: Sequence[np.ndarray]) -> Generator[Ask, np.ndarray, int | None]:
        """Keep the nearest that flips; the index of the first that flips."""
        nonlocal best, radius
        scores = yield np.stack(candidates)
        flips = [reached(found, target, question.until, _ROADS) for found in scores]
        for candidate, flipped in zip(candidates, flips, strict=True):
            far = distances(candidate, pixels)[key]
            if flipped and far < radius:
                best, radius = candidate, far
        return flips.index(True) if True in flips else None

    def along(end: np.ndarray) -> Generator[Ask, np.ndarray, None]:
        start = pixels_of.to_pixels(pixels[None])[0].astype(np.float64)
        change = end - start
        before, after = 0.0, 1.0
        for _ in range(2):
            shares = [before + (after - before) * (k + 1) / (_PROBES + 1) for k in range(_PROBES)]
            first = yield from try_([pixels_of.to_uint8((start + t * change)[None])[0] for t in shares])
            if first is None:
                before = shares[-1]
            else:
                before, after = (shares[first - 1] if first else before), shares[first]

    yield from along(point)
    low = low if low < radius else 0.75 * radius
    radii = tuple(low + (radius - low) * (k + 1) / (_BISECTED + 1) for k in range(_BISECTED))
    points = yield SearchRequest(stage=2, radii=radii, steps=steps, work=(done, 1.0))
    first = yield from try_(
        [round_into_ball(x, pixels, p, eps) for x, eps in zip(points, radii, strict=True)]
    )
    if first is not None:
        yield from along(points[first])
    return best


Searcher = Callable[
    [Sequence[tuple[int, SearchRequest]]], list[np.ndarray]
]  # (number of the answer, its wish) each
Scores = Callable[[np.ndarray], np.ndarray]  # images -> probabilities (N, K)


def drive(answers: Sequence[Answer], find: Searcher, scores: Scores) -> list[Target]:
    """Run answers to their ends side by side: like wishes go out together.

    Args:
        find: is given wishes of one stage.
        scores: is given the images of several answers, of one dtype.
    """
    ended: dict[int, Target] = {}
    asked: dict[int, Ask] = {}

    def send(number: int, found: np.ndarray | None) -> None:
        try:
            asked[number] = next(answers[number]) if found is None else answers[number].send(found)
        except StopIteration as stop:
            ended[number] = stop.value
            asked.pop(number, None)

    for number in range(len(answers)):
        send(number, None)
    while asked:
        images = {number: ask for number, ask in asked.items() if isinstance(ask, np.ndarray)}
        if images:
            kind = next(iter(images.values())).dtype
            same = {number: ask for number, ask in images.items() if ask.dtype == kind}
            probabilities = scores(np.concatenate(list(same.values())))
            ends = np.cumsum([len(ask) for ask in same.values()])[:-1]
            for number, part in zip(same, np.split(probabilities, ends), strict=True):
                send(number, part)
            continue
        wishes = [(number, ask) for number, ask in asked.items() if isinstance(ask, SearchRequest)]
        first = min((ask for _, ask in wishes), key=lambda ask: ask.stage)  # the others wait for company
        chosen = [(number, ask) for number, ask in wishes if ask.stage == first.stage]
        for (number, _), points in zip(chosen, find(chosen), strict=True):
            send(number, points)
    return [ended[number] for number in range(len(answers))]


def seed_of(seed: int, pixels: np.ndarray, target: str, eps: float) -> int:
    """The seed of one search, from what it is about and not from its place among others."""
    text = f"{seed}\n{pixels_of.pixels_sha256(pixels)}\n{target}\n{float(eps)!r}"
    return seed_from_bytes(text.encode())


def norm_key(p: float) -> str:
    """The name of a distance: "l1", "l1.5", "l2" or "linf"."""
    return f"l{recipe.norm_name(p)}"


def plain(probabilities: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in probabilities)
