"""Score rows as a table, CSV, JSON lines or Parquet, numbers of 9 digits, batch by batch onto a stream."""

from __future__ import annotations

import csv
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ratioctl.errors import UsageError
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from ratioctl.types import ScoreRow

FIXED = ("path", "label", "confidence", "ood_score", "is_ood", "error")
WORST = ("worst_case_confidence", "worst_case_is_ood")
PARQUET_ROWS = 16384  # of one row group: what is held before it is written
PATH_WIDTH = 40

Format = Literal["table", "csv", "jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = dict.fromkeys(("", ".txt"), "table")
_SUFFIXES |= {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
Write = Callable[[Sequence["ScoreRow"]], None]
Value = str | float | bool | None


def format_of(output: Path | None) -> Format:
    """The format that the name of a file asks for; a table without a file."""
    suffix = "" if output is None else output.suffix.lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(suffix for suffix in _SUFFIXES if suffix)
        raise UsageError(f"--output {output}", f"unknown ending {suffix}", f"Use {known}, or give --format.")
    return _SUFFIXES[suffix]


def columns(labels: Sequence[str] | None, *, worst_case: bool) -> list[str]:
    """Names of the columns; `labels` are given where probabilities are wanted."""
    return [*FIXED, *(f"p:{label}" for label in labels or ()), *(WORST if worst_case else ())]


def values(row: ScoreRow, names: Sequence[str]) -> list[Value]:
    """A row's values in the order of `names`, numbers rounded to 9 significant digits."""
    fixed = [getattr(row, name) for name in FIXED]
    worst = [getattr(row, name) for name in WORST] if names[-1] in WORST else []
    each: Sequence[Value] = row.probabilities or [None] * (len(names) - len(fixed) - len(worst))
    return [float(f"{v:.9g}") if isinstance(v, float) else v for v in (*fixed, *each, *worst)]


def writer(kind: str, stream: IO[bytes], names: Sequence[str], labels: Sequence[str]) -> tuple[Write, Any]:
    """(write, close) for rows in format `kind`. Writes the header at once; `close` leaves `stream` open."""
    if kind == "parquet":
        return _parquet(stream, names)
    if kind == "jsonl":

        def encode(rows: Sequence[ScoreRow]) -> str:
            return "".join(
                json.dumps(dict(zip(names, values(row, names), strict=True))) + "\n" for row in rows
            )

    elif kind == "csv":
        # A file gets every name as it is; a terminal would obey what stands in some.
        shown = safe_text if stream.isatty() else str

        def encode(rows: Sequence[ScoreRow]) -> str:
            return _csv([[shown(cell) for cell in _texts(values(row, names))] for row in rows])

        stream.write(_csv([[shown(name) for name in names]]).encode())
    else:
        widths = [PATH_WIDTH, *(len(name) for name in names[1:])]
        widths[1] = max(len("label"), *(len(safe_text(label)) for label in labels))
        for k, name in enumerate(names):
            if name not in ("path", "label", "is_ood", "error", "worst_case_is_ood"):
                widths[k] = max(widths[k], len("0.123456789"))

        def line(cells: Sequence[str]) -> str:
            padded = [safe_text(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)]
            return "  ".join(padded).rstrip() + "\n"

        def encode(rows: Sequence[ScoreRow]) -> str:
            return "".join(line(_texts(values(row, names))) for row in rows)

        stream.write(line([safe_text(name) for name in names]).encode())

    def write(rows: Sequence[ScoreRow]) -> None:
        stream.write(encode(rows).encode("utf-8", "backslashreplace"))
        stream.flush()

    stream.flush()
    return write, lambda: None


def _texts(cells: Sequence[Value]) -> list[str]:
    return [
        ""
        if v is None
        else ("false", "true")[v]
        if isinstance(v, bool)
        else f"{v:.9g}"
        if isinstance(v, float)
        else v
        for v in cells
    ]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    # Before Python 3.13 a carriage return in a name is quoted only where it is part of the line terminator.
    lines: list[str] = []
    csv.writer(types.SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def _parquet(stream: IO[bytes], names: Sequence[str]) -> tuple[Write, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {name: pa.string() for name in ("path", "label", "error")}
    kinds |= {name: pa.bool_() for name in ("is_ood", "worst_case_is_ood")}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    file = parquet.ParquetWriter(pa.PythonFile(stream, mode="w"), schema)
    held: list[list[Value]] = []

    def flush() -> None:
        if held:
            arrays = [
                pa.array(column, kind)
                for column, kind in zip(zip(*held, strict=True), schema.types, strict=True)
            ]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema))
            held.clear()

    def write(rows: Sequence[ScoreRow]) -> None:
        held.extend(values(row, names) for row in rows)
        if len(held) >= PARQUET_ROWS:
            flush()

    def close() -> None:
        flush()
        file.close()
        stream.flush()

    return write, close
