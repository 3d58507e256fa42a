"""`ratioctl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import Context, Download, command, not_yet


@command
def train(
    context: Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a bundled recipe.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder [default: runs/<recipe name>].")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")
    ] = False,
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Start from the weights of this model.")
    ] = None,
    download: Download = False,
) -> int | None:
    """Train a model from a recipe, package it and calibrate it."""
    not_yet(context, "train")
