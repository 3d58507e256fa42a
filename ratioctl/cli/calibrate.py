"""`ratioctl calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratioctl.cli._common import (
    MODEL_HELP,
    SOURCE_HELP,
    Context,
    Download,
    Score,
    command,
    emit_json,
)
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import threshold_text

if TYPE_CHECKING:
    from ratioctl.calibration.calibrate import Calibrated


Ood = Annotated[
    list[str] | None,
    typer.Option(
        "--ood",
        metavar="NAME=SOURCE",
        help="An out-of-distribution (OOD) set for the rules; repeatable. Without NAME= "
        "the last part of SOURCE is the name.",
    ),
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option("--threshold", metavar="NAME=RULE", help="Also choose this threshold; repeatable."),
]
PerClass = Annotated[
    bool,
    typer.Option(
        "--per-class",
        help="Choose a threshold for each predicted class too; classes with few images use the common one.",
    ),
]
KeepTemperature = Annotated[
    bool, typer.Option("--keep-temperature", help="Leave the temperature as it is; choose thresholds only.")
]
StoredAs = Annotated[
    Literal["fp16"] | None,
    typer.Option(
        "--weights",
        metavar="fp16",
        help="Store the weights in fp16, half the size; the model computes in fp32.",
    ),
]


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
    score: Score = None,
    ood: Ood = None,
    thresholds: Thresholds = None,
    per_class: PerClass = False,
    keep_temperature: KeepTemperature = False,
    weights: StoredAs = None,
    download: Download = False,
) -> int | None:
    """Choose temperature and thresholds on held-out data.

    Rules of --threshold: keep:0.95 accepts this share of the in-distribution images; pass:0.05@NAME accepts
    at most this share of the OOD set NAME, worst-pass:0.2@NAME:eps=1.0 also under attack in this l2 radius;
    cost:FP/FN@PREVALENCE has the least expected cost; conformal:0.05 flags a new in-distribution image with
    at most this probability; risk:0.01 allows at most this share of errors among accepted images.
    """
    from ratioctl.calibration.calibrate import calibrate as run

    result = run(
        model,
        data=data,
        objective=objective,
        out=out,
        score=score,
        ood=ood or (),
        thresholds=thresholds or (),
        per_class=per_class,
        keep_temperature=keep_temperature,
        weights=weights,
        device=context.device,
        download=download,
        on_search=lambda n: context.note(f"Attacking {n:,} images for the worst case; this takes a while."),
    )
    for warning in result.warnings:
        context.warn(warning)
    if context.json:
        emit_json(
            {
                "package": str(result.package.path),
                "digest": result.package.digest,
                "temperature": result.temperature,
                "thresholds": result.thresholds,
                "score": result.score,
                "score_thresholds": result.score_thresholds,
                "threshold_records": result.records,
                "calibration": result.package.config["ratio"]["calibration"],
            }
        )
    else:
        _print_result(context, result)
    if result.collapsed:
        alert_chance(context, result, "Check the labels and their order, and the normalization.")
    return 3 if result.unreadable else None


def _print_result(context: Context, result: Calibrated) -> None:
    from rich.table import Table

    table = Table("", "T = 1", f"T = {result.temperature:.4g}")
    record = result.package.config["ratio"]["calibration"]
    for key, name, percent in (
        ("ece", f"ECE, {record['bins']} bins on [1/K,1]", True),
        ("ece_report", f"ECE, {record['report_bins']} bins on [1/K,1]", True),
        ("nll", "NLL", False),
        ("mean_confidence", "mean confidence", True),
    ):
        row = [f"{v:.2%}" if percent else f"{v:.4f}" for v in (result.before[key], result.after[key])]
        table.add_row(name, *row)
    context.out.print(table)
    context.out.print(f"Accuracy {result.accuracy:.2%} of {result.n} held-out images ({record['source']})")
    for name, thresholds in {"": result.thresholds, f" of {result.score}": result.score_thresholds}.items():
        if not name or result.score != "msp":
            shown = ", ".join(f"{k} {threshold_text(v, '.6f')}" for k, v in thresholds.items())
            context.out.print(f"Thresholds{name}: {shown}")
    if len(result.records) > 2:
        context.out.print("`ratioctl thresholds` shows their acceptance rates with intervals.")
    context.out.print(f"Package: {result.package.path} (digest {result.package.digest[:12]})")


def alert_chance(context: Context, result: Calibrated, advice: str) -> None:
    """The warning block of a model whose predictions carry no information."""
    context.alert(
        "this model is no better than chance",
        f"Held-out accuracy {result.accuracy:.1%} of {result.n} images; always predicting the most frequent "
        f"class gives {result.chance:.1%}.",
        "Its confidences, thresholds and counterfactuals mean nothing.",
        advice,
    )
