"""Parquet files with a column of encoded images, as Hugging Face `datasets` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ratioctl.images.archive import DamagedArchiveError, Member
from ratioctl.images.files import open_binary
from ratioctl.utils.text import readable, shown

_IMAGES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "bytes", "content")
_KEYS = ("__key__", "key", "id", "image_id", "file_name", "filename", "path", "name")
_ROWS = 64  # that are held at once


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def parquet_members(path: str) -> Iterator[Member]:
    """One image per row, named by the row's key, else by the path in its image, else by its number from 0.

    The image column holds structs {bytes, path} or encoded bytes.

    Raises:
        DamagedArchiveError: not a Parquet file, damaged, or without such a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_binary(path) as stream:
            file = pq.ParquetFile(stream)
            image, key = _columns(file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[image, *([key] if key else [])]):
                images = batch.column(image).to_pylist()
                keys = batch.column(key).to_pylist() if key else [None] * len(images)
                for value, named in zip(images, keys, strict=True):
                    yield _member(value, named, number)
                    number += 1
    except DamagedArchiveError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedArchiveError(shown(str(error).partition("\n")[0])[:200]) from None


def _columns(schema: Any) -> tuple[str, str | None]:
    """(image column, key column or None)."""
    import pyarrow as pa

    def holds_images(field: Any) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_images(field)]
    known = [name for wanted in _IMAGES for name in found if name.lower() == wanted]
    if not found or (len(found) > 1 and not known):
        names = ", ".join(shown(name) for name in schema.names)
        raise DamagedArchiveError(f"it has no column of images, or several; its columns are {names}")
    image = (known or found)[0]
    simple = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    keys = [f.name for f in schema if f.name != image and any(is_kind(f.type) for is_kind in simple)]
    return image, next((name for wanted in _KEYS for name in keys if name.lower() == wanted), None)


def _member(value: Any, key: Any, number: int) -> Member:
    inner = value if isinstance(value, dict) else {"bytes": value}
    named = inner.get("path") if key is None else key
    name = readable(str(number if named in (None, "") else named))
    data = inner.get("bytes")
    return Member(name=name, error="its row holds no bytes") if data is None else Member(name=name, data=data)
