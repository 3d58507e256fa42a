"""Fixtures of the tests of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.helpers import noise


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """A folder of 12 pictures in the four classes of the small package."""
    for k, name in enumerate(("cat", "dog", "red panda", "air")):
        folder = tmp_path / "test" / (name if name != "air" else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        for j, picture in enumerate(noise(3, seed=k)):
            Image.fromarray(picture).save(folder / f"{k}-{j}.png")
    return str(tmp_path / "test")
