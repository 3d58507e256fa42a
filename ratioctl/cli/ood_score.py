"""`ratioctl ood-score`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratioctl.cli._common import Context, command, emit_json
from ratioctl.errors import Interrupted, UsageError
from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from ratioctl.scoring.pipeline import Model


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
        Literal["table", "csv", "jsonl", "parquet"] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="table, csv, jsonl or parquet. Default: what the name of --output ends with, else table.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the rows here instead of stdout.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add one column p:<class> per class.")
    ] = False,
    worst_case: Annotated[
        float | None,
        typer.Option(
            "--worst-case",
            metavar="EPS",
            help="Add the highest confidence found in this l2 ball. Costs 300 passes forward and back for "
            "each image; how long that takes is said first.",
        ),
    ] = None,
    fail_on_ood: Annotated[
        bool, typer.Option("--fail-on-ood", help="Exit with 4 if anything is out of distribution.")
    ] = False,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Exit with 0 although some images could not be read.")
    ] = False,
) -> int | None:
    """Flag images that are out of the model's distribution."""
    from ratioctl import package
    from ratioctl.cli import _rows
    from ratioctl.scoring import pipeline as score
    from ratioctl.scoring.backends import open_model
    from ratioctl.utils.atomic_files import partial, streaming

    row_format = row_format or _format_of(output)
    if row_format == "parquet" and output is None and not context.json and sys.stdout.isatty():
        raise UsageError("--format parquet", "is not for terminals", "Name a file with --output.")
    started = time.monotonic()
    opened = open_model(
        model,
        threshold,
        device=context.device,
        precision=context.precision,
        worst_case=worst_case,
        seed=context.seed,
    )
    spec = opened.spec
    limit = package.threshold(spec, threshold)
    batches = score.batches(paths, opened, threshold=threshold, probabilities=probabilities)
    if opened.backend == "torch" and worst_case is None and context.device in ("auto", "cpu"):
        context.note(f"{spec.name} carries no model.onnx, so torch was loaded; exporting it would be faster.")
    own = opened.own_threshold
    if own is not None and abs(own - limit) > 1e-6:
        context.note(
            f"{spec.name}'s own is_ood compares with {own:.4g}; these rows compare with {limit:.4g}. "
            f"Give --threshold {own:.9g} for the file's own flags."
        )
    if not spec.calibrated:
        context.warn(f"{spec.name} is not calibrated: its confidences mean little. See `ratioctl calibrate`.")
    names = _rows.columns(spec.label_names if probabilities else None, worst_case=worst_case is not None)
    count = out = failed = 0
    total = _estimate(context, opened, paths)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        write = None
        if output is not None:
            stream = stack.enter_context(streaming(output))
        if output is not None or not context.json:
            write, close = _rows.writer(
                row_format, stream if output is not None else sys.stdout.buffer, names, spec.label_names
            )
            stack.callback(close)
        shown = output is not None or not sys.stdout.isatty()
        callback = stack.enter_context(_progress(context, shown=shown, total=total))
        try:
            for rows in batches:
                if write is not None:
                    write(rows)
                count += len(rows)
                out += sum(row.is_ood is True for row in rows)
                failed += sum(row.error is not None for row in rows)
                callback(count, out, failed)
        except KeyboardInterrupt as stop:
            held = None if output is None else partial(output)  # pipes and devices have none
            kept = f"Their rows are in {held}. " if held is not None and held.exists() else ""
            again = f"{kept}Start again with: {context.typed()}"
            reason = f"stopped after {_images(count)}"
            raise Interrupted("ood-score", reason, again, signum=getattr(stop, "signum", 2)) from None
    seconds = time.monotonic() - started
    if context.json:
        emit_json(
            {
                "images": count,
                "out_of_distribution": out,
                "errors": failed,
                "threshold": {
                    "name": threshold if threshold in spec.thresholds else None,
                    "confidence": limit,
                },
                "model": {"name": spec.name, "path": model, "temperature": spec.temperature},
                "road": opened.backend,  # the former name of `backend`, kept for scripts
                "backend": opened.backend,
                "output": output,
                "seconds": seconds,
                "images_per_second": count / seconds,
            }
        )
    named = f", {threshold}" if threshold in spec.thresholds else ""
    context.note(
        f"{_images(count)} in {seconds:.1f} s ({_pace(count / seconds)} a second): "
        f"{out:,} out of distribution (confidence below {limit:.4g}{named}), {failed:,} could not be read."
    )
    if fail_on_ood and out:
        return 4
    return 3 if failed and not skip_errors else 0


def _format_of(output: Path | None) -> Literal["table", "csv", "jsonl", "parquet"]:
    """The format that a file's name asks for: rows in scores.csv are CSV, not a table for people."""
    suffix = "" if output is None else output.suffix.lower()
    named: dict[str, Literal["csv", "jsonl", "parquet"]]
    named = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    return named.get(suffix, "table")


def _images(count: int) -> str:
    return f"{count:,} image" if count == 1 else f"{count:,} images"


def _pace(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _estimate(context: Context, model: Model, paths: list[str]) -> int | None:
    """Say how long the worst case of all images will take; how many they are, where that can be known."""
    from ratioctl.cli.evaluate import duration
    from ratioctl.scoring import pipeline as score

    if model.worst_case_pace is None or context.quiet:
        return None
    if "-" in paths:  # a list that is still being written
        each = model.worst_case_pace(score.MAX_BATCH)
        context.note(f"The worst case takes about {each:.2g} s an image.")
        return None
    total = sum(1 for _ in score.items_of(paths))
    each = model.worst_case_pace(total)
    context.note(f"This takes about {duration(total * each)}: {_images(total)}, {each:.2g} s each.")
    return total


@contextlib.contextmanager
def _progress(
    context: Context, *, shown: bool, total: int | None = None
) -> Iterator[Callable[[int, int, int], None]]:
    """Calls of the yielded function (images, flagged, unreadable) move a line on a terminal's stderr.

    Elsewhere they say something every tenth of the work where its `total` is known: it is long then.
    """
    from ratioctl.cli.evaluate import duration

    began = time.monotonic()
    of = "" if total is None else f" of {total:,}"

    def left(count: int) -> str:
        if total is None or not count:
            return ""
        return f", {duration((time.monotonic() - began) * max(total - count, 0) / count)} left"

    if context.quiet or not shown or not sys.stderr.isatty():
        tenth = 0

        def tell(count: int, out: int, failed: int) -> None:
            nonlocal tenth
            if total is not None and shown and tenth < 10 * count // total < 10:
                tenth = 10 * count // total
                context.note(f"{count / total:.0%} ({count:,}{of} images, {out:,} out){left(count)}")

        yield tell
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=context.console,
        transient=True,
    ) as bar:
        task = bar.add_task("listing images")

        def move(count: int, out: int, failed: int) -> None:
            pace = count / max(time.monotonic() - began, 1e-9)
            number = _images(count) if total is None else f"{count:,}{of} images"
            pace_left = f"{_pace(pace)} a second{left(count)}"
            bar.update(
                task,
                description=f"{number}, {out:,} out, {failed:,} unreadable, {pace_left}",
            )

        yield move
