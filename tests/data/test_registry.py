"""The registry of named sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ratioctl.cli import _common
from ratioctl.data import in_distribution, registry
from ratioctl.errors import SourceError


def test_the_registered_sources() -> None:
    assert {*registry.registered()} >= {"digits", "cifar10", "cifar100", "svhn", "noise", "photos", "hf"}
    for name, source in registry.registered().items():
        assert source.usage.startswith(name)
        assert source.description


def test_the_sources_that_help_names_are_registered() -> None:
    _, _, named = _common.SOURCE_HELP.partition("also with :ARGUMENT: ")
    examples = named.split(", ")
    assert {"cifar10", "digits", "noise", "hf"} <= {*examples}
    assert {*examples} <= {*registry.registered()}


def test_a_registered_function_loads_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.registered()
    monkeypatch.setattr(registry, "_SOURCES", sources := {})

    @registry.register_source("grey", usage="grey:LEVEL", description="one grey")
    def grey(request: registry.SourceRequest) -> object:
        return request.images(np.full((2, 8, 8, 1), int(request.argument), np.uint8))

    monkeypatch.setattr(registry, "registered", lambda: sources)
    np.testing.assert_array_equal(
        in_distribution.load("grey:7", 4, 3).pixels, np.full((2, 4, 4, 3), 7, np.uint8)
    )
    with pytest.raises(ValueError, match="already"):
        registry.register_source("grey", usage="", description="")(grey)


def test_paths_win_over_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert registry.find("digits:train") is registry.registered()["digits"]
    (tmp_path / "digits").mkdir()
    assert registry.find("digits") is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("digts:train", 'Did you mean "digits"?'),
        ("nothing-like-it", "Named sources: cifar10, cifar100, digits"),
        ("digits:trian", 'has no "trian". Use one of: digits:train, digits:test, digits.'),
        ("svhn", "needs a choice. Use one of: svhn:train, svhn:test."),
    ],
)
def test_unknown_names_are_explained(source: str, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        in_distribution.load(source, 8, 3)
    assert says in str(caught.value)
