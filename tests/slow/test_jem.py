"""The recipe `digits-jem` from its first update to its last."""

from __future__ import annotations

from pathlib import Path

import pytest

import ratioctl

pytestmark = pytest.mark.slow


def test_digits_jem_ends_as_its_recipe_says(tmp_path: Path) -> None:
    package = ratioctl.train("digits-jem", out=tmp_path / "run", device="cpu")
    (report,) = ratioctl.evaluate(package.path, data="digits:test", suite="clean", device="cpu")
    accuracy = next(m.value for m in report.measurements if m.name == "accuracy")
    assert accuracy > 0.9
    assert package.config["ratio"]["provenance"]["updates"] == 767
