"""Local Hugging Face data sets: what `datasets` saves to disk (Arrow), and Parquet files of images.

The image column holds structs {bytes, path} or encoded bytes. Its name and the names of the classes come from
the schema's "huggingface" metadata if there is any, else from the types of the columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratioctl.data.registry import SourceRequest, register_source
from ratioctl.errors import ImageError, SourceError
from ratioctl.utils import resources
from ratioctl.utils.ordered_pool import map_batches
from ratioctl.utils.suggest import did_you_mean
from ratioctl.utils.text import nfc, shown

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ratioctl.data.image_set import Images
    from ratioctl.images.cache import Rows

_IMAGES, _LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label", "class", "target")
_SPLIT = re.compile(r"(.+?)-\d+(-of-\d+)?\.parquet|(.+)\.parquet")
_ROWS = 64  # of a batch that is decoded at once


@register_source(
    "hf",
    usage="hf:PATH[:SPLIT]",
    description="a local Hugging Face data set (`save_to_disk`) or Parquet files of images",
)
def huggingface(request: SourceRequest) -> Images:
    """Decoded images are kept in the cache, unless some of them are files beside the data set."""
    from ratioctl.images import cache

    folder, files = _files(request)
    facts = ["hf", request.frame.facts, request.channels]
    key = cache.key_of(facts, [(str(file.resolve()), str(file)) for file in files])
    known = None if key is None else _cached(request, key)
    if known is not None:
        return known
    rows = cache.Rows(key, (request.frame.height, request.frame.width, request.channels), request.source)
    try:
        with _errors_of(request.source):
            columns = _columns(request.source, _schema(files[0]))
            rows.expect(sum(map(_count, files)))
            values, errors, whole = _decode_all(request, folder, _rows(files, columns), rows)
        if not values:
            reason = f"{shown(errors[0][0])} {errors[0][1]}" if errors else "it has no rows"
            raise SourceError(request.source, f"has no readable image; {reason}", "Check the data set.")
        labels, names = _labels(request.source, values, columns)
        found = dataclasses.replace(request.images(rows.images(), labels, names), errors=tuple(errors))
        if whole:
            numbers = None if labels is None else labels.tolist()
            meta = {
                "labels": numbers,
                "label_names": names,
                "errors": errors,
                "fingerprint": found.fingerprint,
            }
            rows.file_under_key(meta)
        return found
    finally:
        rows.discard()


def _cached(request: SourceRequest, key: str) -> Images | None:
    """What an earlier call decoded; None where there is nothing, or it was changed since."""
    import numpy as np

    from ratioctl.data.image_set import Images
    from ratioctl.images import cache

    found = cache.read(key)
    if found is None or not found[2]:
        return None
    pixels, meta, _ = found
    try:
        labels = None if meta["labels"] is None else np.array(meta["labels"], dtype=np.int64)
        return Images(
            pixels=pixels,
            labels=labels,
            label_names=tuple(meta["label_names"]),
            fingerprint=meta["fingerprint"],
            source=request.source,
            errors=tuple((str(name), str(reason)) for name, reason in meta["errors"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _decode_all(
    request: SourceRequest, folder: Path, listed: Iterator[_Row], rows: Rows
) -> tuple[list[Any], list[tuple[str, str]], bool]:
    """(labels, unreadable images, whether the data set holds all images itself); images go into `rows`."""
    values: list[Any] = []
    errors: list[tuple[str, str]] = []
    whole = True
    batches = map_batches(
        listed,
        lambda batch: [(row, _decoded(row, request, folder)) for row in batch],
        batch=_ROWS,
        workers=resources.processors(),
        weigh=lambda row: len(row.data or b""),
        max_weight=2**24,
        name="decode",
    )
    with contextlib.closing(batches):
        for row, result in itertools.chain.from_iterable(batches):
            whole &= row.data is not None or not row.path
            if isinstance(result, str):
                errors.append((row.name, result))
                continue
            rows.append(result)
            values.append(row.label)
    return values, errors, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Columns:
    image: str
    label: str | None
    class_names: tuple[str, ...]  # of a ClassLabel


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    name: str
    data: bytes | None
    path: str | None
    label: Any


@contextlib.contextmanager
def _errors_of(source: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise SourceError(
            source, f"is damaged or not a data set of images: {reason}", "Save it again."
        ) from None


def _files(request: SourceRequest) -> tuple[Path, list[Path]]:
    """(the folder of the data set, its Arrow or Parquet files). Raises SourceError."""
    path, split = Path(request.argument), ""
    if not request.argument or not path.exists():
        left, _, split = request.argument.rpartition(":")
        path = Path(left)
        if not left or not path.exists():
            step = "Use hf:PATH or hf:PATH:SPLIT with a folder or a Parquet file."
            raise SourceError(request.source, f'"{request.argument}" does not exist', step)
    if path.is_file():
        if split:
            raise SourceError(request.source, "is one file, which has no splits", "Leave out the split.")
        return path.parent, [path]
    saved = [path] if (path / "state.json").is_file() else []
    splits = {
        **{p.parent.name: sorted(p.parent.glob("*.arrow")) for p in sorted(path.glob("*/state.json"))},
        **_parquet_splits(path),
    }
    if saved and not split:
        splits = {"": sorted(path.glob("*.arrow"))}
    files = splits.get(split) if split or len(splits) != 1 else next(iter(splits.values()))
    if files:
        return path, files
    known = ", ".join(f"hf:{path}:{name}" for name in splits if name)
    if not splits:
        raise SourceError(request.source, "holds no Arrow or Parquet files", "Save it with `save_to_disk`.")
    reason = f'has no split "{split}"' if split else f"has the splits {', '.join(splits)}"
    raise SourceError(request.source, reason, f"{did_you_mean(split, splits)} Use one of: {known}.".lstrip())


def _parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """Parquet files by split, as the Hub names them (`data/train-00000-of-00001.parquet`)."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        match = _SPLIT.fullmatch(path.name)
        assert match is not None
        splits.setdefault(match[1] or match[3], []).append(path)
    return splits


def _schema(path: Path) -> pa.Schema:
    import pyarrow.parquet as pq

    return pq.read_schema(path) if path.suffix == ".parquet" else _arrow(path).schema


def _arrow(path: Path) -> Any:
    """A reader of Arrow batches: `datasets` writes the stream format, other tools also the file format."""
    import pyarrow as pa

    stream = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_file(stream)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS, columns=list(columns))
        return
    reader = _arrow(path)
    at_random = hasattr(reader, "get_batch")
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if at_random else reader:
        yield batch.select(list(columns))


def _count(path: Path) -> int:
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    return sum(batch.num_rows for batch in _batches(path, []))


def _columns(source: str, schema: pa.Schema) -> _Columns:
    import pyarrow as pa

    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = info.get("info", {}).get("features", {})
    types = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}

    def holds_images(field: pa.Field) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    fields = [field for field in schema if types.get(field.name, "Image") == "Image" and holds_images(field)]
    image = _preferred([field.name for field in fields], _IMAGES)
    if image is None:
        known = ", ".join(f"{field.name} ({field.type})" for field in schema)
        step = "Images are structs {bytes, path} or encoded bytes."
        raise SourceError(source, f"has no column of images; its columns are {known}", step)
    classes = [name for name, kind in types.items() if kind == "ClassLabel" and name in schema.names]
    label = _preferred(classes, _LABELS) or next((n for n in _LABELS if n in schema.names), None)
    names = features[label].get("names") or [] if label in classes else []
    return _Columns(image=image, label=label, class_names=tuple(nfc(str(name)) for name in names))


def _preferred(names: Sequence[str], order: Sequence[str]) -> str | None:
    return next((name for name in order if name in names), names[0] if names else None)


def _rows(files: Sequence[Path], columns: _Columns) -> Iterator[_Row]:
    wanted = [columns.image] + ([columns.label] if columns.label else [])
    for file in files:
        number = 0
        for whole in _batches(file, wanted):
            for start in range(0, len(whole), _ROWS):  # Arrow files may be one batch
                batch = whole.slice(start, _ROWS)
                labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(batch)
                for value, label in zip(batch.column(columns.image).to_pylist(), labels, strict=True):
                    struct = value if isinstance(value, dict) else {"bytes": value}
                    yield _Row(
                        name=f"{file.name}:{number}",
                        data=struct.get("bytes"),
                        path=struct.get("path"),
                        label=label,
                    )
                    number += 1


def _decoded(row: _Row, request: SourceRequest, folder: Path) -> np.ndarray | str:
    """(H, W, C) uint8, or why the image cannot be read."""
    from ratioctl.images import decode, read_file

    try:
        data = row.data
        if data is None and row.path:
            file = (folder / row.path).resolve()
            if not file.is_relative_to(folder.resolve()):
                return "has no bytes, and its file is not below the data set's folder"
            data = read_file(file)
        if data is None:
            return "has no bytes"
        return decode(data, request.size, request.channels, name=row.name).pixels
    except ImageError as error:
        return error.reason


def _labels(
    source: str, values: Sequence[Any], columns: _Columns
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(N,) int64 labels and their names; None for a data set without labels (no column, or all are -1)."""
    import numpy as np

    if columns.label is None or all(value is None or value == -1 for value in values):
        return None, ()
    names = columns.class_names
    if names:
        wrong = next((v for v in values if not isinstance(v, int) or not 0 <= v < len(names)), None)
        numbers = values
    else:
        wrong = next((v for v in values if not isinstance(v, int | str) or isinstance(v, bool)), None)
        distinct = sorted({nfc(v) if isinstance(v, str) else v for v in values if v is not None}, key=_order)
        number = {value: k for k, value in enumerate(distinct)}
        names = tuple(str(value) for value in distinct)
        numbers = [number.get(nfc(v) if isinstance(v, str) else v) for v in values]
    if wrong is not None or any(value is None for value in values):
        reason = f'its column "{columns.label}" holds {wrong!r}, which is not a label'
        raise SourceError(source, reason, "Labels are text, or whole numbers; all rows need one.")
    return np.array(numbers, dtype=np.int64), names


def _order(value: int | str) -> tuple[bool, int, str]:
    return (isinstance(value, str), 0 if isinstance(value, str) else value, str(value))
