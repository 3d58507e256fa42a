"""Tables of paths and labels as SOURCEs, and layouts of annotations that are not read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ratioctl import images
from ratioctl.data import in_distribution
from ratioctl.errors import SourceError
from tests.images.helpers import encoded, picture


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for k in range(6):
        (folder / f"{k}.png").write_bytes(encoded(picture(20, 16, seed=k)))
    return folder


def rows(labels="label"):
    return [f"path,{labels},split"] + [
        f"files/{k}.png,{'cat' if k % 2 else 'dog'},{'test' if k > 3 else 'train'}" for k in range(6)
    ]


def test_a_csv_gives_the_same_images_as_class_folders(files, tmp_path):
    table = tmp_path / "images.csv"
    table.write_text("\ufeff" + "\r\n".join(rows()), encoding="utf-8")
    found = images.load_source(f"{table}:train", 16)
    assert found.label_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.names == tuple(f"train/{n}" for n in ("cat/files/1.png", "cat/files/3.png")) + tuple(
        f"train/dog/files/{k}.png" for k in (0, 2)
    )
    for row, k in enumerate((1, 3, 0, 2)):
        np.testing.assert_array_equal(found.images[row], images.decode(files / f"{k}.png", 16).pixels)
    with pytest.raises(SourceError, match="has the splits test, train"):
        images.load_source(str(table), 16)
    assert images.splits_of(str(table)) == ("test", "train")


def test_parquet_and_other_column_names(files, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = tmp_path / "t.parquet"
    paths = [str(files / f"{k}.png") for k in range(4)]
    pq.write_table(pa.table({"File": paths, "class": ["b", "a", "b", "a"], "note": [1, 2, 3, 4]}), table)
    found = in_distribution.load_labelled(str(table), 16, 3)
    assert found.label_names == ("a", "b")
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1])


def test_a_table_without_labels_is_an_unlabelled_source(files, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("path\n" + "\n".join(f"files/{k}.png" for k in range(3)) + "\nfiles/missing.png\n")
    found = images.load_source(str(table), 16)
    assert found.labels is None
    assert len(found.images) == 3
    assert found.errors == (("files:missing.png", "does not exist"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a,b\n1,2\n",
            r"has no column of paths; its columns are a, b.*Name a column path and a column label",
        ),
        ("path,label\nfiles/0.png,a/b\n", r"row 2 has the label 'a/b'"),
        ("path,label\nfiles/0.png,\n", r"row 2 has the label ''"),
        ("path,label\n,a\n", "row 2 has no path"),
        ("", "has no column of paths"),
    ],
)
def test_bad_tables_are_named(files, tmp_path, text, says):
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(SourceError, match=says):
        images.load_source(str(table), 16)


def test_coco_and_yolo_are_named(files, tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "annotations" / "instances_train2017.json").write_text(json.dumps({}))
    (coco / "train2017").mkdir()
    (coco / "train2017" / "1.png").write_bytes(encoded(picture(8, 8)))
    for source in (str(coco), f"{coco}:train2017"):
        with pytest.raises(
            SourceError, match=r"COCO annotations, which are not read.*CSV file of path,label"
        ):
            in_distribution.load_labelled(source, 8, 3)
    yolo = tmp_path / "yolo"
    (yolo / "images").mkdir(parents=True)
    (yolo / "labels").mkdir()
    (yolo / "labels" / "1.txt").write_text("0 0.5 0.5 1 1")
    (yolo / "images" / "1.png").write_bytes(encoded(picture(8, 8)))
    with pytest.raises(SourceError, match="YOLO"):
        in_distribution.load_labelled(str(yolo), 8, 3)
