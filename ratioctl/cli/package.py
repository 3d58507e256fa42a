"""`ratioctl package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import SOURCE_HELP, Context, Download, command, not_yet


@command
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
        str | None, typer.Option("--mean", metavar="R,G,B", help="Normalisation of [0,1] pixels.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Goes with --mean.")] = None,
    input_size: Annotated[
        int | None, typer.Option("--input-size", min=1, metavar="N", help="Side of the input in pixels.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help=f"Images to check the normalisation on: {SOURCE_HELP}."
        ),
    ] = None,
    download: Download = False,
) -> int | None:
    """Make a package of a classifier trained elsewhere."""
    not_yet(context, "package")
