"""Fixtures of the tests of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ratioctl.types import Evaluation
from tests.evaluation.helpers import evaluated, noise


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 12 pictures in the four classes of the small package. Read-only."""
    root = tmp_path_factory.mktemp("labelled") / "test"
    for k, name in enumerate(("cat", "dog", "red panda", "air")):
        folder = root / (name if name != "air" else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        for j, picture in enumerate(noise(3, seed=k)):
            Image.fromarray(picture).save(folder / f"{k}-{j}.png")
    return str(root)


@pytest.fixture(scope="session")
def plain(small_package: Path, labelled: str) -> tuple[Evaluation, list[dict[str, Any]]]:
    """An evaluation with the options of `evaluated` alone, and its events."""
    events: list[dict[str, Any]] = []
    return evaluated(small_package, labelled, callback=events.append), events
