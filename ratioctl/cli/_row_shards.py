"""Row files of shards: what `ood-score --shard` records beside one, and how `merge` joins them.

Beside FILE stands `FILE.shard.json`. It is written last, so a file without it is not finished.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import heapq
import importlib.metadata
import io
import itertools
import json
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from ratioctl.cli import _rows
from ratioctl.cli._rows import Target, Value
from ratioctl.errors import OutputError, SourceError, UsageError
from ratioctl.utils import remote
from ratioctl.utils.sharding import Shard, in_order

if TYPE_CHECKING:
    from ratioctl.scoring.listing import Listing
    from ratioctl.scoring.pipeline import Model

SCHEMA = "ratioctl/score-shard/1"
ENDING = ".shard.json"
AGAIN = "Score that shard again with `ratioctl ood-score --shard`."
_BATCH = 4096  # merged rows that are written together


def record_of(output: Target) -> Target:
    return _rows.beside(output, ENDING)


def settings_of(opened: Model, model: str, bound: float, options: dict[str, Any]) -> dict[str, Any]:
    """What determines rows besides the images, by the name that messages give it.

    Args:
        bound: value of the threshold.
        options: further settings.
    """
    from ratioctl.scoring.backends import digest_of

    return {
        "model": digest_of(model),
        "threshold": float(bound),
        "thresholds per class": list(getattr(bound, "classes", None) or ()),
        "score": opened.score,
        "backend": opened.backend,
        **options,
        "ratioctl": importlib.metadata.version("ratioctl"),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOutput:
    """The row file that one shard writes."""

    output: Target
    format: str
    shard: Shard

    @classmethod
    def of(cls, shard: str | None, output: Target | None, row_format: str) -> ShardOutput | None:
        """None without a shard. Raises UsageError where `merge` could not read the rows."""
        if shard is None:
            return None
        parsed = Shard.parse(shard)
        if output is None or row_format == "table":
            step = "Name a .csv, .jsonl or .parquet file, one for each shard."
            raise UsageError("--shard", "needs --output, which `ratioctl merge` joins", step)
        return cls(output=output, format=row_format, shard=parsed)

    def begin(self) -> None:
        """Remove the record of an earlier run, whose rows are about to be replaced."""
        from ratioctl.utils.atomic_files import writing

        record = record_of(self.output)
        if isinstance(record, Path):
            with writing(record):
                record.unlink(missing_ok=True)
            return
        try:
            remote.delete(record)
        except remote.RemoteError as error:
            raise error.of(OutputError, record) from None

    def finish(self, rows: int, listing: Listing, settings: dict[str, Any]) -> None:
        """Record that the row file is finished; `settings` are those of `settings_of`."""
        record = {
            "schema": SCHEMA,
            "shard": str(self.shard),
            "format": self.format,
            "rows": rows,
            "collection": listing.facts(),
            "settings": settings,
        }
        _rows.write_bytes(record_of(self.output), (json.dumps(record, indent=1) + "\n").encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A finished row file of one shard."""

    path: Target
    shard: Shard
    format: str
    rows: int
    collection: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def read(cls, path: Target) -> Part:
        """Raises SourceError: no row file of a finished shard."""
        try:
            there = path.is_file() if isinstance(path, Path) else remote.info(path) is not None
        except remote.RemoteError as error:
            raise error.of(SourceError, str(path)) from None
        if not there:
            raise SourceError(path, "does not exist or is not a file", "Give the --output of each shard.")
        try:
            record = json.loads(_rows.read_bytes(record_of(path)))
            if record["schema"] != SCHEMA:
                raise ValueError(record["schema"])
            return cls(
                path=path,
                shard=Shard.parse(record["shard"]),
                format=record["format"],
                rows=int(record["rows"]),
                collection=dict(record["collection"]),
                settings=dict(record["settings"]),
            )
        except (FileNotFoundError, remote.RemoteError) as error:
            if isinstance(error, remote.RemoteError) and not error.missing:
                raise error.of(SourceError, str(path)) from None
            reason = f"is not a finished shard: {PurePath(record_of(path)).name} is missing beside it"
            raise SourceError(path, reason, AGAIN) from None
        except (OSError, ValueError, KeyError, TypeError, UsageError, RecursionError):
            raise SourceError(record_of(path), "cannot be read", AGAIN) from None


def complete(parts: Sequence[Part]) -> list[Part]:
    """The parts in the order of their shards.

    Raises:
        SourceError: a shard that is missing, given twice or of other settings; a collection that changed.
    """
    return in_order(
        parts,
        place=lambda part: part.path,
        compare=_compare,
        foreign_step="Merge the parts of one collection.",
        missing_step="Score it, or add its output to the command.",
    )


def _compare(part: Part, first: Part) -> None:
    for name in dict.fromkeys([*first.settings, *part.settings]):
        mine, others = part.settings.get(name), first.settings.get(name)
        if mine != others:
            reason = f"was scored with {name} {mine!r}, but {first.path} with {others!r}"
            raise SourceError(part.path, reason, "Score all shards with the same settings.")
    if part.collection != first.collection:
        counts = f"{part.collection.get('images')} images, {first.path} {first.collection.get('images')}"
        reason = f"listed another collection than the others ({counts})"
        step = "It changed between the runs. Score the shards again while it does not change."
        raise SourceError(part.path, reason, step)


def merge(parts: Sequence[Target], output: Target) -> dict[str, int]:
    """Write the rows of all shards in the order of the unsharded run; counts of them.

    Raises:
        SourceError: as `complete`, and for rows that are missing, doubled or damaged. `output` is not
            written then.
    """
    ordered = complete([Part.read(path) for path in parts])
    if any(str(output) == str(part.path) for part in ordered):
        raise UsageError(f"--output {output}", "is one of the parts", "Choose another file.")
    row_format = _rows.format_of(output)
    if row_format == "table":
        raise UsageError(f"--output {output}", "is not a format of rows", "Use .csv, .jsonl or .parquet.")
    _rows.refuse_foreign(output)
    readers = [_Reader(part) for part in ordered]
    names = next((reader.names for reader in readers if reader.names), None)
    if names is None:
        raise SourceError("merge", "the shards hold no rows", AGAIN)
    for reader in readers:
        if reader.names and reader.names != names:
            raise SourceError(reader.part.path, "has other columns than the other shards", AGAIN)
    counts = {"images": 0, "out_of_distribution": 0, "errors": 0}
    kept = [name for name in names if name != _rows.INDEX]
    with (
        _rows.staged(output) as file,
        _rows.opened_values(file, row_format, kept, ()) as write,
        contextlib.ExitStack() as stack,
    ):
        streams = [stack.enter_context(contextlib.closing(reader.rows())) for reader in readers]
        for batch in _batched(_with_duplicates(_in_order(streams, ordered), kept)):
            write(batch)
            counts["images"] += len(batch)
            counts["out_of_distribution"] += sum(row[kept.index("is_ood")] is True for row in batch)
            counts["errors"] += sum(row[kept.index("error")] is not None for row in batch)
        if counts["images"] != ordered[0].collection["images"]:
            reason = f"hold {counts['images']:,} of {ordered[0].collection['images']:,} images"
            raise SourceError("the shards", reason, AGAIN)
    return counts


def _in_order(
    streams: Sequence[Iterator[tuple[int, list[Value]]]], parts: Sequence[Part]
) -> Iterator[list[Value]]:
    """All rows by index, each of which occurs once."""
    named = [((index, k, row) for index, row in stream) for k, stream in enumerate(streams)]
    merged = heapq.merge(*named, key=lambda found: found[0])
    for wanted, (index, k, row) in enumerate(merged):
        if index < wanted:
            raise SourceError(parts[k].path, f"holds image {index} ({row[0]}) a second time", AGAIN)
        if index > wanted:
            raise SourceError("the shards", f"lack image {wanted}, which none of them holds", AGAIN)
        yield row


def _with_duplicates(rows: Iterator[list[Value]], names: Sequence[str]) -> Iterator[list[Value]]:
    """The rows with the column "duplicate", which compares with the image before, of another shard."""
    if "duplicate" not in names:
        yield from rows
        return
    at, digest_at = names.index("duplicate"), names.index("pixels_sha256")
    previous: Value = None
    for row in rows:
        if row[digest_at] is not None:
            row[at] = row[digest_at] == previous
            previous = row[digest_at]
        yield row


def _batched(rows: Iterator[list[Value]]) -> Iterator[list[list[Value]]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


class _Reader:
    """The rows of one file; `names` are its columns, empty if there are no rows."""

    def __init__(self, part: Part) -> None:
        self.part = part
        with contextlib.closing(self._raw()) as raw:
            self.names: list[str] = next(raw, ([], []))[0]
        if self.names and self.names[-1] != _rows.INDEX:
            raise SourceError(part.path, "has no column index as its last", AGAIN)

    def rows(self) -> Generator[tuple[int, list[Value]], None, None]:
        """(index, values without it), checked for ascending indices and the recorded number of rows."""
        count, last = 0, -1
        for names, row in self._raw():
            if names != self.names or len(row) != len(names):
                raise SourceError(self.part.path, f"row {count + 1} has other columns", AGAIN)
            *kept, index = row
            if not isinstance(index, int) or index <= last:
                raise SourceError(self.part.path, f"row {count + 1} is out of order", AGAIN)
            count, last = count + 1, index
            yield index, kept
        if count != self.part.rows:
            reason = f"holds {count:,} rows, but {self.part.rows:,} were written"
            raise SourceError(self.part.path, reason, AGAIN)

    def _raw(self) -> Generator[tuple[list[str], list[Value]], None, None]:
        """(columns, values) of each row."""
        read = {"csv": _csv_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows}[self.part.format]
        try:
            yield from read(self.part.path)
        except (OSError, ValueError, KeyError, csv.Error) as error:  # pyarrow's errors are ValueErrors
            raise SourceError(self.part.path, f"cannot be read: {error}", AGAIN) from None


def _opened(path: Target) -> BinaryIO:
    if isinstance(path, Path):
        return path.open("rb")
    try:
        return remote.open_stream(path)
    except remote.RemoteError as error:
        raise OSError(error.reason) from None


def _csv_rows(path: Target) -> Iterator[tuple[list[str], list[Value]]]:
    with _opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        for line in lines:
            row = [_value(name, text) for name, text in zip(names, line, strict=True)]
            if "notes" in names and row[names.index("error")] is None:
                row[names.index("notes")] = line[names.index("notes")]  # empty, not missing
            yield names, row


def _value(name: str, text: str) -> Value:
    """A CSV cell as `_rows.values` has it."""
    if not text:
        return None
    if name in _rows.TEXTS:
        return text
    if name in _rows.FLAGS:
        return {"true": True, "false": False}[text]
    return int(text) if name in _rows.COUNTS else float(text)


def _jsonl_rows(path: Target) -> Iterator[tuple[list[str], list[Value]]]:
    with _opened(path) as file:
        for line in file:
            row = json.loads(line)
            yield list(row), list(row.values())


def _parquet_rows(path: Target) -> Iterator[tuple[list[str], list[Value]]]:
    import pyarrow.parquet as pq

    with _opened(path) as stream, pq.ParquetFile(stream) as file:
        names = list(file.schema_arrow.names)
        for batch in file.iter_batches():
            columns = [column.to_pylist() for column in batch.columns]
            for row in zip(*columns, strict=True):
                # A double column may hold NaN only where the file was damaged.
                if any(isinstance(value, float) and math.isnan(value) for value in row):
                    raise ValueError("it holds NaN")
                yield names, list(row)
