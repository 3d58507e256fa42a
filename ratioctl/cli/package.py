"""`ratioctl package`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratioctl.cli._common import COMPUTE, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.errors import UsageError
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from ratioctl.models.packaging import Packaged


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
        str | None, typer.Option("--mean", metavar="R,G,B", help="Normalization of pixels in [0,1]: means.")
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", metavar="R,G,B", help="Normalization: standard deviations.")
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", metavar="N|HxW", help="Side of the input in pixels, or HEIGHTxWIDTH."),
    ] = None,
    resize: Annotated[
        Literal["crop", "pad"],
        typer.Option("--resize", help="Cut images of another shape around the center, or pad with black."),
    ] = "crop",
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
            help="Option that the weights do not determine, such as stem_stride=2; repeatable.",
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Use the averaged (EMA) weights of a file that has both [default: no].",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that --out holds.")] = False,
    download: Download = False,
) -> int | None:
    """Make a package of a classifier trained elsewhere."""
    from ratioctl.models.packaging import package_checkpoint

    made = package_checkpoint(
        weights,
        arch=arch,
        labels=labels,
        out=out,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        input_size=input_size,
        resize=resize,
        data=data,
        arch_options=arch_options or (),
        ema=ema,
        force=force,
        download=download,
    )
    for note in made.notes:
        context.note(note)
    for warning in made.warnings:
        context.warn(warning)
    _show(context, made, data)
    return None


def _show(context: Context, made: Packaged, data: str | None) -> None:
    """Print what was packaged."""
    written, checked = made.package, made.checked
    if context.json:
        emit_json(
            {
                "package": written.path,
                "digest": written.digest,
                "prefix": made.prefix,
                "renamed": made.renamed,
                "normalised": checked and {"mean": checked.mean, "std": checked.std},
                "accuracy": checked and checked.accuracy,
                "warnings": [*made.notes, *made.warnings],
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


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}", "is not a list of numbers", "For example 0.5,0.5,0.5.") from None
