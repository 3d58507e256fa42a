"""The cache folder and decoded sources in it."""

from pathlib import Path

import numpy as np
import pytest

from ratioctl import images
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
