"""What is requested of which models for which images, checked before any computation. Loads no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ratioctl import package, recipe
from ratioctl.counterfactuals.epsilons import check_budgets, parse_range
from ratioctl.counterfactuals.region import describe_region, parse_region, photo_box
from ratioctl.counterfactuals.sources import Source, sources_of
from ratioctl.counterfactuals.targets import resolve_targets
from ratioctl.errors import UsageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.scoring.backends import open_explainer

if TYPE_CHECKING:
    from ratioctl.scoring.backends import Explainer

SCHEMA = "ratioctl/counterfactuals/1"
NORMS = {"1": 1.0, "1.5": 1.5, "2": 2.0, "inf": math.inf}
FAR = 3  # ends of a model's ladder; at 4 a search reached 0.21 where the ladder's end reached 0.86


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CounterfactualRequest:
    """What is requested of one model for every image.

    Attributes:
        targets: class names of the model, or "predicted", "second", "all".
        eps: budgets, ascending, in the norm `p`, pixels in [0,1].
        until: the flip radius is where the target's confidence reaches this; None: where it is predicted.
        region: bool (H, W), true where the image may change; None everywhere.
        box: X, Y, W, H of such a region in pixels of each photograph instead.
        threshold: confidence below which the model calls an image OOD; None where it has none.
        extra_radii: radii below all budgets that are searched as well (see `search_target`).
    """

    targets: tuple[str, ...]
    p: float
    eps: tuple[float, ...]
    steps: int
    restarts: int
    seed: int
    until: float | None = None
    region: np.ndarray | None = None
    box: tuple[int, ...] | None = None
    threshold: float | None = None
    extra_radii: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRequest:
    """A checked request: the models, each once per norm with its request, and the images.

    Attributes:
        warnings: about requests that are legal but unlikely to give a useful result.
    """

    models: tuple[tuple[ModelPackage | Explainer, CounterfactualRequest], ...]
    sources: tuple[Source, ...]
    bit_depth: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def header(self) -> dict[str, Any]:
        """The head of counterfactuals.json: everything but images and errors."""
        first = self.models[0][1]
        head: dict[str, Any] = {
            "schema": SCHEMA,
            "norm": recipe.norm_name(first.p),
            "steps": first.steps,
            "restarts": first.restarts,
            "seed": first.seed,
        }
        if first.until is not None:
            head["until"] = first.until
        regions = {id(model): request.region for model, request in self.models}  # the same for all norms
        thresholds = {id(model): request.threshold for model, request in self.models}
        head["models"] = [
            {
                "name": model.name,
                "digest": model.digest,
                "temperature": model.temperature,
                "threshold": thresholds[id(model)],
                "labels": list(model.label_names),
                **describe_region(regions[id(model)]),
            }
            for model in self.packages
        ]
        return head

    @property
    def packages(self) -> tuple[ModelPackage | Explainer, ...]:
        """Every model once."""
        return tuple({id(model): model for model, _ in self.models}.values())

    @property
    def norms(self) -> tuple[float, ...]:
        """Every norm once."""
        return tuple(dict.fromkeys(request.p for _, request in self.models))

    @property
    def cards(self) -> tuple[str | None, ...]:
        """The models' cards in Markdown."""
        return tuple(model.card for model in self.packages)


def prepare(
    images: object,
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
    region_space: str = "input",
    limit: int | None = None,
    bit_depth: int | None = None,
    out: str | os.PathLike[str] | None = None,
    threshold: float | None = None,
) -> PreparedRequest:
    """Check a request as far as possible without reading an image; fast, without torch.

    Args:
        images: files, folders or archives, or images as values (PIL, bytes, arrays, tensors); one or several.
        target: class names (comma-separated, or a list), "predicted", "second" or "all".
        eps: budgets as on the command line ("0.5..3"), a number or numbers; None takes the model's ladder.
        model: package folders, names of bundled models, or files of `ratioctl export --explain`.
        norm: of the ball that bounds the change; several are searched one after the other, each with its
            own ladder.
        until: find the smallest change that reaches this confidence instead of the one that flips.
        region: "X,Y,W,H", a mask image, or a bool array (H, W).
        region_space: what a box counts: pixels of the model's "input", or of the "image" as it is displayed.
        limit: explain at most so many images.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel.
        out: the output folder; images in it are left out of a folder that contains it.
        threshold: confidence below which images are OOD; None takes each model's "tpr95".

    Raises:
        UsageError: an unknown class (the closest is suggested), impossible budgets or numbers.
        SourceError: an image or folder that does not exist. PackageError: a model that cannot be read.
    """
    norms = _norms(norm)
    if len(norms) > 1 and eps is not None:
        reason = "has another meaning in each of the requested norms"
        raise UsageError("--eps", reason, "Leave it out: each norm has its own ladder.")
    budgets = _budgets(eps)
    _check_numbers(steps, restarts, seed, until, limit)
    box = photo_box(region) if region_space == "image" and region is not None else None
    names = [model] if isinstance(model, str | os.PathLike) else list(model)
    if not names:
        raise UsageError("--model", "names no model", "See `ratioctl models`.")
    models, warnings = [], []
    for name in names:
        spec = _open(name, norms, restarts, region is not None)
        mask = None if region is None or box else parse_region(region, spec.frame)
        for p in norms:
            ladder = _ladder(spec, p)
            eps_of_norm = ladder if budgets is None else budgets
            warnings += _far(spec, p, eps_of_norm, ladder)
            request = CounterfactualRequest(
                targets=resolve_targets(target, spec),
                p=p,
                eps=eps_of_norm,
                steps=steps,
                restarts=restarts,
                seed=seed,
                until=until,
                region=mask,
                box=box,
                threshold=spec.thresholds.get("tpr95") if threshold is None else threshold,
                # Searches from the image itself often miss what lies beyond the ladder's end.
                extra_radii=(ladder[-1],) if eps_of_norm[0] > ladder[-1] else (),
            )
            models.append((spec, request))
    return PreparedRequest(
        models=tuple(models),
        sources=tuple(itertools.islice(sources_of(images, out), limit)),
        bit_depth=bit_depth,
        warnings=tuple(warnings),
    )


def _open(
    name: str | os.PathLike[str] | Explainer, norms: list[float], restarts: int, region: bool
) -> ModelPackage | Explainer:
    """The model of that name; raises UsageError for what an ONNX file cannot do."""
    graph = open_explainer(name)
    if graph is None:
        return package.resolve(name)  # type: ignore[arg-type]  # no Explainer
    full = "Use the package it was exported from, which needs torch."
    if norms != [graph.p]:
        known = recipe.norm_name(graph.p)
        raise UsageError(
            f"--norm {', '.join(map(recipe.norm_name, norms))}",
            f"{graph.path.name} was exported for the norm {known}",
            f"Use --norm {known}, or export it again with `--explain --norm`.",
        )
    if restarts > 1:
        raise UsageError(f"--restarts {restarts}", "has no effect on an ONNX file", full)
    if region:
        raise UsageError("--region", "cannot be used with an ONNX file", full)
    return graph


def _norms(norm: str | float | Sequence[str | float]) -> list[float]:
    """The requested norms, each once."""
    given = [norm] if isinstance(norm, str | int | float) else norm
    norms = list(dict.fromkeys(parse_norm(one) for one in given))
    if not norms:
        raise UsageError("--norm", "names no norm", "Known: 2, 1.5, 1, inf.")
    return norms


def _ladder(spec: Spec, p: float) -> tuple[float, ...]:
    """The package's budgets for a norm, else the default ones for its input size."""
    return spec.ladders.get(recipe.norm_name(p)) or recipe.default_ladder(p, spec.frame, spec.input_size[0])


def _far(spec: Spec, p: float, eps: tuple[float, ...], ladder: tuple[float, ...]) -> list[str]:
    """A warning where the largest budget is far beyond the ladder."""
    if eps[-1] <= FAR * ladder[-1]:
        return []
    return [
        f"--eps {eps[-1]:g} is far beyond the useful range of {spec.name} in "
        f"l{recipe.norm_name(p)}, about {ladder[0]:g} to {ladder[-1]:g}: nearly any picture lies "
        "within, and the search finds less in it than in a smaller ball"
    ]


def _check_numbers(steps: int, restarts: int, seed: int, until: float | None, limit: int | None) -> None:
    if steps < 1 or restarts < 1:
        raise UsageError("steps and restarts", "must be at least 1", "The defaults are 500 and 1.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}", "must be positive", "For example --limit 20.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed}", "is not between 0 and 2^63 - 1", "The default is 0.")
    if until is not None and not 0 < until < 1:
        raise UsageError(f"--until {until:g}", "is not a confidence between 0 and 1", "For example 0.9.")


def parse_norm(norm: str | float) -> float:
    """The exponent p of a norm's name or number. Raises UsageError."""
    name = norm.strip().lower().removeprefix("l") if isinstance(norm, str) else f"{norm:g}"
    if name not in NORMS:
        raise UsageError(f"--norm {norm}", "is unknown", "Use 2, 1.5, 1 or inf, also with an l in front.")
    return NORMS[name]


def _budgets(eps: str | float | Sequence[float] | None) -> tuple[float, ...] | None:
    if eps is None:
        return None
    if isinstance(eps, str):
        return parse_range(eps)
    return check_budgets([eps] if isinstance(eps, int | float) else list(eps), "eps")
