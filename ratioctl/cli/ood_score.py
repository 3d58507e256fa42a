"""`ratioctl ood-score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import DEFAULT_MODEL, Context, command, not_yet


@command
def ood_score(
    context: Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Images, folders, archives, or - for a list of paths on stdin."),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL|FILE.onnx", help="A package, a bundled model or an exported file."
        ),
    ] = DEFAULT_MODEL,
    threshold: Annotated[
        str, typer.Option("--threshold", metavar="tpr95|tpr99|FLOAT", help="Below this confidence: out.")
    ] = "tpr95",
    row_format: Annotated[
        Literal["table", "csv", "jsonl", "parquet"],
        typer.Option("--format", metavar="FORMAT", help="table, csv, jsonl or parquet."),
    ] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the rows here instead of stdout.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add one column p:<class> per class.")
    ] = False,
    worst_case: Annotated[
        float | None,
        typer.Option("--worst-case", metavar="EPS", help="Add the highest confidence in this l2 ball."),
    ] = None,
    fail_on_ood: Annotated[
        bool, typer.Option("--fail-on-ood", help="Exit with 4 if anything is out of distribution.")
    ] = False,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Exit with 0 although some images could not be read.")
    ] = False,
) -> int | None:
    """Flag images that are out of the model's distribution."""
    not_yet(context, "ood-score")
