"""Counterfactuals: how an image would have to change, within a ball, to be seen as another class.

The search is the one attack engine with the goal log p(target); every budget of a target runs in one batch
of per-example radii. What is handed out is not the point the search found but the 8-bit picture made of it,
and every number belongs to that picture: it is rounded so that it stays in the ball, scored again on the road
that scores any image, and never less confident than the picture of a smaller budget.

This module loads torch only when the search begins, so that a wrong question is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ratioctl import images as pixels_of
from ratioctl import metrics, package, recipe
from ratioctl.errors import ImageError, SourceError, UsageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.ranges import check_budgets, parse_range
from ratioctl.results import Budget, Explanation, Original, Target

if TYPE_CHECKING:
    from ratioctl.nets.hardware import Place
    from ratioctl.nets.predict import Predictor

SCHEMA = "ratioctl/counterfactuals/1"
NORMS = {"1": 1.0, "1.5": 1.5, "2": 2.0, "inf": math.inf}
QUESTIONS = ("predicted", "second", "all")

Given = str | os.PathLike[str] | np.ndarray
Scores = Callable[[np.ndarray], np.ndarray]  # images (N, H, W, C) uint8 or (N, C, H, W) float32 -> (N, K)

_ROUNDING = 5e-7  # share of the radius kept free, so that no way of computing a distance finds it exceeded
_ROADS = 2.5e-4  # lead with which a flip is searched: roads agree to 1e-4 on every probability
_BISECTED, _SHORTER, _PROBES = 6, 10, 16  # radii per flip search, its share of the steps, points per segment


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What one model is asked about every image.

    Attributes:
        targets: class names of the model, or "predicted", "second", "all".
        eps: budgets, ascending, in the norm `p`, pixels in [0,1].
        until: the flip radius is where the target's confidence reaches this; None, where it is predicted.
        region: bool (H, W), true where the picture may change; None everywhere.
    """

    targets: tuple[str, ...]
    p: float
    eps: tuple[float, ...]
    steps: int
    restarts: int
    seed: int
    until: float | None = None
    region: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image file to be read: what it is called, and its encoded bytes."""

    path: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image as a model sees it: `pixels` (H, W, C) uint8. `sha256` is that of the file."""

    path: str
    sha256: str
    pixels: np.ndarray
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A checked request: every model with its question, and the images."""

    models: tuple[tuple[ModelPackage, Question], ...]
    sources: tuple[Source, ...]

    @property
    def header(self) -> dict[str, Any]:
        """The head of counterfactuals.json: everything but images and errors."""
        question = self.models[0][1]
        head: dict[str, Any] = {
            "schema": SCHEMA,
            "norm": recipe.norm_name(question.p),
            "steps": question.steps,
            "restarts": question.restarts,
            "seed": question.seed,
        }
        if question.until is not None:
            head["until"] = question.until
        head["models"] = [
            {
                "name": model.name,
                "digest": model.digest,
                "temperature": model.temperature,
                "labels": list(model.label_names),
            }
            for model, _ in self.models
        ]
        return head


# --- the question -------------------------------------------------------------------------------------------


def prepare(
    images: Given | Sequence[Given],
    *,
    target: str | Sequence[str],
    eps: str | float | Sequence[float] | None = None,
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = package.DEFAULT_MODEL,
    norm: str | float = "2",
    steps: int = 500,
    restarts: int = 1,
    seed: int = 0,
    until: float | None = None,
    region: str | Sequence[int] | np.ndarray | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Asked:
    """Check a request as far as it can be without reading an image; quick, without torch.

    Args:
        images: files, folders or archives, or uint8 arrays (H, W) or (H, W, C); one or several.
        target: class names (comma-separated, or a list), "predicted", "second" or "all".
        eps: budgets as on the command line ("0.5..3"), a number or numbers; None takes the model's ladder.
        model: package folders or names of bundled models.
        norm: of the ball in which the change stays.
        until: look for the smallest change that reaches this confidence, not for the one that flips.
        region: "X,Y,W,H" in pixels of the model's input, a mask image, or a bool array (H, W).
        out: where the answers will go; pictures in there are left out of a folder that contains it.
    Raises:
        UsageError: an unknown class (the nearest is suggested), impossible budgets or numbers.
        SourceError: an image or folder that is not there. PackageError: a model that cannot be read.
    """
    p = _norm(norm)
    budgets = _budgets(eps)
    if steps < 1 or restarts < 1:
        raise UsageError("steps and restarts", "must be at least 1", "The defaults are 500 and 1.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed}", "is not between 0 and 2^63 - 1", "The default is 0.")
    if until is not None and not 0 < until < 1:
        raise UsageError(f"--until {until:g}", "is not a confidence between 0 and 1", "For example 0.9.")
    names = [model] if isinstance(model, str | os.PathLike) else list(model)
    if not names:
        raise UsageError("--model", "names no model", "See `ratioctl models`.")
    models = []
    for name in names:
        found = package.read(package.find(os.fspath(name)))
        channels, height, width = found.input_size
        if height != width:
            raise UsageError(found.name, f"its input is {width}x{height}, not square", "Take another model.")
        ladder = found.ladders.get(recipe.norm_name(p)) or recipe.default_ladder(p, height, channels)
        question = Question(
            targets=resolve_targets(target, found),
            p=p,
            eps=ladder if budgets is None else budgets,
            steps=steps,
            restarts=restarts,
            seed=seed,
            until=until,
            region=None if region is None else _region(region, height),
        )
        models.append((found, question))
    return Asked(models=tuple(models), sources=tuple(_sources(images, out)))


def resolve_targets(target: str | Sequence[str], spec: Spec) -> tuple[str, ...]:
    """The classes that `target` names: exactly, else whatever the case; commas within names are allowed.

    Raises:
        UsageError: an unknown class; the classes are named and the nearest is suggested.
    """
    labels = spec.label_names
    pieces = target.split(",") if isinstance(target, str) else [str(one) for one in target]
    joined = isinstance(target, str)
    found: list[str] = []
    start = 0
    while start < len(pieces):
        for end in range(len(pieces) if joined else start + 1, start, -1):
            label = _label(",".join(pieces[start:end]).strip(), labels)
            if label is not None:
                break
        else:
            raise _unknown_class(pieces[start].strip(), spec)
        found.append(label)
        start = end
    if not found:
        raise UsageError("--target", "names no class", "Name one, or predicted, second or all.")
    return tuple(dict.fromkeys(found))


def _label(name: str, labels: Sequence[str]) -> str | None:
    if name in labels or name in QUESTIONS:
        return name
    alike = [label for label in labels if label.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def _unknown_class(name: str, spec: Spec) -> UsageError:
    labels = spec.label_names
    folded = {label.casefold(): label for label in (*labels, *QUESTIONS)}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    hint = f'Did you mean "{folded[near[0]]}"? ' if near else ""
    shown = ", ".join(labels[:60]) + (f" and {len(labels) - 60} more" if len(labels) > 60 else "")
    reason = f"{spec.name} has no such class" if name else "a class name is missing"
    return UsageError(f'--target "{name}"', reason, f"{hint}Its classes: {shown}.")


def _norm(norm: str | float) -> float:
    name = norm if isinstance(norm, str) else f"{norm:g}"
    if name not in NORMS:
        raise UsageError(f"--norm {name}", "is unknown", "Known: 2, 1.5, 1, inf.")
    return NORMS[name]


def _budgets(eps: str | float | Sequence[float] | None) -> tuple[float, ...] | None:
    if eps is None:
        return None
    if isinstance(eps, str):
        return parse_range(eps)
    return check_budgets([eps] if isinstance(eps, int | float) else list(eps), "eps")


def _region(region: str | Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """The mask (H, W) of a box, an array or a mask image, which goes the same road as the images."""
    if isinstance(region, np.ndarray):
        mask = region.astype(bool)
        if mask.shape != (size, size):
            raise UsageError("region", f"has shape {mask.shape}, not {(size, size)}", "Use the input's size.")
    else:
        shown = region if isinstance(region, str) else ",".join(str(n) for n in region)
        if re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*){3}", shown):
            x, y, w, h = (int(part) for part in shown.split(","))
            if not (0 <= x < x + w <= size and 0 <= y < y + h <= size):
                raise UsageError(
                    f"--region {shown}",
                    f"is no box within the model's {size}x{size} input",
                    "X,Y is its upper left corner, W,H its size.",
                )
            mask = np.zeros((size, size), dtype=bool)
            mask[y : y + h, x : x + w] = True
        else:
            try:
                mask = pixels_of.decode(shown, size, 1).pixels[..., 0] >= 128
            except ImageError as error:
                raise UsageError(
                    f"--region {shown}",
                    error.reason,
                    "Give X,Y,W,H or a mask image, white where it may change.",
                ) from None
    if not mask.any():
        raise UsageError("--region", "leaves no pixel to change", "White parts of a mask may change.")
    return mask


def _sources(images: Given | Sequence[Given], out: str | os.PathLike[str] | None) -> Iterator[Source]:
    given = [images] if isinstance(images, str | os.PathLike | np.ndarray) else list(images)
    if not given:
        raise UsageError("images", "there are none", "Name an image or a folder.")
    paths = [os.fspath(one) for one in given if not isinstance(one, np.ndarray)]
    pixels_of.walk(paths)  # looks at once whether all of them exist
    kept = 0
    for index, one in enumerate(given):
        if isinstance(one, np.ndarray):
            kept += 1
            yield Source(path=f"array-{index}", read=functools.partial(_encoded, one))
            continue
        ours = _inside(os.fspath(one), out)
        for item in pixels_of.walk([one]):
            if ours is None or not os.path.realpath(item.path).startswith(ours):
                kept += 1
                yield Source(path=item.path, read=item.read)
    if not kept:
        raise SourceError(paths[0], "holds no images but our own answers", "Name the images to explain.")


def _inside(folder: str, out: str | os.PathLike[str] | None) -> str | None:
    """The real path of `out` with a separator behind it, if it lies below `folder`."""
    if out is None or not os.path.isdir(folder):
        return None
    real, root = os.path.realpath(out), os.path.realpath(folder)
    return real + os.sep if os.path.commonpath([real, root]) == root and real != root else None


def _encoded(array: np.ndarray) -> bytes:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError("array", f"is {array.dtype} {array.shape}", "Pass uint8 (H, W) or (H, W, C).")
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(squeezed)).save(stream, "PNG")
    return stream.getvalue()


def load(source: Source, spec: Spec) -> Picture:
    """Read an image as the model sees it. Raises ImageError."""
    channels, size, _ = spec.input_size
    data = source.read()
    decoded = pixels_of.decode(data, size, channels, name=source.path)
    return Picture(
        path=source.path,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=decoded.pixels,
        notes=decoded.notes,
    )


# --- the answers --------------------------------------------------------------------------------------------


def explain(
    asked: Asked,
    *,
    device: str = "auto",
    precision: str = "auto",
    on_error: Callable[[str, ImageError], None] | None = None,
    on_picture: Callable[[Picture], None] | None = None,
    on_place: Callable[[Place], None] | None = None,
    watch: Callable[[float], None] | None = None,
) -> Iterator[Explanation]:
    """Answer a request, image by image as they are done; models in the outer order.

    Args:
        on_error: told once of each image that cannot be read, which is then left out; without it the
            ImageError is raised.
        on_picture: told of each image when it was read for the first time.
        watch: told how many of the images, over all models, are done; fractions while searching.
    """
    if on_error is None:
        for source in asked.sources:  # now rather than after an hour's search
            load(source, asked.models[0][0])
    unreadable: set[int] = set()

    def pictures(model: int, spec: Spec) -> Iterator[Picture]:
        for index, source in enumerate(asked.sources):
            if index in unreadable:
                continue
            try:
                picture = load(source, spec)
            except ImageError as error:
                if on_error is None:
                    raise
                unreadable.add(index)
                on_error(source.path, error)
                continue
            if on_picture is not None and model == 0:
                on_picture(picture)
            yield picture

    place: Place | None = None
    done = 0
    for model, (spec, question) in enumerate(asked.models):
        answers = None
        for picture in pictures(model, spec):
            if place is None:
                from ratioctl.nets.hardware import choose

                place = choose(device, precision)
                if on_place is not None:
                    on_place(place)
            if answers is None:
                answers = _answers_of(spec, question, place, model)
            before = done

            def progress(share: float, before: int = before) -> None:
                if watch is not None:
                    watch(before + share)

            yield answers(picture, progress)
            done += 1
            if watch is not None:
                watch(done)


Answers = Callable[[Picture, Callable[[float], None]], Explanation]


def _answers_of(spec: ModelPackage, question: Question, place: Place, index: int) -> Answers:
    """The function that explains pictures with one model, weights loaded."""
    from ratioctl.nets.predict import predictor

    predict = predictor(spec, place.device)
    search = _searcher(predict, spec, question, place)

    def scores(images: np.ndarray) -> np.ndarray:
        return metrics.softmax(predict.predict(images), spec.temperature)

    def answer(picture: Picture, progress: Callable[[float], None]) -> Explanation:
        probabilities = scores(picture.pixels[None])[0]
        classes = _classes(question.targets, probabilities, spec.label_names)
        threshold = spec.thresholds.get("tpr95")
        confidence = float(probabilities.max())
        targets = []
        for n, target in enumerate(classes):

            def share(done: float, n: int = n) -> None:
                progress((n + done) / len(classes))

            targets.append(
                answer_target(
                    picture.pixels,
                    target,
                    original=probabilities,
                    labels=spec.label_names,
                    question=question,
                    search=search,
                    scores=scores,
                    progress=share,
                )
            )
        return Explanation(
            path=picture.path,
            sha256=picture.sha256,
            model=index,
            input=picture.pixels,
            original=Original(
                label=spec.label_names[int(probabilities.argmax())],
                confidence=confidence,
                probabilities=_plain(probabilities),
                is_ood=None if threshold is None else confidence < threshold,
            ),
            targets=tuple(targets),
            notes=picture.notes,
        )

    return answer


def _classes(targets: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]) -> list[int]:
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


Search = Callable[[np.ndarray, int, Sequence[float], int, int, Callable[[float], None]], np.ndarray]
# 8-bit input (H, W, C), target, radii (B,), steps, restarts, progress -> best points (B, C, H, W) float32


def _searcher(predict: Predictor, spec: ModelPackage, question: Question, place: Place) -> Search:
    """The search for one input and target at several radii, in one batch of per-example radii.

    A batch holds one image and one target: what is found does not depend on companions, not even by rounding.
    Six rows are no slower per row than 24 on a CPU, given channels_last weights and images, which halve the
    time of a narrow network (measured, ResNet-18 of width 16 and 32).
    """
    import copy

    import torch

    from ratioctl.attack import engine, goals

    network = copy.deepcopy(predict.network).to(memory_format=torch.channels_last)
    channels, height, width = spec.input_size
    widest = (channels * height * width) ** (1 / question.p)  # the whole box fits into this ball
    most = max(len(question.eps) if place.device.type == "cuda" else 6, 96 * 1024 // (height * width))
    mask = None
    if question.region is not None:
        mask = torch.from_numpy(question.region).to(place.device)[None, None]

    def search(
        pixels: np.ndarray,
        target: int,
        radii: Sequence[float],
        steps: int,
        restarts: int,
        progress: Callable[[float], None],
    ) -> np.ndarray:
        found = []
        for start in range(0, len(radii), most):
            part = radii[start : start + most]
            share = len(part) / len(radii)
            before = start / len(radii)
            calls = 0

            def watch(step: int, x: torch.Tensor, value: torch.Tensor) -> None:
                nonlocal calls
                calls += 1
                progress(before + share * min(1.0, calls / (restarts * (steps + 1))))  # noqa: B023

            x0 = torch.from_numpy(pixels_of.to_pixels(pixels[None])).to(place.device)
            x0 = x0.expand(len(part), -1, -1, -1).contiguous(memory_format=torch.channels_last)

            def logits_of(x: torch.Tensor) -> torch.Tensor:
                free = x if mask is None else torch.where(mask, x, x0)  # noqa: B023
                with place.autocast():
                    return network(free)

            attack = recipe.Attack(
                ball=recipe.Ball(p=question.p, eps=1.0),
                method="afw" if question.p == 1.5 else "apgd",
                steps=steps,
                restarts=restarts,
            )
            generators = None
            if restarts > 1:
                label = spec.label_names[target]
                generators = [
                    torch.Generator().manual_seed(seed_of(question.seed, pixels, label, eps)) for eps in part
                ]
            best = engine.perturb(
                logits_of,
                x0,
                goals.log_probability(
                    torch.full((len(part),), target, device=place.device), spec.temperature
                ),
                attack,
                generator=generators,
                eps=torch.tensor([min(eps, widest) for eps in part], dtype=torch.float64),
                watch=watch,
            ).x
            found.append((best if mask is None else torch.where(mask, best, x0)).cpu().contiguous().numpy())
        return np.concatenate(found)

    return search


def seed_of(seed: int, pixels: np.ndarray, target: str, eps: float) -> int:
    """The seed of one search, from what it is about and not from its place among others."""
    text = f"{seed}\n{pixels_of.pixels_sha256(pixels)}\n{target}\n{float(eps)!r}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def answer_target(
    pixels: np.ndarray,
    target: int,
    *,
    original: np.ndarray,
    labels: Sequence[str],
    question: Question,
    search: Search,
    scores: Scores,
    progress: Callable[[float], None] = lambda done: None,
) -> Target:
    """All budgets of one image (H, W, C) and target, and the flip radius.

    Args:
        original: probabilities (K,) of the image itself.
    """
    p = question.p
    flip_steps = max(question.steps // _SHORTER, 1)
    whole = question.steps * question.restarts * len(question.eps)
    share = whole / (whole + flip_steps * _BISECTED)  # of the work that is the ladder's, for the progress
    points = search(
        pixels, target, question.eps, question.steps, question.restarts, lambda done: progress(share * done)
    )
    pictures = np.stack(
        [round_into_ball(x, pixels, p, eps) for x, eps in zip(points, question.eps, strict=True)]
    )
    exact, rounded = scores(points), scores(pictures)

    def reached(probabilities: np.ndarray, lead: float = 0.0) -> bool:
        if question.until is not None:
            return bool(probabilities[target] >= question.until + lead)
        others = np.delete(probabilities, target)
        if lead == 0.0:
            return int(probabilities.argmax()) == target
        return bool(others.size == 0 or probabilities[target] >= others.max() + lead)

    budgets: list[Budget] = []
    first: int | None = None  # the first budget that flips
    picture, probabilities, confidence_float = pixels, original, float(original[target])
    for n, eps in enumerate(question.eps):
        if (
            rounded[n][target] > probabilities[target]
        ):  # else the smaller budget's picture is the better answer
            picture, probabilities, confidence_float = pictures[n], rounded[n], float(exact[n][target])
        budgets.append(
            Budget(
                eps=eps,
                image=picture,
                confidence=float(probabilities[target]),
                confidence_float=confidence_float,
                predicted=labels[int(probabilities.argmax())],
                probabilities=_plain(probabilities),
                distance=distances(picture, pixels),
            )
        )
        if first is None and reached(probabilities):
            first = n
    flip: np.ndarray | None = None
    if reached(original):
        flip = pixels
    elif first is not None:
        flip = _flip(
            pixels,
            points[first],
            budgets[first].image,
            low=question.eps[first - 1] if first else 0.0,
            p=p,
            reached=lambda found: reached(found, _ROADS),
            scores=scores,
            search=lambda radii: search(
                pixels, target, radii, flip_steps, 1, lambda done: progress(share + (1 - share) * done)
            ),
        )
    progress(1.0)
    return Target(
        target=labels[target],
        budgets=tuple(budgets),
        flip_eps=None if flip is None else distances(flip, pixels)[_key(p)],
        flip_image=flip,
    )


def _flip(
    pixels: np.ndarray,
    point: np.ndarray,
    picture: np.ndarray,
    *,
    low: float,
    p: float,
    reached: Callable[[np.ndarray], bool],
    scores: Scores,
    search: Callable[[Sequence[float]], np.ndarray],
) -> np.ndarray:
    """The nearest picture found that the model sees as the target, at most as far as `picture`, which is one.

    First along the segment from the input to the counterfactual; then by short searches at radii between
    the last budget that did not flip and the best so far; then along the segment to the nearest of these
    that flips. Only what was rounded, measured and scored counts.

    Args:
        point: (C, H, W) float, of which `picture` (H, W, C) was made.
        low: the last budget that did not flip, or 0.
    """
    key = _key(p)
    best, radius = picture, distances(picture, pixels)[key]

    def try_(candidates: Sequence[np.ndarray]) -> int | None:
        """Keep the nearest that flips; the index of the first that flips."""
        nonlocal best, radius
        flips = [reached(found) for found in scores(np.stack(candidates))]
        for candidate, flipped in zip(candidates, flips, strict=True):
            far = distances(candidate, pixels)[key]
            if flipped and far < radius:
                best, radius = candidate, far
        return flips.index(True) if True in flips else None

    def along(end: np.ndarray) -> None:
        start = pixels_of.to_pixels(pixels[None])[0].astype(np.float64)
        change = end - start
        before, after = 0.0, 1.0
        for _ in range(2):
            shares = [before + (after - before) * (k + 1) / (_PROBES + 1) for k in range(_PROBES)]
            first = try_([pixels_of.to_uint8((start + t * change)[None])[0] for t in shares])
            if first is None:
                before = shares[-1]
            else:
                before, after = (shares[first - 1] if first else before), shares[first]

    along(point)
    low = low if low < radius else 0.75 * radius
    radii = [low + (radius - low) * (k + 1) / (_BISECTED + 1) for k in range(_BISECTED)]
    points = search(radii)
    first = try_([round_into_ball(x, pixels, p, eps) for x, eps in zip(points, radii, strict=True)])
    if first is not None:
        along(points[first])
    return best


# --- pictures in the ball -----------------------------------------------------------------------------------


def round_into_ball(x: np.ndarray, pixels: np.ndarray, p: float, eps: float) -> np.ndarray:
    """The 8-bit picture of a point of the ball, itself in the ball.

    To the nearest value; then, where that left the ball, pixels that were rounded away from the input go back
    by one, first those that rounding moved furthest, as few as are needed. (At the optimum of a smooth goal
    the loss of such a step is proportional to what it gains in the norm, so that only the rounding error
    tells the pixels apart.) With all of them back every pixel is at least as near to the input as in `x`, so
    this ends inside.

    Args:
        x: (C, H, W) float in [0,1], at most `eps` from `pixels` / 255 in the norm `p`.
        pixels: (H, W, C) uint8, the centre.
    Returns:
        (H, W, C) uint8, at most `eps` away, computed in float64.
    """
    centre = pixels.astype(np.int64)
    wanted = np.clip(x.astype(np.float64), 0, 1).transpose(1, 2, 0) * 255 - centre
    change = np.rint(wanted).astype(np.int64)
    sign, size = np.sign(change).ravel(), np.abs(change).ravel()
    if math.isinf(p):
        size = np.minimum(size, math.floor(min(eps, 1.0) * 255 * (1 + 1e-12)))
    else:
        limit = min(255 * eps * (1 - _ROUNDING), 1e6) ** p
        excess = (size**p).sum() - limit
        if excess > 0:
            up = size - np.abs(wanted).ravel()
            away = np.flatnonzero(up > 0)
            away = away[np.argsort(-up[away], kind="stable")]
            gains = (size[away] ** p - (size[away] - 1) ** p).cumsum()
            size[away[: np.searchsorted(gains, excess) + 1]] -= 1
        while size.any() and (size**p).sum() > limit:  # only where `x` itself was outside, by rounding
            size[size.argmax()] -= 1
    return (centre + (sign * size).reshape(centre.shape)).astype(np.uint8)


def distances(picture: np.ndarray, pixels: np.ndarray) -> dict[str, float]:
    """ "l1", "l1.5", "l2" and "linf" between two uint8 images of one shape, pixels in [0,1], in float64."""
    size = np.abs(picture.astype(np.int64) - pixels.astype(np.int64)).ravel()
    return {
        "l1": float(size.sum() / 255),
        "l1.5": float((size**1.5).sum() ** (2 / 3) / 255),
        "l2": float(math.sqrt(int((size**2).sum())) / 255),
        "linf": float(size.max(initial=0) / 255),
    }


def _key(p: float) -> str:
    return f"l{recipe.norm_name(p)}"


def _plain(probabilities: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in probabilities)


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files on disk among the sources; those in archives are left out."""
    return [path for path in (Path(source.path) for source in sources) if path.is_file()]
