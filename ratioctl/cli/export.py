"""`ratioctl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ratioctl.cli._common import DEFAULT_MODEL, MODEL_HELP, Context, command, not_yet


@command
def export(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.onnx", help="Where to write the file or layout.")
    ] = None,
    input_type: Annotated[
        Literal["float", "uint8"],
        typer.Option("--input", metavar="float|uint8", help="float32 NCHW in [0,1], or uint8 NHWC."),
    ] = "float",
    threshold: Annotated[
        str, typer.Option("--threshold", metavar="tpr95|FLOAT", help="Built into is_ood.")
    ] = "tpr95",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise, and print what it costs.")] = False,
    layout: Annotated[
        Literal["file", "triton", "kserve"],
        typer.Option("--layout", metavar="file|triton|kserve", help="One file, or a server's folder."),
    ] = "file",
    opset: Annotated[int | None, typer.Option("--opset", min=1, metavar="N", help="ONNX opset.")] = None,
) -> int | None:
    """Write one self-contained ONNX file with the flags inside."""
    not_yet(context, "export")
