"""The search for one image and target: the budgets' pictures, the ladder, the flip radius.

`search_target` is a generator. It yields what it needs (a `SearchRequest` for points of balls, or an array of
images to be scored) and is sent the result, so that the searches of many images and targets share their
batches (`run_searches`) and each is still written from top to bottom.
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

FLIP_RADII = 6  # radii of a flip search
FLIP_SHARE = 10  # its steps are the ladder's over this
_PROBES = 16  # points per segment
_LEAD = 2.5e-4  # a flip needs this lead: two backends differ by up to 1e-4 in every probability
_BEHIND = 5e-3  # a search this far behind the confidence of a smaller radius is repeated from there


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """Request for the best point in each of several balls around an image.

    Attributes:
        stage: requests of one stage agree in steps, restarts, and whether they have `init`.
        radii: (R,), of the balls.
        init: points (R, C, H, W) of these balls to start from; None starts at the image.
        work: share of the whole search that is done before and after.
    """

    stage: int
    radii: tuple[float, ...]
    steps: int
    restarts: int = 1
    init: np.ndarray | None = None
    work: tuple[float, float] = (0.0, 1.0)


Step = SearchRequest | np.ndarray  # or images (N, H, W, C) uint8 or (N, C, H, W) float32 to be scored
# Is sent points (R, C, H, W) float32 for a SearchRequest, probabilities (N, K) for images.
TargetSearch = Generator[Step, np.ndarray, Target]


def search_target(
    pixels: np.ndarray,
    target: int,
    *,
    original: np.ndarray,
    labels: Sequence[str],
    request: CounterfactualRequest,
) -> TargetSearch:
    """All budgets of one image (H, W, C) and target, and the flip radius.

    A search in a large ball can miss what lies in a smaller one (a CIFAR model, one image, 300 steps: 0.21
    and 0.33 at l2 12 and 50, where l2 3 reaches 0.86). Such a search is repeated from the best point of the
    smaller balls, so that confidences never fall with the radius.

    Args:
        original: probabilities (K,) of the image itself.
    """
    radii = (*request.extra_radii, *request.eps)
    flip_steps = max(request.steps // FLIP_SHARE, 1)
    total = request.steps * request.restarts * len(radii)
    ladder = total / (total + flip_steps * FLIP_RADII)  # the ladder's share of the work
    points, exact = yield from _search_ladder(radii, target, request, ladder)
    pictures = np.stack(
        [round_into_ball(x, pixels, request.p, eps) for x, eps in zip(points, radii, strict=True)]
    )
    rounded = yield pictures

    budgets: list[Counterfactual] = []
    first: int | None = None  # the first radius that flips
    picture, probabilities, confidence_float = pixels, original, float(original[target])
    for n, eps in enumerate(radii):
        if rounded[n][target] > probabilities[target]:  # else the smaller budget's picture is better
            picture, probabilities, confidence_float = pictures[n], rounded[n], float(exact[n][target])
        if n >= len(request.extra_radii):
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
        if first is None and reached(probabilities, target, request.until):
            first, flipping = n, picture
    flip: np.ndarray | None = None
    if reached(original, target, request.until):
        flip = pixels
    elif first is not None:
        flip = yield from _flip(
            pixels,
            target,
            points[first],
            flipping,
            low=radii[first - 1] if first else 0.0,
            request=request,
            steps=flip_steps,
            done=ladder,
        )
    return Target(
        target=labels[target],
        budgets=tuple(budgets),
        flip_eps=None if flip is None else distances(flip, pixels)[norm_key(request.p)],
        flip_image=flip,
    )


def _search_ladder(
    radii: tuple[float, ...], target: int, request: CounterfactualRequest, work: float
) -> Generator[Step, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The best points (R, C, H, W) of the radii and their probabilities (R, K)."""
    points = yield SearchRequest(
        stage=0, radii=radii, steps=request.steps, restarts=request.restarts, work=(0.0, work)
    )
    exact = yield points
    behind = behind_smaller(exact[:, target])
    if behind:
        repeated = yield SearchRequest(
            stage=1,
            radii=tuple(radii[n] for n in behind),
            steps=request.steps,
            init=points[[int(exact[:n, target].argmax()) for n in behind]],
            work=(work, work),
        )
        points = points.copy()
        points[behind] = repeated
        exact = yield points
    return points, exact


def behind_smaller(confidences: np.ndarray) -> list[int]:
    """Indices of the radii, ascending, whose confidence (R,) is clearly below that of a smaller one."""
    best = np.maximum.accumulate(confidences)
    return [n for n in range(1, len(best)) if confidences[n] < best[n - 1] - _BEHIND]


def reached(probabilities: np.ndarray, target: int, until: float | None, lead: float = 0.0) -> bool:
    """Whether the target's probability reaches `until`, or is the largest if that is None; by `lead`."""
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
    request: CounterfactualRequest,
    steps: int,
    done: float,
) -> Generator[Step, np.ndarray, np.ndarray]:
    """The closest picture found that is predicted as the target, at most as far as `picture`, which is.

    First along the segment from the input to the counterfactual; then by short searches at radii between
    the last budget that did not flip and the best so far; then along the segment to the closest of these
    that flips. Only rounded pictures that were measured and scored count.

    Args:
        point: (C, H, W) float, the point `picture` (H, W, C) was rounded from.
        low: the last budget that did not flip, or 0.
        done: share of the work that is done.
    """
    p, key = request.p, norm_key(request.p)
    best, radius = picture, distances(picture, pixels)[key]

    def try_(candidates: Sequence[np.ndarray]) -> Generator[Step, np.ndarray, int | None]:
        """Keep the closest that flips; returns the index of the first that flips."""
        nonlocal best, radius
        scores = yield np.stack(candidates)
        flips = [reached(row, target, request.until, _LEAD) for row in scores]
        for candidate, flipped in zip(candidates, flips, strict=True):
            far = distances(candidate, pixels)[key]
            if flipped and far < radius:
                best, radius = candidate, far
        return flips.index(True) if True in flips else None

    def along(end: np.ndarray) -> Generator[Step, np.ndarray, None]:
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
    radii = tuple(low + (radius - low) * (k + 1) / (FLIP_RADII + 1) for k in range(FLIP_RADII))
    points = yield SearchRequest(stage=2, radii=radii, steps=steps, work=(done, 1.0))
    first = yield from try_(
        [round_into_ball(x, pixels, p, eps) for x, eps in zip(points, radii, strict=True)]
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
