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

    import numpy as np
    import torch

    from ratioctl.calibrate import Calibrated
    from ratioctl.package import ModelPackage
    from ratioctl.results import Explanation, ScoreRow
    from ratioctl.score import Model

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


def ood_score(
    paths: Iterable[Path] | Path,
    *,
    model: Path | ModelPackage = DEFAULT_MODEL,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    worst_case: float | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Iterator[ScoreRow]:
    """Score images, one row each, in their order; an image that cannot be read is a row with `error`.

    Args:
        paths: images, folders, archives, or "-" for a list of paths on stdin.
        model: a package, a bundled model or an exported `.onnx` file. torch is imported only for a package
            without `model.onnx`, for `worst_case`, and for a GPU.
        threshold: a stored name, or a confidence in [0,1]; below it an image is out of distribution.
        probabilities: fill in `ScoreRow.probabilities`.
        worst_case: l2 radius; fill in the highest confidence found in that ball.

    Raises (at once, not at the first row): see `ratioctl.score.ood_score`.
    """
    from ratioctl.score import ood_score as run

    opened = _scoring_model(model, device=device, worst_case=worst_case, seed=seed)
    return run(paths, opened, threshold=threshold, probabilities=probabilities)


def _scoring_model(
    model: Path | ModelPackage, *, device: str = "auto", worst_case: float | None = None, seed: int = 0
) -> Model:
    """The model as `ratioctl.score` takes it: with onnxruntime where that will do, else with torch."""
    import os
    import threading

    from ratioctl import package as packages
    from ratioctl import runtime
    from ratioctl.errors import UsageError
    from ratioctl.score import Model

    if worst_case is not None and not 0 <= worst_case < float("inf"):
        raise UsageError(f"--worst-case {worst_case}", "is no radius", "Give a number of at least 0.")
    gpu = device.startswith("cuda")
    if isinstance(model, packages.ModelPackage):
        found = model
    else:
        if os.fspath(model).endswith(".onnx") and not os.path.isdir(model):
            if worst_case is not None:
                step = "Give the package it was exported from."
                raise UsageError("--worst-case", "needs a package: an ONNX file has no gradients", step)
            # One thread each: `score` predicts several batches at once.
            alone = runtime.load(model, threads=1, device=device if gpu else "cpu")
            return Model(spec=alone.spec, predict=alone.predict, road="onnx", parallel=True)
        found = packages.read(packages.find(model))
    if found.onnx_path is not None and worst_case is None and not gpu:
        inside = runtime.load(found, threads=1)
        return Model(spec=found, predict=inside.predict, road="onnx", parallel=True)

    from ratioctl.nets.hardware import choose
    from ratioctl.nets.predict import predictor

    network = predictor(found, choose(device, "fp32").device)
    turn = threading.Lock()  # torch spreads one batch over all processors; the others decode meanwhile

    def predict(images: np.ndarray) -> np.ndarray:
        with turn:
            return network.predict(images)

    if worst_case is not None:
        raise UsageError("--worst-case", "is not in this version yet", "")
    return Model(spec=found, predict=predict, road="torch", parallel=False)


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
