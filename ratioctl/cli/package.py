"""`ratioctl package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.errors import UsageError
from ratioctl.utils.text import safe_text


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
        int | None, typer.Option("--input-size", min=1, metavar="N", help="Side of the input in pixels.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help=f"Images to check the normalization on: {SOURCE_HELP}."
        ),
    ] = None,
    download: Download = False,
) -> int | None:
    """Make a package of a classifier trained elsewhere."""
    import numpy as np

    from ratioctl.data import in_distribution
    from ratioctl.models import import_checkpoint

    names = _labels(labels)
    side = input_size or (224 if ":" in arch else 32)
    checkpoint = import_checkpoint.read(weights)
    given = _numbers("--mean", mean), _numbers("--std", std)
    stored = import_checkpoint.normalisation_inside(checkpoint)
    if given == (None, None) and stored is not None:
        given = stored
        context.note("Normalisation: taken from the checkpoint, which holds it.")
    import_checkpoint.checked_normalisation(*given)
    fitted = import_checkpoint.fit(
        checkpoint, arch, num_classes=len(names), mean=given[0] or (), std=given[1] or ()
    )
    for note in fitted.notes:
        context.note(f"{weights.name}: {note}.")
    accuracy = statistics = None
    found: list[str] = []
    if data is not None:
        channels = fitted.classifier.mean.numel()
        images = in_distribution.load(data, side, channels, download=download)
        if images.labels is not None:
            images = in_distribution.load_labelled(data, side, channels, names, download=download)
        # A thousand images, spread over the classes, tell a right normalisation from a wrong one.
        index = np.unique(np.linspace(0, len(images) - 1, 1000).astype(int))
        part = None if images.labels is None else images.labels[index]
        statistics, trials = import_checkpoint.measure(fitted.classifier, images.pixels[index], part)
        found = import_checkpoint.doubts(statistics, trials)
        accuracy = trials[0].accuracy
        for doubt in found:
            context.warn(f"The normalisation may be wrong: {doubt}.")
    written = import_checkpoint.write(fitted, checkpoint, arch, names, out, input_size=side)
    if context.json:
        emit_json(
            {
                "package": written.path,
                "digest": written.digest,
                "prefix": fitted.prefix,
                "renamed": fitted.renamed,
                "normalised": statistics and {"mean": statistics[0], "std": statistics[1]},
                "accuracy": accuracy,
                "warnings": [*fitted.notes, *found],
            }
        )
        return None
    if statistics is not None:
        shown = [", ".join(f"{v:.3f}" for v in part) for part in statistics]
        context.out.print(f"Normalised input: mean {shown[0]}, std {shown[1]} (n {len(index)})")
    if accuracy is not None:
        context.out.print(f"Accuracy {accuracy:.1%} (n {len(index)}, {safe_text(data)})")
    context.out.print(f"Package: {safe_text(written.path)} (digest {written.digest[:12]})")
    context.note(f"It is not calibrated: ratioctl calibrate {written.path} --data SOURCE")
    return None


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
        raise UsageError(f"--labels {given}", "there is no such file", "Check the spelling of the path.")
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
        raise UsageError(f"{option} {text}", "is no list of numbers", "For example 0.5,0.5,0.5.") from None
