"""OOD images of several sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl import recipe as recipes
from ratioctl.data import loader, out_distribution
from ratioctl.errors import SourceError
from tests.data.helpers import folder


def test_class_exclusion(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"cat": 2, "tree": 3})
    b = folder(tmp_path / "b", {"rock": 4})
    assert len(out_distribution.load([str(a), str(b)], 8)) == 9
    assert len(out_distribution.load([str(a), str(b)], 8, exclude=["cat"])) == 7
    with pytest.raises(SourceError, match='"cta"'):
        out_distribution.load([str(a), str(b)], 8, exclude=["cta"])
    with pytest.raises(SourceError, match="no images left"):
        out_distribution.load([str(a), str(b)], 8, exclude=["cat", "tree", "rock"])


def test_excluded_classes_leave_the_held_out_out_images_too(tmp_path: Path) -> None:
    train, test = tmp_path / "a", tmp_path / "b"
    folder(train, {"cat": 2, "rock": 3})
    folder(test, {"cat": 1, "tree": 2})
    settings = [f"data.outside={train}", f"data.outside_test={test}", 'data.exclude=["cat", "rock"]']
    with pytest.raises(SourceError, match="no images left"):
        loader.load(recipes.load("digits-ratio", settings))
    splits = loader.load(recipes.load("digits-ratio", [*settings[:2], 'data.exclude=["cat"]']))
    assert splits.outside is not None
    assert splits.outside_test is not None
    assert (len(splits.outside), len(splits.outside_test)) == (3, 2)
