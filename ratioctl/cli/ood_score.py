"""`ratioctl ood-score`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ratioctl.cli._common import BitDepth, Context, Score, command, emit_json
from ratioctl.cli._progress import Progress, rate
from ratioctl.errors import Interrupted, UsageError
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.durations import duration
from ratioctl.utils.text import threshold_text

if TYPE_CHECKING:
    from ratioctl.cli._flagged import Flagged
    from ratioctl.cli._row_output import RowOutput
    from ratioctl.cli._rows import Target
    from ratioctl.scoring.pipeline import Model
    from ratioctl.types import ScoreRow


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH", help="Images, folders, archives, URLs of these, or - for a list of paths on stdin."
    ),
]
ScoringModel = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL|FILE.onnx", help="A package, a bundled model or an exported file."
    ),
]
Threshold = Annotated[
    str,
    typer.Option(
        "--threshold",
        metavar="tpr95|tpr99|FLOAT",
        help="A stored name (see `ratioctl thresholds`), or the confidence below which an image is OOD; for "
        "another --score the value above which it is.",
    ),
]
RowFormat = Annotated[
    Literal["table", "csv", "jsonl", "parquet"] | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, csv, jsonl or parquet. Default: by the ending of --output, else table.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", metavar="FILE|URL", help="Write the rows here instead of stdout."),
]
CsvSafe = Annotated[
    bool,
    typer.Option(
        "--csv-safe",
        help="Put an apostrophe before CSV cells that a spreadsheet would run as a formula (= + - @). "
        "Off by default because it changes paths.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Score the first N images only.")
]
Probabilities = Annotated[bool, typer.Option("--probabilities", help="Add one column p:<class> per class.")]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Add margin (log-odds above the threshold), runner_up (class), percentile (among the "
        "calibration images) and, for flagged images, reason.",
    ),
]
Checks = Annotated[
    bool,
    typer.Option(
        "--checks",
        help="Add checks of the input: width and height before resizing, blank, saturated, duplicate (of the "
        "image before), notes of the decoder, pixels_sha256.",
    ),
]
SaveFlagged = Annotated[
    Path | None,
    typer.Option(
        "--save-flagged",
        metavar="DIR",
        help="Also search counterfactuals of the flagged images (at most 100) towards their predicted class, "
        "100 steps each.",
    ),
]
WorstCase = Annotated[
    float | None,
    typer.Option(
        "--worst-case",
        metavar="EPS",
        help="Add the highest confidence found in this l2 ball. Takes 300 forward and backward passes per "
        "image; the time is estimated first.",
    ),
]
Certified = Annotated[
    bool,
    typer.Option(
        "--certified",
        help="Add guaranteed_confidence, an upper bound of the confidence within the linf radius of the "
        "model's certified head.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Score part I of N only, chosen by the hash of each path; `ratioctl merge` joins the parts.",
    ),
]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="local, or ray: the same rows in any order, from the cluster that RAY_ADDRESS names or from "
        "one that is started on this machine.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Threads, with --engine ray actors of one processor each. Default: one per processor.",
    ),
]
FailOnOod = Annotated[
    bool, typer.Option("--fail-on-ood", help="Exit with 4 if anything is out of distribution.")
]
SkipErrors = Annotated[
    bool, typer.Option("--skip-errors", help="Exit with 0 although some images could not be read.")
]


@command
def ood_score(
    context: Context,
    paths: Paths,
    model: ScoringModel = DEFAULT_MODEL,
    threshold: Threshold = "tpr95",
    score: Score = None,
    row_format: RowFormat = None,
    output: Output = None,
    csv_safe: CsvSafe = False,
    limit: Limit = None,
    bit_depth: BitDepth = None,
    probabilities: Probabilities = False,
    explain: Explain = False,
    checks: Checks = False,
    save_flagged: SaveFlagged = None,
    worst_case: WorstCase = None,
    certified: Certified = False,
    shard: ShardOption = None,
    engine: Engine = "local",
    workers: Workers = None,
    fail_on_ood: FailOnOod = False,
    skip_errors: SkipErrors = False,
) -> int | None:
    """Flag images that are out of the model's distribution.

    A run with an --output that is a URL continues where an interrupted one with the same settings stopped.
    """
    from ratioctl import package
    from ratioctl.cli import _row_shards, _rows
    from ratioctl.cli._flagged import Flagged
    from ratioctl.cli._row_output import RowOutput
    from ratioctl.scoring.backends import open_model

    target = _rows.target(output)
    row_format = row_format or _rows.format_of(target)
    _check_format(context, row_format, target)
    part = _row_shards.ShardOutput.of(shard, target, row_format)
    tally = _Tally(flagged=Flagged.opened(save_flagged, model))
    how: dict[str, Any] = {"device": context.device, "precision": context.precision, "seed": context.seed}
    how |= {"worst_case": worst_case, "certified": certified, "score": score}
    opened = open_model(model, threshold, **how)
    bound = package.threshold(opened.spec, threshold, opened.score)
    labels = opened.spec.label_names
    more = {"worst_case": worst_case is not None, "certified": certified, "explain": explain}
    more |= {"checks": checks, "shard": bool(part)}
    names = _rows.columns(labels if probabilities else None, **more)
    options = {"worst case": worst_case, "bit depth": bit_depth, "seed": context.seed, "limit": limit}
    settings = functools.partial(_row_shards.settings_of, opened, model, bound, options)
    rows = RowOutput.of(target, row_format, names, labels, csv_safe=csv_safe, shard=part, settings=settings)
    scored: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "explain": explain}
    scored |= {"checks": checks, "bit_depth": bit_depth}
    scored |= {"limit": limit, "workers": workers}
    if engine == "ray":
        from ratioctl.scoring import ray_engine

        batches = ray_engine.run(paths, model, shard=shard, **scored, **how)
    else:
        from ratioctl.scoring import pipeline  # imported by `open_model` while the session is created

        batches = pipeline.batches(paths, opened, listing=rows.listing, **scored)
    torch_unasked = worst_case is None and context.device in ("auto", "cpu")
    _tell_model(context, opened, model, bound, torch_unasked=torch_unasked)
    total = None if shard else _estimate(context, opened, paths, limit)
    _write(context, batches, rows, tally, total)
    if context.json:
        emit_json(_summary(tally, opened, model, threshold, bound, output))
    context.note(tally.sentence(opened, bound, threshold))
    if tally.flagged is not None:
        common = opened.score == "msp" and getattr(bound, "classes", None) is None
        tally.flagged.write(context, bit_depth, float(bound) if common else None)
    if fail_on_ood and tally.ood:
        return 4
    return 3 if tally.unreadable and not skip_errors else 0


def _write(
    context: Context,
    batches: Generator[list[ScoreRow], None, None],
    output: RowOutput,
    tally: _Tally,
    total: int | None,
) -> None:
    """Write and count all rows. Raises Interrupted after a signal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        write = None
        if output.target is not None or not context.json:  # with --json stdout holds the summary alone
            write = stack.enter_context(output.opened())
        hidden = output.target is None and sys.stdout.isatty()
        progress = stack.enter_context(Progress(context, total, hidden=hidden))
        try:
            for rows in batches:
                if write is not None:
                    write(rows)
                tally.add(rows)
                progress.update(tally.images, tally.text(total))
        except KeyboardInterrupt as stop:
            raise _interrupted(stop, context, tally, output) from None
    if output.parts is not None:
        tally.keep(**output.parts.kept)
    output.finish(tally.images)


def _check_format(context: Context, row_format: str, output: Target | None) -> None:
    if row_format == "parquet" and output is None and not context.json and sys.stdout.isatty():
        step = "Name a file with --output, or redirect the output to one."
        raise UsageError("--format parquet", "cannot be shown on a terminal", step)


@dataclasses.dataclass(kw_only=True)
class _Tally:
    """What has been scored since `began`; `flagged` collects images for --save-flagged."""

    flagged: Flagged | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)
    images: int = 0
    ood: int = 0
    unreadable: int = 0

    def add(self, rows: Sequence[ScoreRow]) -> None:
        self.images += len(rows)
        if self.flagged is not None:
            self.flagged.add(rows)
        self.ood += sum(row.is_ood is True for row in rows)
        self.unreadable += sum(row.error is not None for row in rows)

    def keep(self, images: int, out_of_distribution: int, errors: int) -> None:
        """Count rows of an earlier run that this one continues."""
        self.images += images
        self.ood += out_of_distribution
        self.unreadable += errors

    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def text(self, total: int | None) -> str:
        """For the progress bar; `total` images are expected where that is known."""
        images = _count(self.images) if total is None else f"{self.images:,} of {total:,} images"
        unreadable = f", {self.unreadable:,} unreadable" if self.unreadable else ""
        return f"{images}, {self.ood:,} OOD{unreadable}"

    def sentence(self, opened: Model, bound: float, threshold: str) -> str:
        """For people, at the end; `bound` is the value of the threshold, `threshold` as it was given."""
        seconds = self.seconds()
        rule = "confidence below" if opened.score == "msp" else f"{opened.score} above"
        name = f", {threshold}" if threshold in opened.spec.thresholds_of(opened.score) else ""
        name += " per class" if getattr(bound, "classes", None) is not None else ""
        return (
            f"{_count(self.images)} in {seconds:.1f} s ({rate(self.images / seconds)} per second): "
            f"{self.ood:,} out of distribution ({rule} {threshold_text(bound)}{name}), "
            f"{self.unreadable:,} could not be read."
        )


def _count(images: int) -> str:
    return f"{images:,} image" if images == 1 else f"{images:,} images"


def _tell_model(context: Context, opened: Model, given: str, bound: float, *, torch_unasked: bool) -> None:
    """Notes about the model that a user should know before reading its rows."""
    spec, own = opened.spec, opened.own_threshold
    if opened.guaranteed is not None:
        context.note(
            f"guaranteed_confidence holds within linf {spec.certified:g} of the model's 8-bit input."
        )
    if opened.backend == "torch" and torch_unasked:
        context.note(f"{given} has no model.onnx, so torch is used; exporting it would be faster.")
    if own is not None and (abs(own - bound) > 1e-6 or own.classes != getattr(bound, "classes", None)):
        same = [name for name, value in spec.thresholds_of(opened.score).items() if value == own]
        context.warn(
            f"the output is_ood of {given} compares with {own:.4g}; these rows compare with {bound:.4g}. "
            f"Give --threshold {same[0] if same else f'{own:.9g}'} for the flags of the file."
        )
    if not spec.calibrated:
        context.warn(f"{spec.name} is not calibrated: its confidences mean little. See `ratioctl calibrate`.")


def _interrupted(stop: KeyboardInterrupt, context: Context, tally: _Tally, output: RowOutput) -> Interrupted:
    step = f"{output.kept()}Start again with: {context.typed()}"
    return Interrupted(
        "ood-score", f"stopped after {_count(tally.images)}", step, signum=getattr(stop, "signum", 2)
    )


def _summary(
    tally: _Tally, opened: Model, model: str, threshold: str, bound: float, output: str | None
) -> dict[str, Any]:
    """The document that --json prints."""
    spec, seconds = opened.spec, tally.seconds()
    return {
        "images": tally.images,
        "out_of_distribution": tally.ood,
        "errors": tally.unreadable,
        **({} if opened.score == "msp" else {"score": opened.score}),
        "threshold": {
            "name": threshold if threshold in spec.thresholds_of(opened.score) else None,
            "confidence" if opened.score == "msp" else "value": bound,
        },
        "model": {"name": spec.name, "path": model, "temperature": spec.temperature},
        "backend": opened.backend,
        "road": opened.backend,  # the former name of `backend`, kept for scripts
        "output": output,
        "seconds": seconds,
        "images_per_second": tally.images / seconds,
    }


def _estimate(context: Context, model: Model, paths: list[str], limit: int | None) -> int | None:
    """Say how long the worst case of all images will take; their number, where that can be known."""
    from ratioctl.scoring import pipeline

    if model.worst_case_pace is None or context.quiet:
        return None
    if "-" in paths:  # a list that is still being written
        each = model.worst_case_pace(pipeline.MAX_BATCH)
        context.note(f"The worst case takes about {each:.2g} s an image.")
        return None
    total = sum(1 for _ in itertools.islice(pipeline.items_of(paths), limit))
    each = model.worst_case_pace(total)
    context.note(f"This takes about {duration(total * each)}: {_count(total)}, {each:.2g} s each.")
    return total
