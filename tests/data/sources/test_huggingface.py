"""Local Hugging Face data sets, in the files that `datasets` and the Hub write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.sources import huggingface
from ratioctl.errors import SourceError
from ratioctl.images import cache

COLORS = np.random.default_rng(0).integers(0, 256, (7, 3), dtype=np.uint8)
LABELS = [1, 0, 1, 2, 0, 1, 2]


def png(color: np.ndarray, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.broadcast_to(color, (size, size, 3)).copy()).save(stream, "PNG")
    return stream.getvalue()


def table(images: list[Any], labels: list[Any] | None = None, names: list[str] | None = None) -> pa.Table:
    """Columns as `datasets` writes them: `img` structs and, with names, a ClassLabel."""
    columns = {"img": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    features: dict[str, Any] = {"img": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        kind = {"_type": "Value"} if names is None else {"_type": "ClassLabel", "names": names}
        features["label"] = kind
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(meta)


def structs(colors: np.ndarray = COLORS) -> list[dict[str, Any]]:
    return [{"bytes": png(color), "path": f"{k}.png"} for k, color in enumerate(colors)]


def save_to_disk(folder: Path, data: pa.Table, *, stream: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(folder / "data-00000-of-00001.arrow"), data.schema) as writer:
        writer.write_table(data, max_chunksize=3)
    return folder


def saved(path: Path, how: str) -> str:
    """The same seven images in one of the layouts; the SOURCE."""
    data = table(structs(), LABELS, ["cat", "dog", "frog"])
    if how in ("arrow stream", "arrow file"):
        return f"hf:{save_to_disk(path / 'set', data, stream=how == 'arrow stream')}"
    if how == "splits":
        save_to_disk(path / "set" / "train", data)
        save_to_disk(path / "set" / "test", data.slice(0, 2))
        (path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        return f"hf:{path / 'set'}:train"
    (path / "set" / "data").mkdir(parents=True)
    pq.write_table(data.slice(0, 4), path / "set" / "data" / "train-00000-of-00002.parquet")
    pq.write_table(data.slice(4), path / "set" / "data" / "train-00001-of-00002.parquet")
    if how == "one parquet split":
        return f"hf:{path / 'set'}"
    pq.write_table(data.slice(0, 2), path / "set" / "data" / "test-00000-of-00001.parquet")
    return f"hf:{path / 'set'}:train"


@pytest.mark.parametrize(
    "how", ["arrow stream", "arrow file", "splits", "one parquet split", "parquet splits"]
)
def test_every_layout_gives_the_same_images(tmp_path: Path, how: str) -> None:
    source = saved(tmp_path, how)
    loaded = in_distribution.load_labelled(source, 4, 3)
    np.testing.assert_array_equal(loaded.pixels, np.broadcast_to(COLORS[:, None, None], (7, 4, 4, 3)))
    assert loaded.labels is not None
    assert (loaded.labels.tolist(), loaded.label_names) == (LABELS, ("cat", "dog", "frog"))
    assert loaded.source == source


def test_labels_are_matched_to_the_models_by_name(tmp_path: Path) -> None:
    loaded = in_distribution.load_labelled(saved(tmp_path, "splits"), 4, 3, ("frog", "dog", "cat", "owl"))
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [1, 2, 1, 0, 2, 1, 0]


def test_a_single_parquet_file_and_plain_columns(tmp_path: Path) -> None:
    """Encoded bytes and text labels, without any metadata."""
    names = ["dog", "cat", "dog", "owl", "cat", "dog", "owl"]
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"target": names, "photo": [png(color) for color in COLORS]}), path)
    loaded = in_distribution.load_labelled(f"hf:{path}", 4, 3)
    assert loaded.labels is not None
    assert ([loaded.label_names[k] for k in loaded.labels], loaded.label_names) == (
        names,
        ("cat", "dog", "owl"),
    )
    numbers = table(structs(), [10, 9, 10, 2, 9, 10, 2])
    pq.write_table(numbers, path)
    assert in_distribution.load_labelled(f"hf:{path}", 4, 3).label_names == ("2", "9", "10")


def test_unlabelled_sets_and_ood_images(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    pq.write_table(table(structs(), [-1] * 7, ["cat", "dog"]), path)
    assert in_distribution.load(f"hf:{path}", 4, 3).labels is None
    with pytest.raises(SourceError, match="class folders"):
        in_distribution.load_labelled(f"hf:{path}", 4, 3)
    pq.write_table(table(structs()), path)
    assert out_distribution.load([f"hf:{path}"], 4).pixels.shape == (7, 4, 4, 3)
    pq.write_table(table(structs(), LABELS, ["cat", "dog", "frog"]), path)
    kept = out_distribution.load([f"hf:{path}"], 4, exclude=["dog"])
    np.testing.assert_array_equal(kept.pixels[:, 0, 0], COLORS[[1, 3, 4, 6]])


def test_images_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "beside.png").write_bytes(png(COLORS[0]))
    (tmp_path / "secret.png").write_bytes(png(COLORS[0]))
    images = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": b"text", "path": None},
        {"bytes": None, "path": None},
    ]
    pq.write_table(table(images, [0, 1, 0, 1], ["cat", "dog"]), folder / "train.parquet")
    loaded = in_distribution.load(f"hf:{folder}", 4, 3)
    np.testing.assert_array_equal(loaded.pixels[:, 0, 0], COLORS[:1])
    assert dict(loaded.errors) == {
        "train.parquet:1": "has no bytes, and its file is not below the data set's folder",
        "train.parquet:2": "is text, not an image",
        "train.parquet:3": "has no bytes",
    }


@pytest.mark.parametrize(
    ("make", "argument", "says"),
    [
        ("splits", "set", r"has the splits test, train.* Use one of: hf:.*set:test, hf:.*set:train"),
        ("splits", "set:tran", r'has no split "tran".* Did you mean "train"'),
        ("splits", "nothing", "does not exist"),
        ("parquet splits", "set/data/test-00000-of-00001.parquet:train", "has no splits"),
        ("empty", "set", "holds no Arrow or Parquet files"),
        ("no images", "set", r"has no column of images; its columns are a \(int64\)"),
        ("damaged", "set", "is damaged"),
        ("bad labels", "set", "holds 7, which is not a label"),
        ("no rows", "set", "it has no rows"),
        ("", "", "does not exist"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, make: str, argument: str, says: str) -> None:
    file = tmp_path / "set" / "train.parquet"
    if "splits" in make:
        saved(tmp_path, make)
    else:
        file.parent.mkdir()
    if make == "no images":
        pq.write_table(pa.table({"a": [1]}), file)
    if make == "damaged":
        file.write_bytes(b"PAR1 nothing")
    if make == "bad labels":
        pq.write_table(table(structs(COLORS[:1]), [7], ["cat", "dog"]), file)
    if make == "no rows":
        pq.write_table(table([], []), file)
    source = f"hf:{tmp_path / argument}" if argument else "hf:"
    with pytest.raises(SourceError, match=says) as caught:
        in_distribution.load(source, 4, 3)
    assert caught.value.next_step


def test_the_second_load_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_FROM_BYTES", 0)
    source = saved(tmp_path, "parquet splits")
    first = in_distribution.load_labelled(source, 4, 3)
    gray = in_distribution.load_labelled(source, 4, 1)
    decode = huggingface._decoded
    monkeypatch.setattr(huggingface, "_decoded", lambda *args: pytest.fail("decoded again"))
    again = in_distribution.load_labelled(source, 4, 3)
    np.testing.assert_array_equal(again.pixels, first.pixels)
    assert again.labels is not None
    assert again.labels.tolist() == LABELS
    assert (again.label_names, again.fingerprint) == (first.label_names, first.fingerprint)
    assert gray.pixels.shape == (7, 4, 4, 1)
    monkeypatch.setattr(huggingface, "_decoded", decode)
    changed = table(structs(255 - COLORS[:4]), LABELS[:4], ["cat", "dog", "frog"])
    pq.write_table(changed, tmp_path / "set/data/train-00000-of-00002.parquet")
    other = in_distribution.load_labelled(source, 4, 3)
    np.testing.assert_array_equal(other.pixels[:4, 0, 0], 255 - COLORS[:4])


def test_files_beside_the_set_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_FROM_BYTES", 0)
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(table([{"bytes": None, "path": "a.png"}]), folder / "train.parquet")
    for color in COLORS[:2]:
        (folder / "a.png").write_bytes(png(color))
        np.testing.assert_array_equal(in_distribution.load(f"hf:{folder}", 4, 3).pixels[0, 0, 0], color)
