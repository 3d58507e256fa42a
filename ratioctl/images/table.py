"""Tables of images: CSV or Parquet files with the columns `path` and `label`, and optionally `split`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping

from ratioctl.errors import SourceError
from ratioctl.images.archive import Member
from ratioctl.images.files import open_binary
from ratioctl.utils.remote import is_url
from ratioctl.utils.text import shown

SUFFIXES = (".csv", ".parquet")
_PATHS, _LABELS = ("path", "file", "filename", "image"), ("label", "class", "target")
_HOW = "Name a column path and a column label; paths are relative to the table's folder."


def is_table(path: str | os.PathLike[str]) -> bool:
    """True for the name of a .csv or .parquet file."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def table_members(path: str) -> Iterator[Member]:
    """The images of a table, named `SPLIT/LABEL/PATH` or `LABEL/PATH`; without labels by their path alone.

    Raises:
        SourceError: not a table, a missing column, a row without path, or a label that is empty or has a "/".
    """
    rows = _parquet(path) if path.lower().endswith(".parquet") else _csv(path)
    folder = path.rpartition("/")[0] if is_url(path) else os.path.dirname(os.path.abspath(path))
    for number, row in rows:
        file = _value(row, _PATHS)
        label = _value(row, _LABELS)
        if not file:
            raise SourceError(shown(path), f"row {number} has no path", _HOW)
        name = os.path.normpath(file).lstrip("/").replace("../", "")
        if label is None:
            name = name.replace("/", ":")  # folders of unlabelled images are no classes
        elif not label.strip() or "/" in label:
            raise SourceError(shown(path), f"row {number} has the label {label!r}", 'Use names without "/".')
        else:
            name = f"{label}/{name}"
        if split := row.get("split"):
            name = f"{split}/{name}"
        yield Member(name=name, file=file if is_url(file) else os.path.join(folder, file))


def _value(row: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _csv(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(shown(path), f"cannot be read as CSV: {error}", _HOW) from None


def _parquet(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_binary(path) as stream:
            file = pq.ParquetFile(stream)
            _check_columns(path, file.schema_arrow.names)
            known = [n for n in file.schema_arrow.names if n.lower() in (*_PATHS, *_LABELS, "split")]
            number = 0
            for batch in file.iter_batches(columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {k.lower(): str(v) for k, v in row.items() if v is not None}
    except (pa.ArrowException, OSError) as error:
        raise SourceError(shown(path), f"cannot be read as Parquet: {error}", _HOW) from None


def _check_columns(path: str, names: object) -> None:
    found = [str(name).strip().lower() for name in names]  # type: ignore[attr-defined]
    if not set(found) & set(_PATHS):
        columns = ", ".join(shown(name) for name in found) or "none"
        step = _HOW
        if path.lower().endswith(".parquet"):
            step += f" For Parquet files that hold the images themselves use hf:{path}."
        raise SourceError(shown(path), f"has no column of paths; its columns are {columns}", step)
