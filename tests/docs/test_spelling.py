"""Spelling of pages, cards, help texts and the changelog: Hunspell's dictionary and `words.txt`."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = Path(__file__).with_name("words.txt")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for path in (ROOT / "docs").rglob("*.md") if "examples" not in path.parts),
        *(ROOT / "assets" / "models").rglob("*.md"),
    ]
)
NOT_PROSE = (
    r"<!--.*?-->|^```.*?^```|^ *<pre>.*?</pre>",  # comments and code
    r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|^:::.*?(?=^\S)",  # names, equations, mkdocstrings
    r"\]\([^)]*\)|https?://\S+|\{[^}]*\}|&\w+;|<[^>]*>",  # targets of links, attributes, tags
    r"\S*[/\\_@=]\S*|--?[a-z][\w-]*|\.\w+|\b\w*\d\w*\b",  # paths, options, suffixes, numbers with letters
)


def words(text: str) -> set[str]:
    """The words of a Markdown text that are prose."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    return {word.strip("'") for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text)}


@pytest.fixture(scope="module")
def is_spelled() -> Callable[[str], bool]:
    spylls = pytest.importorskip("spylls.hunspell")
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves its files open
        dictionary = spylls.Dictionary.from_files("en_US")
        gc.collect()
    ours = set(OURS.read_text(encoding="utf-8").split())

    def check(word: str) -> bool:
        base = word.removesuffix("'s")
        known = {word, word.lower(), base, base.lower()} & ours
        return bool(known) or len(base) == 1 or base.isupper() or dictionary.lookup(base)

    return check


def test_what_is_a_word() -> None:
    text = "A *photograph's* label, `unkown`, [link](unkown.md) $x_unkown$ --unkown 32x32 colour\n"
    text += "```\nunkown\n```\n"
    assert words(text) == {"A", "photograph's", "label", "link", "colour"}


def test_a_misspelling_is_found(is_spelled: Callable[[str], bool]) -> None:
    assert [word for word in ("color", "colour", "calibration", "calibraton") if not is_spelled(word)] == [
        "colour",
        "calibraton",
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(path: Path, is_spelled: Callable[[str], bool]) -> None:
    unknown = [word for word in sorted(words(path.read_text(encoding="utf-8"))) if not is_spelled(word)]
    assert unknown == [], "correct them, or add them to tests/docs/words.txt"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_examples(path: Path, is_spelled: Callable[[str], bool]) -> None:
    prose = re.sub(r"^(?!#).*$|^# ?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [word for word in sorted(words(prose)) if not is_spelled(word)] == []


def test_help_and_recipe_keys(is_spelled: Callable[[str], bool]) -> None:
    from tools import generate_reference

    for text in (
        generate_reference.command_line(),
        generate_reference.recipe_keys(),
        generate_reference.names(),
    ):
        assert [word for word in sorted(words(text)) if not is_spelled(word)] == []
