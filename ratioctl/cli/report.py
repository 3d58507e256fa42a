"""`ratioctl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.cli.evaluate import Events, default_folder
from ratioctl.errors import Interrupted


@command
def report(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"Labelled test images: {SOURCE_HELP}.")
    ],
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", metavar="NAME=SOURCE", help="An OOD set; repeatable. Default: noise."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Use at most N images of each set.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the page [default: reports/MODEL-DIGEST-report]."
        ),
    ] = None,
    download: Download = False,
) -> int | None:
    """Write a page that describes a model to its users."""
    from ratioctl import package as packages
    from ratioctl.evaluation.overview import overview
    from ratioctl.report import overview_page

    package = packages.resolve(model)
    folder = out or default_folder([(package.name, package.digest)], "report")
    overview_page.refuse_foreign(folder)
    try:
        with Progress(context, total=1.0) as progress:
            found = overview(
                package,
                data=data,
                ood=ood or (),
                limit=limit,
                device=context.device,
                precision=context.precision,
                seed=context.seed,
                download=download,
                callback=Events(progress),
            )
    except KeyboardInterrupt as stop:
        again = f"Start again with: {context.typed()}"
        raise Interrupted(folder, "nothing was written", again, signum=getattr(stop, "signum", 2)) from None
    path = overview_page.write(found, folder)
    for warning in found.evaluation.models[0].report.warnings:
        context.warn(warning)
    if context.json:
        emit_json(
            {
                **found.evaluation.to_json(),
                "confusion": found.confusion.tolist(),
                "labels": package.label_names,
                "files": [path],
            }
        )
        return None
    context.out.print(f"Written: {path}")
    return 3 if any(entry["unreadable"] for entry in found.evaluation.data) else None
