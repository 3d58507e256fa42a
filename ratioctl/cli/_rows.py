"""Score rows as a table, CSV, JSON lines or Parquet, numbers of 9 digits, batch by batch onto a stream."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

from ratioctl.errors import OutputError, RatioctlError, UsageError
from ratioctl.utils import remote
from ratioctl.utils.remote import is_url
from ratioctl.utils.text import clipped, safe_text

if TYPE_CHECKING:
    from ratioctl.types import ScoreRow

FIXED = ("path", "label", "confidence", "ood_score", "is_ood", "error")
WORST = ("worst_case_confidence", "worst_case_is_ood")
GUARANTEED = ("guaranteed_confidence",)
EXPLAIN = ("margin", "runner_up", "percentile", "reason")
CHECKS = ("width", "height", "blank", "saturated", "duplicate", "notes", "pixels_sha256")
INDEX = "index"  # of a shard's rows: place among the images of all shards
MORE = frozenset((*WORST, *GUARANTEED, *EXPLAIN, *CHECKS, INDEX))
TEXTS = frozenset(("path", "label", "error", "runner_up", "reason", "notes", "pixels_sha256"))
FLAGS = frozenset(("is_ood", "worst_case_is_ood", "blank", "saturated", "duplicate"))
COUNTS = frozenset(("width", "height", INDEX))
PARQUET_ROWS = 16384  # of one row group: what is held before it is written
PATH_WIDTH, MAX_PATH_WIDTH = 40, 100  # of a table's column; a longer path pushes its row
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # OWASP, "CSV Injection"

Format = Literal["table", "csv", "jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = dict.fromkeys(("", ".txt"), "table")
_SUFFIXES |= {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
Write = Callable[[Sequence["ScoreRow"]], None]
Value = str | float | bool | int | None
Target = Path | str  # a file, or the URL of one
WriteValues = Callable[[Sequence[Sequence[Value]]], None]
Encode = Callable[[Sequence[Sequence[Value]]], str]


def located(argument: str) -> Target:
    """A path, or a URL as it is."""
    return argument if is_url(argument) else Path(argument)


def target(output: str | None) -> Target | None:
    """Where --output writes."""
    return None if output is None else located(output)


def beside(output: Target, ending: str) -> Target:
    """The file with the output's name and an ending."""
    return output + ending if isinstance(output, str) else output.with_name(output.name + ending)


def read_bytes(output: Target) -> bytes:
    """Raises OSError, remote.RemoteError."""
    return remote.read(output) if isinstance(output, str) else output.read_bytes()


def write_bytes(output: Target, data: bytes) -> None:
    """Raises OutputError, DiskError."""
    from ratioctl.utils.atomic_files import write_file

    if not isinstance(output, str):
        write_file(output, data)
        return
    try:
        remote.write(output, data)
    except remote.RemoteError as error:
        raise error.of(OutputError, output) from None


@contextlib.contextmanager
def staged(output: Target) -> Iterator[Path]:
    """A path to write to, which becomes `output` at the end of the block; after an error nothing is left.

    Raises:
        OutputError: a URL that cannot be written.
    """
    import tempfile

    from ratioctl.utils.atomic_files import partial

    if isinstance(output, Path):
        try:
            yield output
        except RatioctlError:
            partial(output).unlink(missing_ok=True)
            raise
        return
    with tempfile.TemporaryDirectory(prefix="ratioctl-") as folder:
        whole = Path(folder) / "rows"
        yield whole
        try:
            remote.put(str(whole), output, whole.stat().st_size)
        except remote.RemoteError as error:
            raise error.of(OutputError, output) from None


def format_of(output: Target | None) -> Format:
    """The format that the name of a file asks for; a table without a file."""
    suffix = "" if output is None else PurePosixPath(output).suffix.lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(suffix for suffix in _SUFFIXES if suffix)
        raise UsageError(f"--output {output}", f"unknown ending {suffix}", f"Use {known}, or give --format.")
    return _SUFFIXES[suffix]


def columns(
    labels: Sequence[str] | None,
    *,
    worst_case: bool,
    certified: bool = False,
    explain: bool = False,
    checks: bool = False,
    shard: bool = False,
) -> list[str]:
    """Names of the columns; `labels` are given where probabilities are wanted."""
    wanted = (
        (WORST, worst_case),
        (GUARANTEED, certified),
        (EXPLAIN, explain),
        (CHECKS, checks),
        ((INDEX,), shard),
    )
    more = [name for names, on in wanted if on for name in names]
    return [*FIXED, *(f"p:{label}" for label in labels or ()), *more]


def values(row: ScoreRow, names: Sequence[str]) -> list[Value]:
    """A row's values in the order of `names`, numbers rounded to 9 significant digits."""
    end = len(names)
    while names[end - 1] in MORE:
        end -= 1
    fixed = [getattr(row, name) for name in FIXED]
    more = [getattr(row, name) for name in names[end:]]
    each: Sequence[Value] = row.probabilities or [None] * (end - len(fixed))
    return [float(f"{v:.9g}") if isinstance(v, float) else v for v in (*fixed, *each, *more)]


@contextlib.contextmanager
def opened(
    output: Path | None, kind: Format, names: Sequence[str], labels: Sequence[str], *, csv_safe: bool = False
) -> Iterator[Write]:
    """A function that writes rows to `output`, else to stdout; see `opened_values`."""
    with opened_values(output, kind, names, labels, csv_safe=csv_safe) as write:
        yield lambda rows: write([values(row, names) for row in rows])


@contextlib.contextmanager
def opened_values(
    output: Path | None, kind: Format, names: Sequence[str], labels: Sequence[str], *, csv_safe: bool = False
) -> Iterator[WriteValues]:
    """A function that writes rows of `values` to `output`, else to stdout; a header comes with the first
    rows, or at the end where there are none.

    CSV in a file holds every name exactly. On stdout, which may lead to a terminal through a pipe, control
    characters are escaped, in CSV as in a table; JSON lines are ASCII.

    Args:
        names: of the columns.
        labels: of the model, which set the width of a table's column.
        csv_safe: put an apostrophe before text cells of CSV that a spreadsheet would run as a formula.
    """
    from ratioctl.utils.atomic_files import streaming

    with contextlib.nullcontext(sys.stdout.buffer) if output is None else streaming(output) as stream:
        if kind == "parquet":
            write, close = parquet_writer(stream, names)
            try:
                yield write
            finally:
                close()
            return
        exact = output is not None and not stream.isatty()
        if kind == "jsonl":
            header, encode = "", _jsonl(names)
        elif kind == "csv":
            header, encode = _csv_with(names, str if exact else safe_text, csv_safe=csv_safe)
        else:
            header, encode = "", _Table(names, labels)
        started = False

        def put(rows: Sequence[Sequence[Value]]) -> None:
            nonlocal started
            text = encode(rows) if started else header + encode(rows)
            started = True
            stream.write(text.encode("utf-8", "backslashreplace"))
            stream.flush()

        yield put
        if not started:
            put(())


def refuse_foreign(output: Target | None) -> None:
    """Raise OutputError where `output` is a file that `ood-score` did not write; it would be replaced."""
    if output is None:
        return
    if isinstance(output, str):
        try:
            found = remote.info(output)
            if found is None or not found.size:
                return
            file: IO[bytes] = remote.open_stream(output)
        except remote.RemoteError as error:
            raise error.of(OutputError, output) from None
    elif not output.is_file() or not output.stat().st_size:
        return
    else:
        file = output.open("rb")
    with file:
        start = file.read(64)
        if start.startswith(b"PAR1"):
            import pyarrow.parquet as pq

            with contextlib.suppress(Exception):
                if pq.read_schema(file).names[:2] == ["path", "label"]:
                    return
            start = b""
    if start.startswith((b"path,label,", b'{"path": ', b"path  ")):
        return
    raise OutputError(
        output, "exists and holds no rows of ood-score", "Delete it, or choose another --output."
    )


def _jsonl(names: Sequence[str]) -> Encode:
    def encode(rows: Sequence[Sequence[Value]]) -> str:
        return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)

    return encode


def _csv_with(names: Sequence[str], shown: Callable[[str], str], *, csv_safe: bool) -> tuple[str, Encode]:
    def cell(value: Value) -> str:
        text = _text(value)
        if csv_safe and isinstance(value, str) and text.startswith(FORMULA_STARTS):
            text = "'" + text
        return shown(text)

    def encode(rows: Sequence[Sequence[Value]]) -> str:
        return _csv([[cell(value) for value in row] for row in rows])

    return _csv([[cell(name) for name in names]]), encode


class _Table:
    """Columns of fixed width, because rows are written as they come: the first ones set the width of the
    path within limits.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str]) -> None:
        self._begun = False
        self._heads = [clipped(name) for name in names]
        self._widths = [PATH_WIDTH, *(len(head) for head in self._heads[1:])]
        self._widths[1] = max(len("label"), *(len(clipped(label)) for label in labels))
        for k, name in enumerate(names):
            if name not in TEXTS | FLAGS | COUNTS:
                self._widths[k] = max(self._widths[k], len("0.123456789"))

    def __call__(self, rows: Sequence[Sequence[Value]]) -> str:
        lines = [] if self._begun else [self._heads]
        for row in rows:
            path, label, *rest = map(_text, row)
            lines.append([safe_text(path), clipped(label), *map(safe_text, rest)])
        if not self._begun:
            longest = max(len(cells[0]) for cells in lines)
            self._begun, self._widths[0] = True, min(max(PATH_WIDTH, longest), MAX_PATH_WIDTH)
        return "".join(map(self._line, lines))

    def _line(self, cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        return "  ".join(padded).rstrip() + "\n"


def _text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    # Before Python 3.13 a carriage return in a name is quoted only where it is part of the line terminator.
    lines: list[str] = []
    csv.writer(types.SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def parquet_writer(stream: IO[bytes], names: Sequence[str]) -> tuple[WriteValues, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(FLAGS, pa.bool_())
    kinds |= dict.fromkeys(COUNTS, pa.int64())
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    file = parquet.ParquetWriter(pa.PythonFile(stream, mode="w"), schema)
    held: list[Sequence[Value]] = []

    def flush() -> None:
        if held:
            arrays = [
                pa.array(column, kind)
                for column, kind in zip(zip(*held, strict=True), schema.types, strict=True)
            ]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema))
            held.clear()

    def write(rows: Sequence[Sequence[Value]]) -> None:
        held.extend(rows)
        if len(held) >= PARQUET_ROWS:
            flush()

    def close() -> None:
        flush()
        file.close()
        stream.flush()

    return write, close
