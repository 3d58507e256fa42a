"""`ratioctl package`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratioctl.cli._common import COMPUTE, SOURCE_HELP, Context, Download, StoredAs, command, emit_json
from ratioctl.errors import OutputError, UsageError
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from ratioctl.models import Classifier
    from ratioctl.models.import_checkpoint import Fitted
    from ratioctl.package import ModelPackage

MAX_LABEL = 200  # characters of a class name

Ema = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="Which weights to take where a file has averaged ones as well."),
]


@command(unused=COMPUTE)
def package(
    context: Context,
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help=".safetensors, or a .pt/.pth state dict.")
    ],
    arch: Annotated[
        str, typer.Option("--arch", metavar="NAME", help="resnet18, ..., torchvision:NAME or timm:NAME.")
    ],
    labels: Annotated[
        str, typer.Option("--labels", metavar="FILE|A,B,...", help="Class names in the order of the outputs.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The package folder to write.")],
    mean: Annotated[
        str | None, typer.Option("--mean", metavar="R,G,B", help="Normalization of [0,1] pixels.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Goes with --mean.")] = None,
    input_size: Annotated[
        int | None,
        typer.Option("--input-size", min=1, max=2048, metavar="N", help="Side of the input in pixels."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help=f"Images to check the normalization and the labels on: {SOURCE_HELP}.",
        ),
    ] = None,
    arch_options: Annotated[
        list[str] | None,
        typer.Option(
            "--arch-option",
            metavar="KEY=VALUE",
            help="What the weights do not say of the network, such as stem_stride=2; repeatable.",
        ),
    ] = None,
    ema: Ema = None,
    weights_as: StoredAs = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that --out holds.")] = False,
    download: Download = False,
) -> int | None:
    """Make a package of a classifier trained elsewhere."""
    from ratioctl.models import import_checkpoint, normalization
    from ratioctl.models.checkpoint_file import read
    from ratioctl.models.registry import parse_option

    if not force and (out / "config.json").exists():
        raise OutputError(out, "holds a package", "Name another folder, or replace it with --force.")
    names = _labels(labels)
    checkpoint = read(weights, ema=ema)
    given = _numbers("--mean", mean), _numbers("--std", std)
    if given == (None, None) and (stored := import_checkpoint.stored_normalization(checkpoint)) is not None:
        given = stored
        context.note("Normalization: taken from the checkpoint, which holds it.")
    normalization.check_normalization(*given)
    options = dict(parse_option(arch, text) for text in arch_options or ())
    size = input_size
    if size is None:
        size, note = import_checkpoint.resolve_size(checkpoint, arch, len(names), options)
        context.note(note)
    fitted = import_checkpoint.fit(
        checkpoint,
        arch,
        num_classes=len(names),
        mean=given[0] or (),
        std=given[1] or (),
        input_size=size,
        options=options,
    )
    import_checkpoint.check_forward(fitted, checkpoint, arch, len(names), size)
    for note in fitted.notes:
        context.note(f"{weights.name}: {note}.")
    checked = None if data is None else _checked(fitted.classifier, data, size, names, download)
    for warning in checked.warnings if checked else ():
        context.warn(warning)
    how = weights_as or "fp32"
    written = import_checkpoint.write(fitted, checkpoint, arch, names, out, input_size=size, weights_as=how)
    _show(context, written, fitted, checked, data)
    return None


def _show(
    context: Context, written: ModelPackage, fitted: Fitted, checked: _Checked | None, data: str | None
) -> None:
    """Print what was packaged."""
    if context.json:
        emit_json(
            {
                "package": written.path,
                "digest": written.digest,
                "prefix": fitted.prefix,
                "renamed": fitted.renamed,
                "normalised": checked and {"mean": checked.mean, "std": checked.std},
                "accuracy": checked and checked.accuracy,
                "warnings": [*fitted.notes, *(checked.warnings if checked else ())],
            }
        )
        return
    if checked is not None:
        shown = [", ".join(f"{v:.3f}" for v in part) for part in (checked.mean, checked.std)]
        context.out.print(f"Normalized input: mean {shown[0]}, std {shown[1]} (n {checked.n})")
        if checked.accuracy is not None:
            context.out.print(f"Accuracy {checked.accuracy:.1%} (n {checked.n}, {safe_text(data)})")
    context.out.print(f"Package: {safe_text(written.path)} (digest {written.digest[:12]})")
    context.note(f"It is not calibrated: ratioctl calibrate {written.path} --data SOURCE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    """Statistics of the normalized input, accuracy on n images (None without labels), and warnings."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    n: int
    accuracy: float | None
    warnings: list[str]


def _checked(classifier: Classifier, data: str, side: int, names: list[str], download: bool) -> _Checked:
    """Check the normalization and the labels' order on images of a SOURCE."""
    import numpy as np

    from ratioctl.data import in_distribution
    from ratioctl.models import normalization

    channels = classifier.mean.numel()
    images = in_distribution.load(data, side, channels, download=download)
    if images.labels is not None:
        images = in_distribution.load_labelled(data, side, channels, names, download=download)
    # A thousand images, spread over the classes, tell a right normalization from a wrong one.
    index = np.unique(np.linspace(0, len(images) - 1, 1000).astype(int))
    labels = None if images.labels is None else images.labels[index]
    statistics, trials = normalization.measure(classifier, images.pixels[index], labels)
    order = None
    if labels is not None and trials[0].predicted is not None:
        order = normalization.other_order(trials[0].predicted, labels, names)
    problems = normalization.find_problems(statistics, trials) if order is None else []
    accuracy = trials[0].accuracy
    warnings = [f"The normalization may be wrong: {problem}." for problem in problems]
    if order is not None:
        warnings.append(f"{order[0].upper()}{order[1:]}.")
    elif accuracy is not None and normalization.near_chance(accuracy, len(names), len(index)):
        warnings.append(f"Its accuracy, {accuracy:.1%}, is no better than chance with {len(names)} classes.")
    mean, std = statistics
    return _Checked(mean=mean, std=std, n=len(index), accuracy=accuracy, warnings=warnings)


def _labels(given: str) -> list[str]:
    """The names in a file, one a line, or in the argument, separated by commas."""
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a list too long for a file name
        is_file = False
    if is_file:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UsageError(given, "is not UTF-8 text", "Write one class name a line.") from None
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [name.strip() for name in given.split(",")]
    if len(names) == 1 and ("/" in given or "." in given):
        raise UsageError(f"--labels {given}", "no such file", "Check the spelling of the path.")
    if any(len(name) > MAX_LABEL for name in names):
        longest = max(names, key=len)
        reason = f'holds a name of {len(longest)} characters, "{longest[:20]}..."; the most are {MAX_LABEL}'
        raise UsageError("--labels", reason, "Shorten it: every row of results repeats it.")
    if len(names) < 2 or not all(names):
        raise UsageError(f"--labels {given}", "names fewer than two classes", "For example: cat,dog,frog.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--labels {given}", f'names "{twice}" twice', "Labels are matched by name.")
    return names


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}", "is not a list of numbers", "For example 0.5,0.5,0.5.") from None
