"""The generated reference pages cover every option and every recipe key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl import cli
from tools import generate_reference


def test_every_option_of_every_command_is_on_the_page() -> None:
    page = generate_reference.command_line()
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == [*(f"ratioctl {name}" for name in cli.COMMANDS), "Common options"]
    common = sections["Common options"]
    for name in cli.COMMANDS:
        for parameter in cli.load(name).params:
            if parameter.name == "help" or getattr(parameter, "hidden", False):
                continue
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option in sections[f"ratioctl {name}"] or option in common, (name, option)
    assert "| `--eps RANGE` |" in sections["ratioctl counterfactual"]
    assert "`--seed" in common


def test_recipe_keys_have_type_default_and_meaning() -> None:
    page = generate_reference.recipe_keys()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert rows["optim.momentum"].startswith("| `optim.momentum` | float | `0.9` |")
    assert '"afw" Auto-Frank-Wolfe' in rows["objective.inside.attack.method"]
    assert '`"step"`, `"cosine"`, `"onecycle"`, `"slowstart"` | `"step"` |' in rows["optim.schedule"]
    assert "| required |" in rows["data.train"]
    assert "(or fraction)" in rows["data.validation"]
    assert len(rows) > 70


def test_names_are_those_of_the_registries() -> None:
    page = generate_reference.names()
    assert "`preactresnet18`" in page
    rows = dict(line.split(" | ", 1) for line in page.splitlines() if line.startswith("| `"))
    assert {"| `msp`", "| `energy`", "| `quick`", "| `afw`", "| `kserve`", "| `hf:PATH[:SPLIT]`"} <= set(rows)
    assert "256 ID images under" in rows["| `quick`"]


def test_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate_reference", "--out", str(tmp_path / "reference")])
    generate_reference.main()
    pages = sorted(path.name for path in (tmp_path / "reference").glob("*.md"))
    assert pages == ["command-line.md", "names.md", "recipes.md", "schemas.md"]
    assert (tmp_path / "reference" / "schemas" / "report.json").is_file()
