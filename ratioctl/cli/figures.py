"""`ratioctl figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.errors import Interrupted


@command
def figures(
    context: Context,
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"Labelled test images: {SOURCE_HELP}.")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " [default: cifar10-ratio]")
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            "--ood",
            metavar="NAME=SOURCE",
            help="An OOD set; repeatable. The first gives the OOD pictures. Default: noise.",
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option("--eps", metavar="RANGE", help="Budgets in l2. Default: each model's own ladder."),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, metavar="N", help="Steps of the searches; the paper's: 500.")
    ] = 100,
    count: Annotated[
        int, typer.Option("--count", min=1, metavar="N", help="Images of each kind of figure.")
    ] = 2,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files.")] = Path(
        "figures"
    ),
    download: Download = False,
) -> int | None:
    """Draw the figures of the RATIO paper with your models.

    Figure 1 (a counterfactual of a plainly trained model, where there is one), Figure 2 (images that the
    models misclassify; with other data and models Figures 3 and 4), Figure 5 (confidence over the radius) and
    Figures 6 and 7 (features on OOD images), as PNG and SVG, and figures.json.
    """
    from ratioctl.evaluation.paper_figures import collect
    from ratioctl.report import paper_figures

    paper_figures.refuse_foreign(out)
    try:
        with Progress(context, total=1.0) as progress:
            found = collect(
                models or (),
                data=data,
                ood=ood or (),
                eps=eps,
                steps=steps,
                count=count,
                device=context.device,
                precision=context.precision,
                seed=context.seed,
                download=download,
                callback=lambda share, what: progress.update(share, what),
            )
    except KeyboardInterrupt as stop:
        again = f"Start again with: {context.typed()}"
        raise Interrupted(out, "nothing was written", again, signum=getattr(stop, "signum", 2)) from None
    written = paper_figures.write(found, out)
    if context.json:
        emit_json({**found.about, "files": [str(path) for path in written]})
        return None
    for path in written:
        context.out.print(f"Written: {path}")
    return 3 if any(entry["unreadable"] for entry in found.about["data"]) else None
