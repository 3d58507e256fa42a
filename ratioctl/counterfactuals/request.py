"""The question: what is asked of which models about which images, checked before any work."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ratioctl import images as pixels_of
from ratioctl import package, recipe
from ratioctl.counterfactuals.epsilons import check_budgets, parse_range
from ratioctl.errors import ImageError, SourceError, UsageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.utils.suggest import nearest
from ratioctl.utils.text import nfc

SCHEMA = "ratioctl/counterfactuals/1"
NORMS = {"1": 1.0, "1.5": 1.5, "2": 2.0, "inf": math.inf}
QUESTIONS = ("predicted", "second", "all")
FAR = 3  # ends of a model's ladder; at 4 a search reached 0.21 where the ladder's end reached 0.86

Given = str | os.PathLike[str] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CounterfactualRequest:
    """What one model is asked about every image.

    Attributes:
        targets: class names of the model, or "predicted", "second", "all".
        eps: budgets, ascending, in the norm `p`, pixels in [0,1].
        until: the flip radius is where the target's confidence reaches this; None, where it is predicted.
        region: bool (H, W), true where the picture may change; None everywhere.
        beyond: radii that are searched as well, smaller than all budgets (see `answer_target`).
    """

    targets: tuple[str, ...]
    p: float
    eps: tuple[float, ...]
    steps: int
    restarts: int
    seed: int
    until: float | None = None
    region: np.ndarray | None = None
    beyond: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image to be read: its name, its encoded bytes, the file on disk if it is one, targets of its own."""

    path: str
    read: Callable[[], bytes]
    file: str | None = None
    targets: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image as a model sees it: `pixels` (H, W, C) uint8. `sha256` is that of the file."""

    path: str
    sha256: str
    pixels: np.ndarray
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRequest:
    """A checked request: every model with its question, once for each norm, and the images.

    `warnings` say what can be asked and hardly answered.
    """

    models: tuple[tuple[ModelPackage, CounterfactualRequest], ...]
    sources: tuple[Source, ...]
    bit_depth: int | None = None
    warnings: tuple[str, ...] = ()

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
        regions = {id(model): asked.region for model, asked in self.models}  # one for all norms
        head["models"] = [
            {
                "name": model.name,
                "digest": model.digest,
                "temperature": model.temperature,
                "threshold": model.thresholds.get("tpr95"),
                "labels": list(model.label_names),
                **_region_told(regions[id(model)]),
            }
            for model in self.packages
        ]
        return head

    @property
    def packages(self) -> tuple[ModelPackage, ...]:
        """Every model once."""
        return tuple({id(model): model for model, _ in self.models}.values())

    @property
    def norms(self) -> tuple[float, ...]:
        """Every norm once."""
        return tuple(dict.fromkeys(question.p for _, question in self.models))

    @property
    def cards(self) -> tuple[str | None, ...]:
        """The models' cards in Markdown."""
        return tuple(model.card for model in self.packages)


# --- the question -------------------------------------------------------------------------------------------


def prepare(
    images: Given | Sequence[Given],
    *,
    target: str | Sequence[str],
    eps: str | float | Sequence[float] | None = None,
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = package.DEFAULT_MODEL,
    norm: str | float | Sequence[str | float] = "2",
    steps: int = 500,
    restarts: int = 1,
    seed: int = 0,
    until: float | None = None,
    region: str | Sequence[int] | np.ndarray | None = None,
    bit_depth: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> PreparedRequest:
    """Check a request as far as it can be without reading an image; quick, without torch.

    Args:
        images: files, folders or archives, or uint8 arrays (H, W) or (H, W, C); one or several.
        target: class names (comma-separated, or a list), "predicted", "second" or "all".
        eps: budgets as on the command line ("0.5..3"), a number or numbers; None takes the model's ladder.
        model: package folders or names of bundled models.
        norm: of the ball in which the change stays; several are answered one after the other, each with its
            own ladder, as if they were several models.
        until: look for the smallest change that reaches this confidence, not for the one that flips.
        region: "X,Y,W,H" in pixels of the model's input, a mask image, or a bool array (H, W).
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel.
        out: where the answers will go; pictures in there are left out of a folder that contains it.
    Raises:
        UsageError: an unknown class (the nearest is suggested), impossible budgets or numbers.
        SourceError: an image or folder that is not there. PackageError: a model that cannot be read.
    """
    norms = [_norm(one) for one in ([norm] if isinstance(norm, str | int | float) else list(norm))]
    norms = list(dict.fromkeys(norms))
    if not norms:
        raise UsageError("--norm", "names no norm", "Known: 2, 1.5, 1, inf.")
    if len(norms) > 1 and eps is not None:
        raise UsageError(
            "--eps",
            "means something else in every norm, and several are asked for",
            "Leave it out: each norm has its own ladder.",
        )
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
    models, doubts = [], []
    for name in names:
        found = package.resolve(name)
        channels, height, width = found.input_size
        if height != width:
            raise UsageError(found.name, f"its input is {width}x{height}, not square", "Take another model.")
        for p in norms:
            ladder = found.ladders.get(recipe.norm_name(p)) or recipe.default_ladder(p, height, channels)
            chosen = ladder if budgets is None else budgets
            if chosen[-1] > FAR * ladder[-1]:
                doubts.append(
                    f"--eps {chosen[-1]:g} is far beyond the useful range of {found.name} in "
                    f"l{recipe.norm_name(p)}, about {ladder[0]:g} to {ladder[-1]:g}: nearly any picture lies "
                    "within, and the search finds less in it than in a smaller ball"
                )
            question = CounterfactualRequest(
                targets=resolve_targets(target, found),
                p=p,
                eps=chosen,
                steps=steps,
                restarts=restarts,
                seed=seed,
                until=until,
                region=None if region is None else _region(region, height),
                # What is beyond the ladder's end is often missed from the image itself.
                beyond=(ladder[-1],) if chosen[0] > ladder[-1] else (),
            )
            models.append((found, question))
    return PreparedRequest(
        models=tuple(models),
        sources=tuple(_sources(images, out)),
        bit_depth=bit_depth,
        warnings=tuple(doubts),
    )


def resolve_targets(target: str | Sequence[str], spec: Spec) -> tuple[str, ...]:
    """The classes that `target` names: exactly, else whatever the case, else by their number from 0.

    Commas within names are allowed.

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
    if name in QUESTIONS:
        return name
    exact = next((label for label in labels if nfc(label) == nfc(name)), None)
    if exact is not None:
        return exact
    alike = [label for label in labels if nfc(label).casefold() == nfc(name).casefold()]
    if not alike and re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(labels):
        return labels[int(name)]
    return alike[0] if len(alike) == 1 else None


def _unknown_class(name: str, spec: Spec) -> UsageError:
    labels = spec.label_names
    folded = {label.casefold(): label for label in (*labels, *QUESTIONS)}
    near = nearest(name.casefold(), folded, cutoff=0.5)
    hint = f'Did you mean "{folded[near]}"? ' if near else ""
    shown = ", ".join(labels[:60]) + (f" and {len(labels) - 60} more" if len(labels) > 60 else "")
    reason = f"{spec.name} has no such class" if name else "a class name is missing"
    if name.isdecimal():
        reason += f"; numbers go from 0 to {len(labels) - 1}"
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


def _region_told(region: np.ndarray | None) -> dict[str, Any]:
    """A region (H, W), bool, in words of JSON: the box X,Y,W,H around it, in pixels of the model's input, and
    how many pixels are in it.
    """
    if region is None:
        return {}
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
    return {"region": {"box": box, "pixels": int(region.sum())}}


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
            yield Source(path=f"array-{index}", read=functools.partial(encoded, one))
            continue
        ours = _inside(os.fspath(one), out)
        for item in pixels_of.walk([one]):
            file = item.member.file
            if ours is None or not os.path.realpath(file or item.path).startswith(ours):
                kept += 1
                yield Source(path=item.path, read=item.read, file=file)
    if not kept:
        raise SourceError(paths[0], "holds no images but our own answers", "Name the images to explain.")


def _inside(folder: str, out: str | os.PathLike[str] | None) -> str | None:
    """The real path of `out` with a separator behind it, if it lies below `folder`."""
    if out is None or not os.path.isdir(folder):
        return None
    real, root = os.path.realpath(out), os.path.realpath(folder)
    return real + os.sep if os.path.commonpath([real, root]) == root and real != root else None


def encoded(array: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, C) as a PNG. Raises ImageError."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError("array", f"is {array.dtype} {array.shape}", "Pass uint8 (H, W) or (H, W, C).")
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(squeezed)).save(stream, "PNG")
    return stream.getvalue()


def load(source: Source, spec: Spec, bit_depth: int | None = None) -> Picture:
    """Read an image as the model sees it. Raises ImageError."""
    channels, size, _ = spec.input_size
    data = source.read()
    decoded = pixels_of.decode(data, size, channels, name=source.path, bit_depth=bit_depth)
    return Picture(
        path=source.path,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=decoded.pixels,
        notes=decoded.notes,
    )


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files on disk among the sources; those in archives are left out."""
    return [Path(source.file) for source in sources if source.file and os.path.isfile(source.file)]
