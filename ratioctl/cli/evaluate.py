"""`ratioctl evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, not_yet


@command
def evaluate(
    context: Context,
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"Labelled test images: {SOURCE_HELP}.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=MODEL_HELP + " [default: cifar10-ratio]"),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", metavar="NAME=SOURCE", help="An out-of-distribution set; repeatable."),
    ] = None,
    suite: Annotated[
        Literal["quick", "paper", "full", "explanations"],
        typer.Option("--suite", metavar="SUITE", help="quick, paper, full or explanations."),
    ] = "quick",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Use a stratified subset of N images.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted evaluation.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Also write the measurements into the package's card and config.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for reports and figures.")
    ] = None,
    download: Download = False,
) -> int | None:
    """Measure accuracy, robustness, calibration and OOD detection."""
    not_yet(context, "evaluate")
