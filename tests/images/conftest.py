"""Fixtures of the tests of images."""

import pytest

from tests.images.helpers import encoded, picture, plant


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pets(tmp_path):
    """train: 3 cats, 2 dogs (one deeper); test: 1 cat, 1 dog."""
    root = tmp_path / "pets"
    names = ("train/cat/1.png", "train/cat/2.png", "train/cat/3.png", "train/dog/a/5.png", "train/dog/4.png")
    for i, name in enumerate((*names, "test/cat/6.png", "test/dog/7.png")):
        plant(root, name, data=encoded(picture(40, 40, seed=i)))
    plant(root, "README.txt", data=b"read me")
    return root
