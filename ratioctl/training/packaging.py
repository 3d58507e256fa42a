"""From a finished run to its package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl._version import __version__
from ratioctl.data import loader
from ratioctl.data.in_distribution import Images
from ratioctl.errors import UsageError
from ratioctl.images.cache import CACHE_FROM_BYTES, remembered
from ratioctl.recipe import Recipe
from ratioctl.training.checkpoint import State, final_weights


class Normalized(Protocol):
    """A start of training: weights that belong to a normalization."""

    @property
    def name(self) -> str: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...


def normalization(
    recipe: Recipe, train: Images, init: Normalized | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation: the recipe's, else the start's, else the training pixels'.

    Raises:
        UsageError: the recipe states another normalization than that of the start's weights.
    """
    stated = None
    if recipe.model.mean is not None and recipe.model.std is not None:
        stated = recipe.model.mean, recipe.model.std
    if init is not None:
        if stated is not None and stated != (tuple(init.mean), tuple(init.std)):
            raise UsageError(
                f"--init {init.name}",
                f"its weights expect mean {init.mean} and std {init.std}, the recipe states mean {stated[0]} "
                f"and std {stated[1]}",
                "Remove model.mean and model.std from the recipe.",
            )
        return tuple(init.mean), tuple(init.std)
    if stated is not None:
        return stated
    pixels = train.pixels
    if pixels.nbytes < CACHE_FROM_BYTES:
        return _statistics(pixels)
    known = remembered(["normalization", train.fingerprint], lambda: _statistics(pixels))
    return tuple(known[0]), tuple(known[1])


def _statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation, rounded to four digits."""
    channels = pixels.shape[-1]
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    step = max(1, (1 << 22) // int(np.prod(pixels.shape[1:3])))
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step].reshape(-1, channels).astype(np.float64) / 255
        count, total, squares = count + len(part), total + part.sum(0), squares + (part**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def architecture_options(recipe: Recipe) -> dict[str, Any]:
    """The architecture's options, those that are set."""
    model = recipe.model
    options = {"width": model.width, "stem_stride": model.stem_stride, **(model.options or {})}
    return {name: value for name, value in options.items() if value is not None}


def _objective(recipe: Recipe) -> dict[str, Any]:
    """The terms that were trained."""
    unused = {"inside"} if recipe.objective.certified is not None else set()
    return recipe.objective.model_dump(mode="json", exclude_none=True, exclude=unused)


def _certified(recipe: Recipe) -> dict[str, Any]:
    """What a certified head guarantees, as ONNX files state it too."""
    spec = recipe.objective.certified
    if spec is None:
        return {}
    statement = (
        f"For every image x and every image z with all pixels in [0,1] and |z - x|_inf <= {spec.eps:g}, the "
        "confidence of z is at most the guaranteed confidence of x. The bound is computed by interval "
        "arithmetic; it holds for this network in float32 and not for quantized copies."
    )
    return {"certified": {"norm": "inf", "eps": spec.eps, "statement": statement}}


def write_package(
    recipe: Recipe,
    state: State,
    splits: loader.Splits,
    path: Path,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    leaks: dict[str, int],
) -> packages.ModelPackage:
    """Write the selected weights as a package that is not calibrated."""
    weights = {k: v.detach().cpu().contiguous() for k, v in (state.best or final_weights(state)).items()}
    data, evaluation = recipe.data, recipe.evaluation
    ladders = {
        recipes.norm_name(p): list(
            evaluation.ladders.get(recipes.norm_name(p))  # type: ignore[call-overload]
            or recipes.default_ladder(p, data.frame, data.channels)
        )
        for p in recipes.NORMS
    }
    config = {
        "architecture": recipe.model.architecture,
        "architecture_options": architecture_options(recipe),
        "num_classes": len(splits.train.label_names),
        "label_names": list(splits.train.label_names),
        "pretrained_cfg": {
            "input_size": [data.channels, data.frame.height, data.frame.width],
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            **({"crop_mode": "border"} if data.frame.pad else {}),
        },
        "ratio": {
            "temperature": 1.0,
            "thresholds": {},
            "ladders": ladders,
            **({} if data.bit_depth is None else {"bit_depth": data.bit_depth}),
            "objective": _objective(recipe),
            **_certified(recipe),
            "metrics": {},
            "provenance": _provenance(recipe, state, splits, leaks),
        },
    }
    return packages.write(
        path, config=config, weights=save_tensors(weights), recipe_text=recipes.dumps(recipe)
    )


def _provenance(recipe: Recipe, state: State, splits: loader.Splits, leaks: dict[str, int]) -> dict[str, Any]:
    data = recipe.data
    fingerprints = {
        "train_source": splits.source_fingerprint,
        "train": splits.train.fingerprint,
        "held_out": splits.held_out.fingerprint,
    }
    if splits.outside is not None:
        fingerprints["outside"] = splits.outside.fingerprint
    if splits.outside_test is not None:
        fingerprints["outside_test"] = splits.outside_test.fingerprint
    return {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "data": fingerprints,
        "sources": {
            "train": data.train,
            "outside": list(data.outside) if splits.outside is not None else [],
        },
        "images": {
            "train": len(splits.train),
            "held_out": len(splits.held_out),
            "outside": 0 if splits.outside is None else len(splits.outside),
        },
        "leaks": leaks,
        "seed": recipe.seed,
        "updates": state.update,
        "selected_update": state.best_update,
        "validation_score": state.best_score,
        "init": state.init,
        **({"max_time": state.time_limit[-1]} if state.time_limit else {}),
        "versions": {
            "ratioctl": __version__,
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),
        },
    }
