"""Sets that torchvision downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl.data import in_distribution
from ratioctl.errors import SourceError


def test_named_sets_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="--download"):
        in_distribution.load("cifar10:test", 32, 3)
    with pytest.raises(SourceError, match="cifar10:train"):
        in_distribution.load("cifar10", 32, 3)
