"""Labelled sources."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from ratioctl import images
from ratioctl.errors import SourceError
from tests.images.helpers import PNG, encoded, members_of, pack, plant


def test_a_folder_source(pets):
    loaded = images.load_source(f"{pets}:train", 16)
    assert loaded.images.shape == (5, 16, 16, 3)
    assert loaded.images.dtype == np.uint8
    assert loaded.label_names == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.labels.dtype == np.int64
    assert [n.rsplit("train/")[1] for n in loaded.names] == [
        "cat/1.png",
        "cat/2.png",
        "cat/3.png",
        "dog/4.png",
        "dog/a/5.png",
    ]
    for pixels, name in zip(loaded.images, loaded.names, strict=True):
        np.testing.assert_array_equal(pixels, images.decode(pets / name, 16).pixels)
    assert images.load_source(f"{pets}:train", 16, 1).images.shape == (5, 16, 16, 1)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("wrapper", ["", "./", "pets/"])
def test_packing_does_not_matter(pets, tmp_path, suffix, wrapper):
    members = members_of(pets)
    shuffled = {
        wrapper + n: members[n] for n in sorted(members, key=lambda n: hashlib.md5(n.encode()).hexdigest())
    }
    path = pack(tmp_path / f"packed{suffix}", shuffled)
    for split in ("train", "test"):
        folder = images.load_source(f"{pets}:{split}", 16, workers=1)
        packed = images.load_source(f"{path}:{split}", 16, workers=3)
        np.testing.assert_array_equal(packed.images, folder.images)
        np.testing.assert_array_equal(packed.labels, folder.labels)
        assert packed.label_names == folder.label_names
        assert packed.fingerprint == folder.fingerprint
        listed = images.list_source(f"{path}:{split}")
        assert listed.names == packed.names
        assert listed.labels.tolist() == packed.labels.tolist()


def test_splits_must_be_chosen(pets, tmp_path):
    path = pack(tmp_path / "pets.tar", members_of(pets))
    for source in (str(pets), str(path)):
        for ask in (images.load_source, lambda s, size: images.list_source(s)):
            with pytest.raises(SourceError, match="has the splits test, train"):
                ask(source, 16)
        with pytest.raises(SourceError, match="first-level folders are test, train") as caught:
            images.load_source(f"{source}:tests", 16)
        assert "Did you mean :test?" in str(caught.value)


def test_a_single_split_needs_no_choice(pets, tmp_path):
    only = {n: d for n, d in members_of(pets).items() if n.startswith("test/")}
    path = pack(tmp_path / "only.tar", only)
    assert images.load_source(str(path), 16).fingerprint == images.load_source(f"{pets}:test", 16).fingerprint


def test_a_class_may_be_called_train(tmp_path):
    plant(tmp_path / "vehicles", "bus/1.png", "train/2.png")
    path = pack(tmp_path / "v.tar", {"train/sub/2.png": PNG, "bus/1.png": PNG})
    for source in (tmp_path / "vehicles", path):
        assert images.load_source(str(source), 8).label_names == ("bus", "train")


def test_a_flat_source_has_no_labels(tmp_path):
    plant(tmp_path / "flat", "b.png", "a.png", "notes.txt")
    loaded = images.load_source(str(tmp_path / "flat"), 8)
    assert loaded.labels is None
    assert loaded.label_names == ()
    assert loaded.names == ("a.png", "b.png")
    with pytest.raises(SourceError, match="no classes"):
        images.load_source(str(tmp_path / "flat"), 8, exclude=["x"])


def test_excluded_classes(pets):
    loaded = images.load_source(f"{pets}:train", 16, exclude=["cat"])
    assert loaded.label_names == ("dog",)
    assert loaded.labels.tolist() == [0, 0]
    whole = images.load_source(f"{pets}:train", 16)
    np.testing.assert_array_equal(loaded.images, whole.images[3:])
    with pytest.raises(SourceError, match="The nearest is 'cat'"):
        images.load_source(f"{pets}:train", 16, exclude=["cot"])
    with pytest.raises(SourceError, match="no class left"):
        images.load_source(f"{pets}:train", 16, exclude=["cat", "dog"])


def test_an_empty_class_is_named(tmp_path):
    plant(tmp_path / "s", "cat/1.png", "cow/readme.txt")
    path = pack(tmp_path / "s.tar", {"cat/": b"", "cat/1.png": PNG, "cow/": b"", "cow/readme.txt": b"x"})
    for source in (str(tmp_path / "s"), str(path)):
        with pytest.raises(SourceError, match="has no images for class cow"):
            images.load_source(source, 8)
        assert images.load_source(source, 8, exclude=["cow"]).label_names == ("cat",)


def test_images_beside_classes_are_named(tmp_path):
    plant(tmp_path / "s", "cat/1.png", "dog/1.png", "preview.png")
    with pytest.raises(SourceError, match=r"beside its class folders, for example preview\.png"):
        images.load_source(str(tmp_path / "s"), 8)


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    plant(tmp_path / "s", "a/1.png", "a/3.png", "b/1.png", "b/2.png")
    plant(tmp_path / "s", "a/2.png", data=b"text")
    plant(tmp_path / "s", "b/0.jpg", data=b"")
    path = pack(tmp_path / "s.tar", members_of(tmp_path / "s"))
    for source in (str(tmp_path / "s"), str(path)):
        loaded = images.load_source(source, 8)
        assert loaded.names == ("a/1.png", "a/3.png", "b/1.png", "b/2.png")
        assert loaded.labels.tolist() == [0, 0, 1, 1]
        assert loaded.errors == (("a/2.png", "is text, not an image"), ("b/0.jpg", "is empty (0 bytes)"))
    plant(tmp_path / "bad", "a/1.png", data=b"text")
    with pytest.raises(SourceError, match=r"no readable image; a/1\.png is text"):
        images.load_source(str(tmp_path / "bad"), 8)


def test_bad_sources(tmp_path):
    plant(tmp_path, "file.png", "none/readme.txt", "x/cat/1.png")
    expected = {
        tmp_path / "missing": "does not exist",
        f"{tmp_path}/missing:train": "does not exist",
        "": "does not exist",
        tmp_path / "file.png": "neither a folder nor an archive nor a table",
        tmp_path / "none": "holds no images",
        f"{tmp_path}/x:": "names no split",
        f"{tmp_path}/x:dog": "no split 'dog'",
    }
    for source, reason in expected.items():
        with pytest.raises(SourceError, match=reason):
            images.load_source(str(source), 8)


def test_colons_in_names(tmp_path):
    plant(tmp_path / "a:b", "cat/1.png")
    plant(tmp_path / "c:d", "train/cat/1.png", "test/cat/1.png")
    assert images.split_source(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", None)
    assert images.split_source(f"{tmp_path}/c:d:test") == (f"{tmp_path}/c:d", "test")
    assert images.load_source(f"{tmp_path}/c:d:test", 8).label_names == ("cat",)


def test_many_images_in_any_order(tmp_path):
    """More than one growth of the array and many decoding batches; the order comes from the names."""
    rng = np.random.default_rng(0)
    grey = {f"c{i % 7}/{i:05d}.png": i for i in rng.permutation(2500)}
    members = {n: encoded(Image.fromarray(np.full((4, 4), i % 251, np.uint8))) for n, i in grey.items()}
    loaded = images.load_source(str(pack(tmp_path / "many.tar", members)), 4, 1, workers=3)
    assert list(loaded.names) == sorted(grey)
    assert loaded.images[:, 0, 0, 0].tolist() == [grey[n] % 251 for n in loaded.names]
    assert loaded.labels.tolist() == [grey[n] % 7 for n in loaded.names]
