"""The README and the command line agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_is_in_the_readme(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: ratioctl {name}" in text
    for option in ("--json", "--quiet", "--verbose"):
        assert option in text
    assert re.search(rf"`(ratioctl )?{name}\b", README), f"{name} is not in the README"


def test_recipes_named_in_the_readme_exist() -> None:
    text = README + (ROOT / "docs" / "concepts" / "ratio.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:digits|cifar10|cifar100|svhn)-(?:plain|oe|acet|at|trades|ratio)[\w.-]*)`", text)
    )
    named = {name for name in named if not name.endswith((".json", ".jsonl"))}  # results are named so too
    assert named - set(recipes.available()) - set(packages.bundled()) == set()
    assert len(named) >= 8


def test_options_in_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] != ["ratioctl"] or len(words) < 2:
                continue
            assert main([words[1], "--help"]) == 0
            text = capsys.readouterr().out
            for word in words[2:]:
                if word.startswith("--"):
                    assert word in text, f"{word} in: {line}"


def test_pictures_and_files_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_python_block_runs_on_the_bundled_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"```python\n(import ratioctl\n.*?)```", README, re.DOTALL)
    assert block is not None
    code = (
        block[1].replace("inbox/", "assets/samples/coffee.jpg").replace("photo.jpg", "assets/samples/cat.jpg")
    )
    code = code.replace('eps="0.5..3")', 'eps="0.5", steps=2)')
    monkeypatch.chdir(ROOT)
    exec(code, {"__name__": "readme"})
    assert "coffee.jpg" in capsys.readouterr().out


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: each version has each group at most once, and a date unless it is not released."""
    groups = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Migration"}
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    head, *versions = re.split(r"^## ", text, flags=re.MULTILINE)
    assert "Keep a Changelog" in head
    assert versions[0].startswith("[Unreleased]\n")
    for version in versions:
        titles = [title.split()[0] for title in re.findall(r"^### (.+)$", version, re.MULTILINE)]
        assert set(titles) <= groups, version[:20]
        assert len(titles) == len(set(titles)), version[:20]
    for version in versions[1:]:
        assert re.match(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}\n", version)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
