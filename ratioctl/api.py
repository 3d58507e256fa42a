"""The commands of the command line as functions, with the same names, options and defaults.

Each function imports what it needs when it is called, so that this module is cheap to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from ratioctl.calibration.calibrate import Calibrated
    from ratioctl.onnx.export import Exported
    from ratioctl.package import ModelPackage
    from ratioctl.types import Explanation, Report, ScoreRow

    Path = str | PathLike[str]


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    init: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int | None = None,
    download: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> ModelPackage:
    """Train a recipe, package it and calibrate it on the recipe's held-out split.

    Args:
        recipe: a TOML file or the name of a bundled recipe.
        out: the run folder; default runs/<recipe name>.
        settings: "key=value" each, as `--set`.
        resume: continue from the run folder's checkpoint.
        init: a model whose weights are the start.
        seed: replaces the recipe's seed; None keeps it.
        callback: called with progress events, see `ratioctl.training.loop.fit`.
    """
    import pathlib

    from ratioctl import package as packages
    from ratioctl import recipe as recipes
    from ratioctl.calibration.calibrate import calibrate as calibrate_package
    from ratioctl.training.loop import fit

    loaded = recipes.load(str(recipe), [*settings, *([] if seed is None else [f"seed={seed}"])])
    folder = pathlib.Path(out) if out is not None else pathlib.Path("runs") / loaded.name
    start = None if init is None else packages.resolve(init)
    package = fit(
        loaded,
        folder,
        resume=resume,
        init=start,
        device=device,
        precision=precision,
        download=download,
        callback=callback,
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
    """Choose temperature and thresholds on held-out data; see `ratioctl.calibration.calibrate.calibrate`."""
    import pathlib

    from ratioctl.calibration.calibrate import calibrate as run

    target = None if out is None else pathlib.Path(out)
    return run(model, data=data, objective=objective, out=target, device=device, download=download)


def evaluate(
    *models: Path | ModelPackage,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    suite: str = "quick",
    limit: int | None = None,
    resume: bool = False,
    write: bool = False,
    out: Path | None = None,
    backend: Literal["own", "reference"] | None = None,
    save_adversarial: bool = False,
    judge: Path | ModelPackage | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Report | tuple[Report, ...]:
    """Measure accuracy, robustness, calibration and OOD detection; see `ratioctl.evaluation.run`.

    Args:
        models: package folders or names of bundled models; none means the default one.
        ood: "NAME=SOURCE" each, or a mapping; none means the built-in noise.
        out: also write the reports there, and continue what was interrupted there.
        backend: of the robust accuracy: pyautoattack ("reference") or our own engine; None takes the suite's.
        save_adversarial: also keep the attacked images, in `out`/adversarial.
        judge: of the suite "explanations": another model that says how much of the target it sees.
        watch: called with progress events.

    Returns:
        A Report for one model, a tuple of them for several.
    """
    import pathlib

    from ratioctl.report import evaluation as evaluation_report

    run: Any
    if suite == "explanations":
        from ratioctl.evaluation.explanations import run

        own: dict[str, Any] = {"judge": judge}
    else:
        from ratioctl.evaluation import run

        own = {"suite": suite, "backend": backend, "save_adversarial": save_adversarial}
    folder = None if out is None else pathlib.Path(out)
    found = run(
        [model if hasattr(model, "config") else str(model) for model in models],  # type: ignore[misc]
        data=data,
        ood=ood,
        limit=limit,
        resume=resume,
        write=write,
        out=folder,
        **own,
        device=device,
        precision=precision,
        seed=seed,
        download=download,
        callback=callback,
        finish=None if folder is None else lambda done: evaluation_report.write(done, folder),
    )
    reports = tuple(model.report for model in found.models)
    return reports[0] if len(reports) == 1 else reports


def counterfactual(
    images: Any,
    *,
    target: str | Sequence[str],
    eps: str | float | Sequence[float] | None = None,
    model: Path | Sequence[Path] = DEFAULT_MODEL,
    norm: str | float | Sequence[str | float] = "2",
    steps: int = 500,
    restarts: int = 1,
    seed: int = 0,
    until: float | None = None,
    region: Any = None,
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
) -> list[Explanation]:
    """Show how images would have to change for a model to see another class.

    Args:
        images: files, folders or archives, or uint8 arrays (H, W) or (H, W, C); one or several.
        target: class names (comma-separated, or a list), "predicted", "second" or "all".
        eps: budgets as on the command line ("0.5..3"), a number or numbers; None takes the model's ladder.
        model: package folders or names of bundled models.
        norm: of the ball in which the change stays: "2", "1.5", "1" or "inf"; or several of them to compare.
        until: look for the smallest change that reaches this confidence, not for the one that flips.
        region: "X,Y,W,H" in pixels of the model's input, a mask image, or a bool array (H, W).
        out: also write there what `ratioctl counterfactual` writes.
    Returns:
        One explanation for each model, norm and image, in that order.
    Raises:
        UsageError, SourceError, PackageError; ImageError for the first image that cannot be read.
    """
    from ratioctl import counterfactuals

    prepared = counterfactuals.prepare(
        images,
        target=target,
        eps=eps,
        model=model,
        norm=norm,
        steps=steps,
        restarts=restarts,
        seed=seed,
        until=until,
        region=region,
        out=out,
    )
    answers = counterfactuals.explain(prepared, device=device, precision=precision)
    if out is None:
        return list(answers)

    from ratioctl.report import counterfactual_files as report

    return report.write_counterfactuals(
        out, prepared.header, answers, inputs=counterfactuals.files_of(prepared.sources)
    )


def ood_score(
    paths: Iterable[Path] | Path,
    *,
    model: Path | ModelPackage = DEFAULT_MODEL,
    threshold: str | float = "tpr95",
    probabilities: bool = False,
    worst_case: float | None = None,
    device: str = "auto",
    precision: str = "auto",
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
        precision: of that search, "fp32" or "bf16"; "auto" is fp32. Confidences are always fp32.

    Raises (at once, not at the first row): see `ratioctl.scoring.pipeline.ood_score`.
    """
    from ratioctl.scoring.backends import open_model
    from ratioctl.scoring.pipeline import ood_score as run

    opened = open_model(
        model, threshold, device=device, precision=precision, worst_case=worst_case, seed=seed
    )
    return run(paths, opened, threshold=threshold, probabilities=probabilities)


def export(
    model: Path | ModelPackage = DEFAULT_MODEL,
    *,
    output: Path | None = None,
    input_type: Literal["float", "uint8"] = "float",
    threshold: str | float = "tpr95",
    int8: bool = False,
    layout: Literal["file", "triton", "kserve"] = "file",
    opset: int | None = None,
    data: str | None = None,
    download: bool = False,
) -> Exported:
    """Write an ONNX file that flags by itself what it does not know; see `ratioctl.export.export`."""
    from ratioctl.onnx.export import export as run

    return run(
        model,
        output=output,
        input_type=input_type,
        threshold=threshold,
        int8=int8,
        layout=layout,
        opset=opset,
        data=data,
        download=download,
    )


def load_model(model: Path = DEFAULT_MODEL, *, device: str = "cpu") -> torch.nn.Module:
    """The model's network in eval mode: pixels (N, C, H, W) in [0,1] -> logits (N, K) before temperature.

    Its package's config is `.config`. Raises PackageError as `ratioctl.package.read`.
    """
    from ratioctl import package as packages
    from ratioctl.models import from_package

    return from_package(packages.resolve(model), device)
