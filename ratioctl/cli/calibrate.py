"""`ratioctl calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.utils.defaults import DEFAULT_MODEL


@command(unused=("precision", "seed"))
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
        Literal["ece", "nll"] | None,
        typer.Option(
            "--objective",
            metavar="ece|nll",
            help="What the temperature minimizes. Default: the recipe's, ece.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write a new package here instead of updating MODEL."),
    ] = None,
    download: Download = False,
) -> int | None:
    """Choose temperature and thresholds on held-out data."""
    from ratioctl.calibration.temperature import calibrate as run

    found = run(model, data=data, objective=objective, out=out, device=context.device, download=download)
    for doubt in found.warnings:
        context.warn(doubt)
    code = 3 if found.unreadable else None
    if context.json:
        emit_json(
            {
                "package": str(found.package.path),
                "digest": found.package.digest,
                "temperature": found.temperature,
                "thresholds": found.thresholds,
                "calibration": found.package.config["ratio"]["calibration"],
            }
        )
        return code

    from rich.table import Table

    table = Table("", "before (T = 1)", f"after (T = {found.temperature:.4g})")
    bins = found.package.config["ratio"]["calibration"]
    for key, name, percent in (
        ("ece", f"ECE, {bins['bins']} bins on [1/K,1]", True),
        ("ece_report", f"ECE, {bins['report_bins']} bins on [1/K,1]", True),
        ("nll", "NLL", False),
        ("mean_confidence", "mean confidence", True),
    ):
        row = [f"{v:.2%}" if percent else f"{v:.4f}" for v in (found.before[key], found.after[key])]
        table.add_row(name, *row)
    context.out.print(table)
    context.out.print(f"Accuracy {found.accuracy:.2%} of {found.n} held-out images ({bins['source']})")
    shown = ", ".join(f"{k} {v:.6f}" for k, v in found.thresholds.items())
    context.out.print(f"Thresholds: {shown}")
    context.out.print(f"Package: {found.package.path} (digest {found.package.digest[:12]})")
    return code
