"""Optional packages: the table agrees with pyproject.toml, and a missing one is named with its extra."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from ratioctl.errors import UsageError
from ratioctl.utils import optional

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE_OF = {
    "scikit-learn": "sklearn",
    "markdown-it-py": "markdown_it",
    "py-minisign": "minisign",
    "mlflow-skinny": "mlflow",
}


def modules(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=\[;]", requirement)[0] for requirement in requirements]
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in names}


def test_the_table_agrees_with_the_extras() -> None:
    for extra, listed in optional.EXTRAS.items():
        assert modules(PROJECT["optional-dependencies"][extra]) == set(listed)
    assert not modules(PROJECT["dependencies"]) & {
        name for names in optional.EXTRAS.values() for name in names
    }


def test_a_missing_module_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minisign", None)
    with pytest.raises(UsageError) as caught:
        optional.load("minisign", "signing")
    said = 'signing: needs minisign, which is not installed. Run: pip install "ratioctl[sign]"'
    assert str(caught.value) == said
    assert optional.load("json", "x").dumps(1) == "1"
    with pytest.raises(ModuleNotFoundError):
        optional.load("no_such_module", "x")
