"""Image classifiers that can be trusted and questioned.

The verbs of the command line are functions here, with the same names, options and defaults; importing this
module is light, each verb imports what it needs when it is called:

    import ratioctl

    package = ratioctl.train("digits-ratio")
    ratioctl.counterfactual(["cat.jpg"], target="dog", eps="0.5..3", model="cifar10-ratio")
    model = ratioctl.load_model("cifar10-ratio")    # pixels (N, C, H, W) in [0,1] -> logits (N, K)
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from ratioctl.calibrate import Calibrated
    from ratioctl.package import ModelPackage
    from ratioctl.results import Explanation, ScoreRow

    Path = str | PathLike[str]

__version__ = "0.1.0"
__all__ = [
    "calibrate",
    "counterfactual",
    "evaluate",
    "export",
    "load_model",
    "ood_score",
    "train",
]

DEFAULT_MODEL = "cifar10-ratio"


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    init: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> ModelPackage:
    """Train a recipe, package it and calibrate it on the recipe's held-out split.

    Args:
        recipe: a TOML file or the name of a bundled recipe.
        out: the run folder; default runs/<recipe name>.
        settings: "key=value" each, as `--set`.
        resume: continue from the run folder's checkpoint.
        init: a model whose weights are the start.
        seed: replaces the recipe's where it is not 0.
        watch: called with progress events, see `ratioctl.train.fit`.
    """
    import pathlib

    from ratioctl import package as packages
    from ratioctl import recipe as recipes
    from ratioctl.calibrate import calibrate as calibrate_package
    from ratioctl.train import fit

    loaded = recipes.load(str(recipe), [*settings, *([f"seed={seed}"] if seed else [])])
    folder = pathlib.Path(out) if out is not None else pathlib.Path("runs") / loaded.name
    start = None if init is None else packages.read(packages.find(str(init)))
    package = fit(
        loaded,
        folder,
        resume=resume,
        init=start,
        device=device,
        precision=precision,
        download=download,
        watch=watch,
    )
    return calibrate_package(package, device=device, download=download).package


def calibrate(
    model: Path | ModelPackage = DEFAULT_MODEL,
    *,
    data: str | None = None,
    objective: Literal["ece", "nll"] | None = None,
    out: Path | None = None,
    device: str = "auto",
    download: bool = False,
) -> Calibrated:
    """Choose temperature and thresholds on held-out data; see `ratioctl.calibrate.calibrate`."""
    import pathlib

    from ratioctl.calibrate import calibrate as run

    target = None if out is None else pathlib.Path(out)
    chosen = model if not isinstance(model, str) and hasattr(model, "config") else str(model)
    return run(chosen, data=data, objective=objective, out=target, device=device, download=download)  # type: ignore[arg-type]


def evaluate(*models: Path, **options: Any) -> Any:
    """Measure models; see `ratioctl.evaluate.evaluate`."""
    from ratioctl.evaluate import evaluate as run

    return run(*models, **options)


def counterfactual(images: Any, **options: Any) -> list[Explanation]:
    """Show how images would have to change for a model to see another class.

    See `ratioctl.explain.counterfactual` for the options.
    """
    from ratioctl.explain import counterfactual as run

    return run(images, **options)


def ood_score(paths: Iterable[Path] | Path, **options: Any) -> Iterator[ScoreRow]:
    """Score images, one row each; see `ratioctl.score.ood_score` for the options."""
    from ratioctl.score import ood_score as run

    return run(paths, **options)


def export(model: Path = DEFAULT_MODEL, **options: Any) -> Any:
    """Write an ONNX file; see `ratioctl.export.export` for the options."""
    from ratioctl.export import export as run

    return run(model, **options)


def load_model(model: Path = DEFAULT_MODEL, *, device: str = "cpu") -> torch.nn.Module:
    """The model's network in eval mode: pixels (N, C, H, W) in [0,1] -> logits (N, K) before temperature.

    Its package's config is `.config`. Raises PackageError as `ratioctl.package.read`.
    """
    from ratioctl import package as packages
    from ratioctl.nets import from_package

    return from_package(packages.read(packages.find(str(model))), device)


class _Verbs(types.ModuleType):
    """Keeps `ratioctl.train` the function when the module `ratioctl.train` is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Verbs
