"""`ratioctl parity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ratioctl.cli._common import COMPUTE, MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.errors import OutputError
from ratioctl.utils.text import safe_text


@command(unused=COMPUTE)
def parity(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    files: Annotated[
        list[str], typer.Argument(metavar="FILE.onnx...", help="Files exported from it, also quantized ones.")
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"Images to compare on: {SOURCE_HELP}.")
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            metavar="T",
            help="Largest difference of logits. Default: the rounding of float32; quantized files are then "
            "reported and not judged.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Use N images of --data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the certificate here.")
    ] = None,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Do not measure latency.")] = False,
    download: Download = False,
) -> int | None:
    """Certify that an exported file agrees with its package.

    Every image is compared with torch in every runtime that is installed: onnxruntime with all its providers,
    and OpenVINO. Exits with 4 where a difference exceeds the tolerance. `ratioctl verify --parity` checks the
    certificate.
    """
    from ratioctl.onnx.compare import certify
    from ratioctl.utils.atomic_files import write_file

    if out is not None:
        _refuse_foreign(out)
    document = certify(
        model,
        files,
        data=data,
        tolerance=tolerance,
        limit=limit,
        timing=not no_timing,
        download=download,
        on_step=lambda text: context.note(f"Comparing {text}."),
    )
    for file in document["files"]:
        if not file["same_package"]:
            context.warn(f"{file['path']} was exported from another version of {document['model']['name']}")
    if out is not None:
        write_file(out, (json.dumps(document, indent=1) + "\n").encode())
    if context.json:
        emit_json(document)
    else:
        _show(context, document)
        if out is not None:
            context.out.print(f"Written: {out}")
    return None if document["ok"] else 4


def _refuse_foreign(out: Path) -> None:
    from ratioctl.onnx.certificate import SCHEMA

    if out.exists() and (not out.is_file() or SCHEMA.encode() not in out.read_bytes()):
        raise OutputError(out, "exists and is not a certificate", "Delete it, or choose another --out.")


def _show(context: Context, document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("file", "runtime", "images", title="Differences from torch", title_justify="left")
    for column in ("n", "logits", "labels", "flags", ""):
        table.add_column(column, justify="right")
    for row in document["results"]:
        verdict = {True: "ok", False: "FAILED", None: "not judged"}[row["ok"]]
        difference = "-" if row["logits_difference"] is None else f"{row['logits_difference']:.2g}"
        cells = [Path(row["file"]).name, row["backend"], row["set"], f"{row['n']:,}", difference]
        cells += [str(row["changed_labels"]), str(row["changed_flags"]), verdict]
        table.add_row(*map(safe_text, cells))
    context.out.print(table)
    for row in document["skipped"]:
        context.out.print(safe_text(f"{row['backend']}: {row['reason']}"), soft_wrap=True)
    if document["timing"]:
        times = Table("runtime", "file", title="Speed", title_justify="left")
        for column in ("threads", "batch", "ms", "images a second"):
            times.add_column(column, justify="right")
        for row in document["timing"]:
            name = "-" if row["file"] is None else Path(row["file"]).name
            numbers = (row["threads"], row["batch"], f"{row['ms']:.3g}", f"{row['images_per_second']:,.0f}")
            times.add_row(row["backend"], safe_text(name), *map(str, numbers))
        context.out.print(times)
