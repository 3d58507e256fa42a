"""`ratioctl init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratioctl.cli._common import COMPUTE, SOURCE_HELP, Context, Download, command, emit_json

if TYPE_CHECKING:
    from ratioctl.data.proposal import Proposal


@command(unused=COMPUTE)
def init(
    context: Context,
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help=f"Labelled images: {SOURCE_HELP}.")],
    outside: Annotated[
        list[str] | None,
        typer.Option(
            "--outside",
            metavar="SOURCE",
            help="Images without your classes (OOD); repeatable. Default: generated ones.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="NAME", help="Architecture, also timm:NAME or torchvision:NAME."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=4, max=1024, metavar="N", help="Side of the input in pixels.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The recipe [default: <name>.toml].")
    ] = None,
    download: Download = False,
) -> int | None:
    """Look at photographs and write a recipe for them."""
    from ratioctl.data import proposal

    found = proposal.propose(photos, outside=tuple(outside or ()), arch=arch, size=size, download=download)
    path = out or Path(f"{found.name}.toml")
    proposal.write(found, path, again=out is not None)
    start = found.init or (f"{arch} --download" if arch and ":" in arch else None)
    line = f"ratioctl train {path}" + (f" --init {start}" if start else "")
    if context.json:
        emit_json(
            {
                "recipe": path,
                "classes": dict(zip(found.labels, found.counts, strict=True)),
                "findings": found.findings,
                "init": start,
                "next": line,
            }
        )
        return None
    show(context, found)
    context.out.print(f"Recipe: {path}")
    context.out.print(f"Next: {line}")
    return None


def show(context: Context, found: Proposal) -> None:
    """Classes and findings, as `init` and `train` print them."""
    context.note(
        f"{sum(found.counts)} training images of {len(found.labels)} classes, {min(found.counts)} to "
        f"{max(found.counts)} each"
    )
    for finding in found.findings:
        context.warn(finding)
