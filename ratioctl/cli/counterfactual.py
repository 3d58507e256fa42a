"""`ratioctl counterfactual`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import Context, command, not_yet


@command
def counterfactual(
    context: Context,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER", help="Images, or folders of them.")],
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="CLASS[,CLASS...]", help="Classes to move to, or predicted, second or all."
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A package folder or a bundled model; repeat it to compare. [default: cifar10-ratio]",
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            "--eps",
            metavar="RANGE",
            help="Budgets: 2, or 0.5,1,2, or 0.5..3 (six of them), or 0.5..3:0.25. "
            "Default: the model's own ladder for the norm.",
        ),
    ] = None,
    norm: Annotated[
        Literal["2", "1.5", "1", "inf"],
        typer.Option("--norm", metavar="2|1.5|1|inf", help="The norm in which the change is bounded."),
    ] = "2",
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of the search.")] = 500,
    restarts: Annotated[
        int, typer.Option("--restarts", min=1, metavar="N", help="Independent searches.")
    ] = 1,
    until: Annotated[
        float | None,
        typer.Option("--until", metavar="P", help="Find the smallest change that reaches this confidence."),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region", metavar="X,Y,W,H|MASK", help="Change nothing outside this box or mask image."
        ),
    ] = None,
    picture_format: Annotated[
        Literal["png", "gif", "webp"],
        typer.Option("--format", metavar="png|gif|webp", help="gif and webp add an animation."),
    ] = "png",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, JSON and page.")
    ] = Path("counterfactuals"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page when done.")] = False,
) -> int | None:
    """Show how an image must change to become another class."""
    not_yet(context, "counterfactual")
