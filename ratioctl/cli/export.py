"""`ratioctl export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratioctl.cli._common import (
    COMPUTE,
    MODEL_HELP,
    SOURCE_HELP,
    Context,
    Download,
    command,
    emit_json,
    registered,
)
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import milliseconds, safe_text, threshold_text

if TYPE_CHECKING:
    from ratioctl.onnx.export import Exported
    from ratioctl.onnx.quantize import Cost


Threshold = Annotated[
    str,
    typer.Option(
        "--threshold", metavar="tpr95|FLOAT", help="Threshold of is_ood: a stored name, or a confidence."
    ),
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Write a file that searches counterfactuals, explain.onnx by default."),
]
Norm = Annotated[str, typer.Option("--norm", metavar="2|inf", help="The norm that --explain searches in.")]
Weights = Annotated[
    Literal["fp32", "fp16"] | None,
    typer.Option(
        "--weights",
        metavar="fp32|fp16",
        help="Storage of the weights; fp16 halves the file. It computes in fp32 either way. "
        "Default: that of MODEL.",
    ),
]

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help=f"Images to quantize on and measure: {SOURCE_HELP}. Default: the recipe's calibration data.",
    ),
]


@command(unused=COMPUTE)
def export(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.onnx", help="Where to write the file or layout."),
    ] = None,
    input_type: Annotated[
        Literal["float", "uint8"],
        typer.Option("--input", metavar="float|uint8", help="float32 NCHW in [0,1], or uint8 NHWC."),
    ] = "float",
    threshold: Threshold = "tpr95",
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to 8 bits, and report the cost.")] = False,
    weights: Weights = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar=registered("ratioctl.onnx.layouts", "layout_names"),
            help="One file, or the model folder of a server.",
        ),
    ] = "file",
    opset: Annotated[int | None, typer.Option("--opset", min=1, metavar="N", help="ONNX opset.")] = None,
    threshold_input: Annotated[
        bool,
        typer.Option(
            "--threshold-input", help="Add the optional input threshold, whose default is --threshold."
        ),
    ] = False,
    explain: Explain = False,
    norm: Norm = "2",
    data: Data = None,
    download: Download = False,
) -> int | None:
    """Write a self-contained ONNX file that computes the OOD flag."""
    from ratioctl.onnx.export import export as run
    from ratioctl.onnx.layouts import find_layout

    find_layout(layout)
    done = run(
        model,
        output=output,
        input_type=input_type,
        threshold=threshold,
        int8=int8,
        weights=weights,
        layout=layout,
        opset=opset,
        threshold_input=threshold_input,
        explain=explain,
        norm=norm,
        data=data,
        download=download,
        on_start=lambda: context.note("Tracing the network; this takes a while."),
    )
    for warning in done.warnings:
        context.warn(warning)
    if context.json:
        facts = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
        emit_json({**facts, "package": None if done.package is None else done.package.path})
        return None
    _show(context, done, explain)
    return None


def _show(context: Context, done: Exported, explain: bool) -> None:
    show = context.out.print
    for file in done.files:
        show(safe_text(file))
    halves = ", fp16 weights" if done.weights == "fp16" else ""
    size = f"{done.bytes / 2**20:.1f} MiB{halves}, opset {done.opset}, {done.input_type} input"
    show(f"{size}, out of distribution below confidence {threshold_text(done.threshold)}")
    if done.parity is not None:
        compared = "probabilities of counterfactuals" if explain else "logits"
        labels, flags = done.parity.labels or "no", done.parity.flags or "no"
        show(
            f"Agrees with torch on {done.parity.n} images: {compared} differ by at most "
            f"{done.parity.difference:.1e}, {labels} label and {flags} flag differs"
        )
    if done.cost is not None:
        _show_cost(context, done.cost)
    if explain:
        return
    backends = list(done.latency_ms)
    for batch, before in done.latency_ms[backends[-2]].items():
        times = ", ".join(f"{name} {milliseconds(done.latency_ms[name][batch])}" for name in backends)
        show(f"Batch {batch}: {times} ({before / done.latency_ms[backends[-1]][batch]:.2g} times as fast)")


def _show_cost(context: Context, cost: Cost) -> None:
    show = context.out.print
    show(f"Quantized on {safe_text(cost.source)}. Changes on other images of it and on {cost.outside}:")
    pairs = (cost.agreement, cost.outside_agreement)
    for name, counts in (("labels", [a.labels for a in pairs]), ("flags", [a.flags for a in pairs])):
        parts = [f"{c} of {a.n} ({c / a.n:.2%})" for c, a in zip(counts, pairs, strict=True)]
        show(f"  {name:<8}  {', '.join(parts)}")
    for name, pair in (("accuracy", cost.accuracy), ("AUROC", cost.auroc)):
        if pair is not None:
            show(f"  {name:<8}  {pair[0]:.2%} -> {pair[1]:.2%}")
