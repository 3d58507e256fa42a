"""Parquet files of images and webdataset tars as inputs of `walk`: every row has its key."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ratioctl.errors import ImageError
from ratioctl.images import walk


def png(color: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def written(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


PNGS = [png(k) for k in range(5)]


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"image": [{"bytes": b, "path": f"p{k}.png"} for k, b in enumerate(PNGS)]}, "p0.png p1.png p2.png"),
        ({"image": [{"bytes": b, "path": None} for b in PNGS], "label": range(5)}, "0 1 2"),
        ({"img": PNGS, "id": [7, 8, 9, 10, 11]}, "7 8 9"),
        ({"thumbnail": PNGS[::-1], "jpg": PNGS, "__key__": list("abcde"), "name": list("vwxyz")}, "a b c"),
        ({"picture": PNGS}, "0 1 2"),
    ],
)
def test_rows_are_images_with_their_keys(tmp_path: Path, columns: dict[str, Any], keys: str) -> None:
    path = written(tmp_path / "a.parquet", {name: list(values) for name, values in columns.items()})
    items = list(walk([path]))
    assert [item.path for item in items][:3] == [f"{path}:{key}" for key in keys.split()]
    assert [item.read() for item in items] == PNGS


def test_what_is_no_table_of_images_is_one_item_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    written(tmp_path / "other.parquet", {"text": ["a"]})
    written(tmp_path / "two.parquet", {"left": PNGS, "right": PNGS})
    for name, reason in (
        ("damaged", "cannot be read as a table of images: "),
        ("other", "it has no column of images, or several; its columns are text"),
        ("two", "its columns are left, right"),
    ):
        (item,) = walk([tmp_path / f"{name}.parquet"])
        with pytest.raises(ImageError, match=reason):
            item.read()


def test_a_row_without_bytes_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"image": [PNGS[0], None, b""]})
    first, second, third = walk([path])
    assert first.read() == PNGS[0]
    for item, reason in ((second, "its row holds no bytes"), (third, "is empty")):
        with pytest.raises(ImageError, match=reason):
            item.read()


def test_of_a_webdataset_the_images_are_rows_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("a/0001", "a/0002.x"):
            for ending, data in (("cls", b"3"), ("json", json.dumps({}).encode()), ("png", PNGS[0])):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert [item.path for item in walk([path])] == [f"{path}:a/0001.png", f"{path}:a/0002.x.png"]
