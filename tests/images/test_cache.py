"""The cache folder and decoded sources in it."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ratioctl import images
from ratioctl.cli import main
from ratioctl.data import image_set
from ratioctl.errors import DiskError
from ratioctl.images import cache as decoded_cache
from ratioctl.images import labelled
from tests.images.helpers import encoded, picture, plant


@pytest.fixture
def eager_cache(monkeypatch):
    monkeypatch.setattr(decoded_cache, "CACHE_FROM_BYTES", 0)


def decoded_count(monkeypatch):
    calls = []
    real = labelled.decode
    monkeypatch.setattr(labelled, "decode", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


@pytest.mark.usefixtures("eager_cache")
def test_the_second_load_comes_from_the_cache(pets, monkeypatch):
    calls = decoded_count(monkeypatch)
    first = images.load_source(f"{pets}:train", 16)
    assert len(calls) == 5
    second = images.load_source(f"{pets}:train", 16)
    assert len(calls) == 5
    np.testing.assert_array_equal(first.images, second.images)
    assert type(second.images) is np.ndarray
    assert (first.names, first.errors, first.fingerprint) == (second.names, second.errors, second.fingerprint)
    second.images[0] = 0  # private to this process
    np.testing.assert_array_equal(images.load_source(f"{pets}:train", 16).images, first.images)
    images.load_source(f"{pets}:train", 16, cache=False)
    assert len(calls) == 10


@pytest.mark.usefixtures("eager_cache")
def test_the_cache_notices_every_difference(pets, monkeypatch):
    calls = decoded_count(monkeypatch)
    variants = [
        lambda: images.load_source(f"{pets}:train", 16),
        lambda: images.load_source(f"{pets}:train", 17),
        lambda: images.load_source(f"{pets}:train", 16, 1),
        lambda: images.load_source(f"{pets}:train", 16, exclude=["cat"]),
        lambda: images.load_source(f"{pets}:test", 16),
    ]
    for variant in variants:
        before = len(calls)
        variant()
        assert len(calls) > before
        before = len(calls)
        variant()
        assert len(calls) == before
    plant(pets, "train/cat/1.png", data=encoded(picture(40, 40, seed=99)))
    before = len(calls)
    changed = variants[0]()
    assert len(calls) > before
    np.testing.assert_array_equal(changed.images[0], images.decode(pets / "train/cat/1.png", 16).pixels)


@pytest.mark.usefixtures("eager_cache")
@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "nested", "gone", "folder"])
def test_a_damaged_cache_is_done_without(pets, tmp_path, suffix, damage):
    first = images.load_source(f"{pets}:train", 16)
    (path,) = (tmp_path / "cache" / "decoded").glob(f"*{suffix}")
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 0x11
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        other = {
            "flip": bytes(raw),
            "cut": bytes(raw[: len(raw) // 2]),
            "nested": b"[" * 100_000,
            "empty": b"",
        }
        path.write_bytes(other[damage])
    again = images.load_source(f"{pets}:train", 16)
    np.testing.assert_array_equal(first.images, again.images)
    assert again.names == first.names
    assert not list((tmp_path / "cache" / "decoded").glob(".*.part"))


@pytest.mark.usefixtures("eager_cache")
def test_a_cache_that_cannot_be_written_is_done_without(pets, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "file"))
    assert len(images.load_source(f"{pets}:train", 16).images) == 5


def test_small_sources_are_not_cached(pets, tmp_path):
    images.load_source(f"{pets}:train", 16)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder(monkeypatch):
    assert images.cache_dir().name == "cache"
    monkeypatch.delenv("RATIOCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert images.cache_dir() == Path("/somewhere/ratioctl")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/nobody")
        assert images.cache_dir() == Path("/home/nobody/.cache/ratioctl")


@pytest.mark.usefixtures("eager_cache")
def test_an_archive_in_another_order_is_cached_in_the_order_of_the_classes(pets, tmp_path):
    folder = images.load_source(f"{pets}:train", 16)
    members = sorted((p for p in pets.rglob("train/*/**/*") if p.is_file()), key=lambda p: str(p)[::-1])
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for path in members:
            archive.add(path, path.relative_to(pets))
    for _ in range(2):
        packed = images.load_source(f"{tmp_path / 'pets.tar'}:train", 16)
        np.testing.assert_array_equal(np.asarray(packed.images), folder.images)
        assert (packed.names, packed.fingerprint) == (folder.names, folder.fingerprint)
        np.testing.assert_array_equal(packed.labels, folder.labels)


@pytest.mark.usefixtures("eager_cache")
def test_a_file_that_was_not_touched_is_not_hashed_again(pets, monkeypatch):
    images.load_source(f"{pets}:train", 16)
    monkeypatch.setattr(labelled, "_fingerprint", lambda *args: pytest.fail("hashed"))
    images.load_source(f"{pets}:train", 16)


@pytest.mark.usefixtures("eager_cache")
def test_a_full_disk_is_refused_before_decoding_unless_memory_does(pets, tmp_path, monkeypatch):
    calls = decoded_count(monkeypatch)
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    assert len(images.load_source(f"{pets}:train", 16).images) == 5  # in memory
    assert not (tmp_path / "cache" / "decoded").exists()
    monkeypatch.setattr(decoded_cache.resources, "memory_limit", lambda: 4 * 16 * 16 * 3 * 3)
    before = len(calls)
    with pytest.raises(DiskError, match=r"decoded images of .*train need.*RATIOCTL_CACHE"):
        images.load_source(f"{pets}:train", 16)
    assert len(calls) == before


@pytest.mark.usefixtures("eager_cache")
@pytest.mark.parametrize("roomy", [True, False])
def test_a_disk_that_fills_up_while_decoding(pets, tmp_path, monkeypatch, roomy):
    """Of an archive the number of images is not known before; nothing half-written stays."""
    monkeypatch.setattr(decoded_cache, "CHECK_EVERY", 16 * 16 * 3)
    free = iter([2**40, 2**40, 0, 0, 0, 0])
    monkeypatch.setattr(
        decoded_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, next(free))
    )
    if not roomy:
        monkeypatch.setattr(decoded_cache.resources, "memory_limit", lambda: 4)
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        archive.add(pets, "pets")
    source = f"{tmp_path / 'pets.tar'}:train"
    if roomy:
        expected = images.load_source(f"{pets}:train", 16, cache=False).images
        np.testing.assert_array_equal(np.asarray(images.load_source(source, 16).images), expected)
    else:
        with pytest.raises(DiskError):
            images.load_source(source, 16)
    assert not list((tmp_path / "cache" / "decoded").iterdir())


WRITER = """
import sys
from ratioctl.images import cache, labelled
cache.CACHE_FROM_BYTES = 0
for _ in range(5):
    cache.clear() if sys.argv[2] == "clear" else None
    print(labelled.load_source(sys.argv[1], 16).fingerprint)
"""


def test_two_writers_and_a_cleaner(pets):
    """Processes that decode the same source at once, while another clears the cache, all get the images."""
    expected = images.load_source(f"{pets}:train", 16, cache=False).fingerprint
    line = [sys.executable, "-c", WRITER, f"{pets}:train"]
    running = [
        subprocess.Popen([*line, kind], stdout=subprocess.PIPE, text=True)
        for kind in ("write", "write", "clear")
    ]
    for process in running:
        out, _ = process.communicate()
        assert (process.returncode, set(out.split())) == (0, {expected})


@pytest.mark.usefixtures("eager_cache")
def test_a_killed_writer_leaves_nothing_that_is_read(pets, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from ratioctl.images import cache, labelled\n"
        "cache.CACHE_FROM_BYTES = 0\n"
        "cache._header = lambda count, shape, real=cache._header: real(count, shape) if count < 5 else "
        "os.kill(os.getpid(), signal.SIGKILL)\n"
        "labelled.load_source(sys.argv[1], 16)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, f"{pets}:train"], check=False)
    assert done.returncode == -9
    folder = tmp_path / "cache" / "decoded"
    assert [path.suffix for path in folder.iterdir()] == [".tmp~"]
    first = images.load_source(f"{pets}:train", 16)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy"], "what was left is removed"
    assert first.fingerprint == images.load_source(f"{pets}:train", 16, cache=False).fingerprint


@pytest.mark.usefixtures("eager_cache")
def test_the_cache_is_listed_and_cleared(pets, tmp_path, capsys):
    images.load_source(f"{pets}:train", 16)
    assert decoded_cache.remembered(["x", 1], lambda: [1, 2]) == [1, 2]
    assert decoded_cache.remembered(["x", 1], lambda: pytest.fail("known")) == [1, 2]
    assert main(["cache", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["folder"] == str(tmp_path / "cache")
    first = listed["entries"][0]
    assert (first["kind"], first["name"]) == ("decoded images", f"{pets}:train")
    assert first["bytes"] > 5 * 16 * 16 * 3
    assert main(["cache"]) == 0
    assert "decoded images" in capsys.readouterr().out
    assert main(["cache", "--downloads"]) == 2
    assert main(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []
    assert not list((tmp_path / "cache" / "decoded").iterdir())


@pytest.mark.usefixtures("eager_cache")
def test_the_list_of_an_archive_is_remembered(pets, tmp_path, monkeypatch):
    path = tmp_path / "pets.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(pets, ".")
    first = images.list_source(f"{path}:train")
    read = labelled.archive_members
    monkeypatch.setattr(labelled, "archive_members", lambda *args: pytest.fail("read again"))
    again = images.list_source(f"{path}:test")
    assert again.label_names == first.label_names
    assert images.list_source(f"{path}:train").names == first.names
    monkeypatch.setattr(labelled, "archive_members", read)
    with tarfile.open(path, "w:xz") as archive:
        archive.add(pets / "test", "train")
    assert images.list_source(f"{path}:train").names != first.names


@pytest.mark.usefixtures("eager_cache")
def test_resized_arrays_are_cached(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    first = image_set.resize(pixels, 6, 1)
    assert first.shape == (5, 6, 6, 1)
    fit = image_set.fit
    monkeypatch.setattr(image_set, "fit", lambda *args: pytest.fail("resized again"))
    np.testing.assert_array_equal(image_set.resize(pixels, 6, 1), first)
    monkeypatch.setattr(image_set, "fit", fit)
    assert (image_set.resize(255 - pixels, 6, 1) != first).any()
