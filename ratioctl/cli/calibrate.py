"""`ratioctl calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import DEFAULT_MODEL, MODEL_HELP, SOURCE_HELP, Context, Download, command, not_yet


@command
def calibrate(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help=f"Held-out labelled images: {SOURCE_HELP}. Default: the recipe's own held-out split.",
        ),
    ] = None,
    objective: Annotated[
        Literal["ece", "nll"],
        typer.Option("--objective", metavar="ece|nll", help="What the temperature minimises."),
    ] = "ece",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write a new package here instead of updating MODEL."),
    ] = None,
    download: Download = False,
) -> int | None:
    """Choose temperature and thresholds on held-out data."""
    not_yet(context, "calibrate")
