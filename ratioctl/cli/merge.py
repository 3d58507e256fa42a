"""`ratioctl merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json

Parts = Annotated[
    list[str],
    typer.Argument(
        metavar="PART",
        help="What each shard wrote: the --output file of `ood-score --shard`, or the --out folder of "
        "`evaluate --shard`.",
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        metavar="FILE|URL",
        help="Where the rows go (.csv, .jsonl or .parquet); of evaluations the folder of the reports.",
    ),
]


@command(unused=COMPUTE)
def merge(context: Context, parts: Parts, output: Output) -> int | None:
    """Join what shards wrote into what an unsharded run writes.

    Refuses shards that are missing, doubled, of another model or of other settings. An evaluation is merged
    where its data and models are, on the kind of device that the shards ran on.
    """
    from ratioctl.cli import _row_shards, _rows
    from ratioctl.evaluation import sharding

    if any(sharding.is_shard(Path(part)) for part in parts):
        return _merge_evaluations(context, [Path(part) for part in parts], Path(output))
    located = [_rows.located(part) for part in parts]
    counts = _row_shards.merge(located, _rows.located(output))
    if context.json:
        emit_json({"parts": len(parts), **counts, "output": output})
    context.note(
        f"{counts['images']:,} images of {len(parts):,} shards: {counts['out_of_distribution']:,} out of "
        f"distribution, {counts['errors']:,} could not be read. Written: {output}"
    )
    return None


def _merge_evaluations(context: Context, folders: Sequence[Path], out: Path) -> int | None:
    from ratioctl.cli._progress import Progress
    from ratioctl.cli.evaluate import Events, present
    from ratioctl.evaluation.merging import merge as join
    from ratioctl.report import evaluation_files

    evaluation_files.refuse_foreign(out)
    written: list[Path] = []
    with Progress(context, total=1.0) as progress:
        events = Events(progress)
        evaluation = join(
            folders,
            out,
            callback=events,
            finish=lambda found: written.extend(evaluation_files.write(found, out)),
        )
    present(context, evaluation, [*written, *events.files], [])
    return 3 if any(entry["unreadable"] for entry in evaluation.data) else None
