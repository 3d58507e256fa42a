"""The commands of the command line as functions, with the same names, options and defaults.

Each function imports what it needs when it is called, so that this module is cheap to import. Errors are
those of the command line (`ratioctl.errors`) and name parameters where those name options.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from ratioctl.errors import RatioctlError, UsageError
from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from ratioctl.calibration.calibrate import Calibrated
    from ratioctl.models.packaging import Packaged
    from ratioctl.onnx.export import Exported
    from ratioctl.package import ModelPackage
    from ratioctl.scoring.sources import Images
    from ratioctl.types import Explanation, Report, ScoreRow

    Path = str | PathLike[str]

P = ParamSpec("P")
T = TypeVar("T")

_PARAMETER_OF = {
    "set": "settings",
    "input": "input_type",
    "arch_option": "arch_options",
}  # options whose parameter has another name
_TEXT = (str, os.PathLike)
_NUMBER = (int, float)
# What these parameters may be, checked here because they would fail far from the caller: types of a single
# value, whether a sequence of them is accepted too, and how a message describes that.
_ACCEPTED: dict[str, tuple[tuple[type, ...], bool, str]] = {
    "recipe": (_TEXT, False, "a TOML file or the name of a bundled recipe"),
    "model": (_TEXT, True, "a package folder, the name of a bundled model or a package"),
    "target": ((str,), True, "a class name or a list of them"),
    "eps": ((str, *_NUMBER), True, 'a number, numbers or a range such as "0.5..3"'),
    "norm": ((str, *_NUMBER), True, '"2", "1.5", "1" or "inf"'),
    "threshold": ((str, *_NUMBER), False, '"tpr95", "tpr99" or a number'),
    "data": ((str,), False, "a folder, an archive or a named data set"),
    "worst_case": (_NUMBER, False, "a radius above 0"),
    "until": (_NUMBER, False, "a confidence between 0 and 1"),
    "out": (_TEXT, False, "a folder"),
    "weights": (_TEXT, False, "a .safetensors, .pt or .pth file"),
    "arch": ((str,), False, "the name of an architecture"),
    "labels": (_TEXT, True, "class names, or a file that holds one a line"),
    "mean": (_NUMBER, True, "a number for each channel, for pixels in [0,1]"),
    "std": (_NUMBER, True, "a number for each channel, for pixels in [0,1]"),
}


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """Check the types of arguments, and report faults in terms of Python.

    Raises:
        UsageError: an argument of a type in which `function` cannot use it, or a package that is not
            installed.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check_type(name, value, signature.parameters[name].default)
        try:
            return function(*args, **kwargs)
        except ImportError as error:
            from ratioctl.utils.optional import missing_package

            missing = missing_package(error, f"ratioctl.{function.__name__}")
            if missing is None:
                raise
            raise missing from error
        except RatioctlError as error:
            for part in ("thing", "reason", "next_step"):
                setattr(error, part, _with_parameters(getattr(error, part), signature.parameters))
            raise

    return checked


def _check_type(name: str, value: object, default: object) -> None:
    if name not in _ACCEPTED or value is default or hasattr(value, "config"):
        return
    kinds, several, described = _ACCEPTED[name]
    values = (
        list(value) if several and isinstance(value, Sequence) and not isinstance(value, str) else [value]
    )
    if hasattr(value, "tolist"):  # a NumPy number or array
        return
    wrong = [one for one in values if not isinstance(one, kinds) and not hasattr(one, "config")]
    if wrong:
        kind = type(wrong[0]).__name__
        raise UsageError(name, f"cannot be a value of type {kind}", f"Give {described}.")


def _with_parameters(text: str, known: Mapping[str, object]) -> str:
    """`text` with the options that are parameters here written as these: "--worst-case" as "worst_case"."""

    def replaced(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        name = _PARAMETER_OF.get(name, name)
        return name if name in known else option[0]

    return re.sub(r"(?<!\S)--([a-z][a-z0-9-]*)", replaced, text)


@verb
def train(
    recipe: Path,
    *,
    out: Path | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    init: Path | None = None,
    max_time: str | float | None = None,
    log: str | Sequence[str] = (),
    device: str = "auto",
    precision: str = "auto",
    seed: int | None = None,
    download: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> ModelPackage:
    """Train a recipe, package it and calibrate it on the recipe's held-out split.

    Args:
        recipe: a TOML file, the name of a bundled recipe, or a labelled SOURCE of photographs, for which a
            recipe is chosen as `ratioctl init` does.
        out: the run folder; default runs/<recipe name>.
        settings: "key=value" each, as `--set`.
        resume: continue from the run folder's checkpoint.
        init: weights to start from: a model, or `timm:NAME[=WEIGHTS]` or `torchvision:NAME[=WEIGHTS]`.
        max_time: shorten the schedule to end within this time, such as "8m" or "1h30m", or seconds.
        log: "tensorboard", "mlflow" and "wandb", where metrics are recorded besides metrics.jsonl.
        seed: replaces the recipe's seed; None keeps it.
        callback: called with progress events, see `ratioctl.training.loop.fit`.
    """
    import pathlib
    import time

    from ratioctl.utils.durations import seconds_of

    began = time.monotonic()
    limit = None if max_time is None else seconds_of(max_time, "max_time")
    from ratioctl import package as packages
    from ratioctl.calibration.calibrate import calibrate as calibrate_package
    from ratioctl.training import starts
    from ratioctl.training.distributed import joined
    from ratioctl.training.loop import fit
    from ratioctl.training.photographs import recipe_of
    from ratioctl.training.trackers import Trackers

    with joined(device) as processes:
        again = resume or processes.restarts > 0
        loaded, folder, _, start = processes.everywhere(
            lambda: recipe_of(
                str(recipe),
                [*settings, *([] if seed is None else [f"seed={seed}"])],
                None if out is None else pathlib.Path(out),
                start=None if init is None else starts.resolve(init, download=download),
                resume=again,
                download=download,
            ),
            in_turn=True,
        )
        with Trackers(log if processes.first else (), folder, loaded, callback) as events:
            package = fit(
                loaded,
                folder,
                resume=again,
                init=start,
                max_time=limit,
                began=began,
                device=device,
                precision=precision,
                download=download,
                callback=events,
                processes=processes,
            )
        where = processes.device(device)
        processes.together(
            lambda: str(calibrate_package(package, device=where, download=download).package.path)
        )
        return packages.read(package.path)


@verb
def calibrate(
    model: Path | ModelPackage = DEFAULT_MODEL,
    *,
    data: str | None = None,
    objective: Literal["ece", "nll"] | None = None,
    out: Path | None = None,
    score: str | None = None,
    ood: Sequence[str] | Mapping[str, str] = (),
    thresholds: Sequence[str] | Mapping[str, str] = (),
    per_class: bool = False,
    keep_temperature: bool = False,
    weights: Literal["fp16"] | None = None,
    device: str = "auto",
    download: bool = False,
) -> Calibrated:
    """Choose temperature and thresholds on held-out data; see `ratioctl.calibration.calibrate.calibrate`."""
    import pathlib

    from ratioctl.calibration.calibrate import calibrate as run

    target = None if out is None else pathlib.Path(out)
    return run(
        model,
        data=data,
        objective=objective,
        out=target,
        score=score,
        ood=ood,
        thresholds=thresholds,
        per_class=per_class,
        keep_temperature=keep_temperature,
        weights=weights,
        device=device,
        download=download,
    )


@verb
def evaluate(
    *models: Path | ModelPackage,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    suite: str = "quick",
    protocol: str | None = None,
    limit: int | None = None,
    resume: bool = False,
    write: bool = False,
    out: Path | None = None,
    backend: Literal["own", "reference"] | None = None,
    save_adversarial: bool = False,
    judge: Path | ModelPackage | None = None,
    score: Sequence[str] = (),
    certified: bool = False,
    shard: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> list[Report]:
    """Measure accuracy, robustness, calibration, OOD detection, or the quality of explanations.

    Args:
        models: package folders or names of bundled models; none means the default one.
        ood: "NAME=SOURCE" each, or a mapping; empty means the built-in noise sets.
        suite: "clean" (no attacks), "quick", "paper", "full" or "explanations".
        protocol: a published protocol instead: "robustbench-l2", "robustbench-linf", "paper", "good", "atd"
            or "openood".
        out: also write the reports there, and continue a run that was interrupted there.
        backend: of the robust accuracy: "reference" (pyautoattack) or "own"; None uses the suite's.
        save_adversarial: also save the attacked images in `out`/adversarial.
        score: names of further OOD scores to measure, each under its own worst-case attack.
        certified: measure the confidence on OOD images that the models' certified heads guarantee.
        judge: suite "explanations": a second model that scores the counterfactuals.
        shard: "I/N": compute part I of N into `out`, for `ratioctl merge`.
        callback: called with progress events, see `ratioctl.evaluation.run`.

    Returns:
        One Report per model, in the order of `models`; none for a shard.

    Raises:
        UsageError: also for an option that has no effect in the suite.
        SourceError, PackageError, OutputError: see `ratioctl.evaluation.run`.
    """
    import pathlib

    from ratioctl.evaluation import run
    from ratioctl.report import evaluation_files

    folder = None if out is None else pathlib.Path(out)
    if folder is not None:
        evaluation_files.refuse_foreign(folder)
    found = run(
        [model if hasattr(model, "config") else str(model) for model in models],  # type: ignore[misc]
        data=data,
        ood=ood,
        limit=limit,
        resume=resume,
        write=write,
        out=folder,
        suite=suite,
        protocol=protocol,
        backend=backend,
        save_adversarial=save_adversarial,
        score=score,
        certified=certified,
        shard=shard,
        judge=judge if judge is None or hasattr(judge, "config") else str(judge),  # type: ignore[arg-type]
        device=device,
        precision=precision,
        seed=seed,
        download=download,
        callback=callback,
        finish=None if folder is None else lambda done: evaluation_files.write(done, folder),
    )
    return [model.report for model in found.models]


@verb
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
    region_space: Literal["input", "image"] = "input",
    limit: int | None = None,
    bit_depth: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
) -> list[Explanation]:
    """Show how images must change for a model to predict another class.

    Args:
        images: files, folders or archives, or images as values, see `ood_score`; one or several.
        target: class names (comma-separated, or a list), "predicted", "second" or "all".
        eps: budgets as on the command line ("0.5..3"), a number or numbers; None takes the model's ladder.
        model: package folders, names of bundled models, or files of `export(..., explain=True)`, which are
            searched by onnxruntime: torch is not imported.
        norm: of the ball in which the change stays: "2", "1.5", "1" or "inf"; or several of them to compare.
        until: look for the smallest change that reaches this confidence, not for the one that flips.
        region: "X,Y,W,H", a mask image, or a bool array (H, W).
        region_space: what a box counts: pixels of the model's "input", or of the "image" as it is displayed.
        limit: explain at most so many images.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel.
        out: also write there what `ratioctl counterfactual` writes.

    Returns:
        One explanation for each model, norm and image, in that order.

    Raises:
        UsageError: a value that has no effect or no meaning here.
        SourceError: no images.
        PackageError: a model that cannot be read.
        ImageError: the first image that cannot be read.
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
        region_space=region_space,
        limit=limit,
        bit_depth=bit_depth,
        out=out,
    )
    explanations = counterfactuals.explain(prepared, device=device, precision=precision)
    if out is None:
        return list(explanations)

    from ratioctl.report import counterfactual_files as report

    return report.write_counterfactuals(
        out, prepared.header, explanations, inputs=counterfactuals.files_of(prepared.sources)
    )


@verb
def ood_score(
    paths: Images,
    *,
    model: Path | ModelPackage = DEFAULT_MODEL,
    threshold: str | float = "tpr95",
    score: str | None = None,
    probabilities: bool = False,
    explain: bool = False,
    checks: bool = False,
    limit: int | None = None,
    bit_depth: int | None = None,
    worst_case: float | None = None,
    certified: bool = False,
    shard: str | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
) -> Iterator[ScoreRow]:
    """Score images, one row each, in their order; an image that cannot be read is a row with `error`.

    Args:
        paths: images, folders, archives, or "-" for a list of paths on stdin; or PIL images, encoded bytes,
            uint8 arrays (H, W, C) or (N, H, W, C), or float arrays or tensors (C, H, W) or (N, C, H, W) in
            [0,1]; one or several. Rows of the latter have the paths "image-0", "image-1", ...
        model: a package, a bundled model or an exported `.onnx` file. torch is imported only for a package
            without `model.onnx`, for `worst_case`, and for a GPU.
        threshold: a stored name, or a confidence in [0,1]; below it an image is out of distribution. For
            another score than "msp" the value of the score above which it is.
        score: name of the OOD score, see `ratioctl.scores`; None takes the model's own.
        probabilities: fill in `ScoreRow.probabilities`.
        explain: fill in the fields of `ScoreRow` that it lists under this name.
        checks: likewise.
        limit: score the first so many images only.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel.
        worst_case: l2 radius; fill in the highest confidence found in that ball.
        certified: fill in `ScoreRow.guaranteed_confidence`, which needs a model with a certified head.
        engine: "ray" computes the same rows on a Ray cluster, in any order, see
            `ratioctl.scoring.ray_engine`.
        workers: threads, or actors of Ray's.
        shard: "I/N": score part I of N only, chosen by the hash of the path; fills in `ScoreRow.index`.
        precision: of that search, "fp32" or "bf16"; "auto" is fp32. Confidences are always fp32.

    Raises (at once, not at the first row): see `ratioctl.scoring.pipeline.ood_score`.
    """
    from ratioctl.scoring.backends import open_model
    from ratioctl.scoring.listing import Listing
    from ratioctl.scoring.pipeline import ood_score as run
    from ratioctl.utils.sharding import Shard

    listing = None if shard is None else Listing(Shard.parse(shard))
    scored: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "explain": explain}
    scored |= {"checks": checks, "bit_depth": bit_depth}
    how: dict[str, Any] = {"device": device, "precision": precision, "worst_case": worst_case}
    how |= {"certified": certified, "seed": seed, "score": score}
    if engine == "ray":
        import itertools

        from ratioctl.scoring import ray_engine

        found = ray_engine.run(paths, model, limit=limit, workers=workers, shard=shard, **scored, **how)
        return itertools.chain.from_iterable(found)
    opened = open_model(model, threshold, **how)
    return run(paths, opened, limit=limit, listing=listing, workers=workers, **scored)


@verb
def export(
    model: Path | ModelPackage = DEFAULT_MODEL,
    *,
    output: Path | None = None,
    input_type: Literal["float", "uint8"] = "float",
    threshold: str | float = "tpr95",
    int8: bool = False,
    weights: Literal["fp32", "fp16"] | None = None,
    layout: str = "file",
    opset: int | None = None,
    threshold_input: bool = False,
    explain: bool = False,
    norm: str | float = "2",
    data: str | None = None,
    download: bool = False,
) -> Exported:
    """Write an ONNX file that computes the OOD flag itself, or with `explain` counterfactuals.

    See `ratioctl.onnx.export.export`.
    """
    from ratioctl.onnx.export import export as run

    return run(
        model,
        output=output,
        input_type=input_type,
        threshold=threshold,
        int8=int8,
        weights=weights,
        layout=layout,
        opset=opset,
        threshold_input=threshold_input,
        explain=explain,
        norm=norm,
        data=data,
        download=download,
    )


@verb
def package_checkpoint(
    weights: Path,
    *,
    arch: str,
    labels: Path | Sequence[str],
    out: Path,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | str | None = None,
    resize: Literal["crop", "pad"] = "crop",
    data: str | None = None,
    arch_options: Sequence[str] = (),
    ema: bool | None = None,
    force: bool = False,
    download: bool = False,
) -> Packaged:
    """Make a package of a classifier trained elsewhere: the command `ratioctl package`.

    Args:
        weights: a .safetensors file, or a .pt/.pth state dict. It is read with `weights_only=True`.
        arch: "resnet18", ..., "torchvision:NAME" or "timm:NAME".
        labels: class names in the order of the outputs, or a file that holds one a line.
        out: the package folder to write.
        mean: of the normalization, pixels in [0,1], one number for each channel or for all; needed unless
            the checkpoint holds it.
        std: likewise.
        resize: "crop" cuts images of another shape around the center, "pad" pads them with black.
        input_size: side of the input in pixels, or "HEIGHTxWIDTH". Networks of libraries need it unless
            their weights fit one size only; the default of ours is 32.
        data: images to check the normalization and the labels on.
        arch_options: "KEY=VALUE" each, options of the network that its weights do not determine.
        ema: take the averaged (EMA) weights where the file has both; None takes the plain ones and says so.
        force: replace a package that `out` holds.

    Returns:
        `package`, which is not calibrated, `notes`, `warnings`, and what `data` says (`checked`).

    Raises: see `ratioctl.models.packaging.package_checkpoint`. Nothing is written then.
    """
    from ratioctl.models.packaging import package_checkpoint as run

    return run(
        weights,
        arch=arch,
        labels=labels,
        out=out,
        mean=mean,
        std=std,
        input_size=input_size,
        resize=resize,
        data=data,
        arch_options=arch_options,
        ema=ema,
        force=force,
        download=download,
    )


@verb
def load_model(model: Path | ModelPackage = DEFAULT_MODEL, *, device: str = "cpu") -> torch.nn.Module:
    """The model's network in eval mode: pixels (N, C, H, W) in [0,1] -> logits (N, K) before temperature.

    Its package's config is `.config`. Raises PackageError as `ratioctl.package.read`.
    """
    from ratioctl import package as packages
    from ratioctl.models import from_package

    return from_package(packages.resolve(model), device)
