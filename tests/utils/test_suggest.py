"""Suggestions for misspelled names."""

from __future__ import annotations

import pytest

from ratioctl.utils.suggest import did_you_mean, nearest, one_of


@pytest.mark.parametrize(
    ("name", "cutoff", "found"),
    [("resnet81", 0.6, "resnet18"), ("xyz", 0.6, None), ("xyz", 0.0, "resnet18"), ("dgo", 0.6, "dog")],
)
def test_nearest(name: str, cutoff: float, found: str | None) -> None:
    assert nearest(name, {"resnet18": 0, "dog": 1}, cutoff=cutoff) == found


def test_did_you_mean() -> None:
    assert did_you_mean("vitt", ["vit"], prefix="timm:") == 'Did you mean "timm:vit"?'
    assert did_you_mean("q", ["vit"]) == ""


def test_one_of() -> None:
    assert one_of("enrgy", ("msp", "energy")) == 'Did you mean "energy"? Use one of: msp, energy.'
    assert one_of("q", ("msp", "energy")) == "Use one of: msp, energy."
