"""The documentation: commands, options, links and files are real; slow/test_docs.py runs its code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ratioctl import cli
from ratioctl import recipe as recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPTS = sorted((DOCS / "examples").glob("*.py"))
GENERATED = {
    *(f"reference/{name}.md" for name in ("command-line", "names", "recipes", "schemas")),
    *(f"examples/{name}.md" for name in ("index", *(path.stem for path in SCRIPTS))),
}
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(DOCS).as_posix() not in GENERATED]
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]
RESULTS = (ROOT / "benchmarks" / "results", ROOT / "experiments" / "results")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(name: str, language: str) -> list[str]:
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(name: str) -> Iterator[list[str]]:
    """The command lines of a page, continued lines joined and comments removed."""
    for block in blocks(name, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "|" in words:
                yield words[: words.index("|")]
                words = words[words.index("|") + 1 :]
            if words:
                yield words


@cache
def options_of(command: str) -> set[str]:
    return {option for p in cli.load(command).params for option in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_name_commands_options_modules_and_targets_that_exist(name: str) -> None:
    for words in commands(name):
        if words[0] == "torchrun":
            words = words[words.index("ratioctl") :]
        if words[0] == "ratioctl":
            assert words[1] in cli.COMMANDS, words
            given = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert given <= options_of(words[1]), words
        elif words[:2] == ["python", "-m"]:
            path = ROOT / f"{words[2].replace('.', '/')}.py"
            assert path.is_file(), words
            given = {word for word in words[3:] if word.startswith("--")}
            assert all(f'"{option}"' in _with_harness(path) for option in given), words
        elif words[:2] == ["python", "-c"]:
            compile(words[2], name, "exec")  # test_sample_photographs_are_copied runs it
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
        else:
            assert words[0] in ("pip", "npm", "curl", "find", "sort", "awk", "tritonserver"), words


def _with_harness(path: Path) -> str:
    shared = (ROOT / "tools" / "harness.py", ROOT / "experiments" / "study.py")
    return "".join(each.read_text(encoding="utf-8") for each in (path, *shared))


def test_sample_photographs_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = (words for words in commands("get-started.md") if words[:2] == ["python", "-c"])
    monkeypatch.chdir(tmp_path)
    exec(words[2], {})
    assert (tmp_path / "assets" / "samples" / "cat.jpg").is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "toml")])
def test_recipes_load(name: str, tmp_path: Path) -> None:
    for block in blocks(name, "toml"):
        path = tmp_path / "recipe.toml"
        path.write_text(block, encoding="utf-8")
        recipe = recipes.load(path)
        assert f'name = "{recipe.name}"' in block


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "json")])
def test_json_blocks_parse(name: str) -> None:
    for block in blocks(name, "json"):
        documents = block.splitlines() if block.count("\n{") else [block]
        assert all(isinstance(json.loads(document), dict) for document in documents)


def test_the_document_shown_is_valid() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = ROOT / "tests" / "compat" / "schemas" / "counterfactuals.json"
    (block,) = blocks("reference/files.md", "json")
    jsonschema.validate(json.loads(block), json.loads(schema.read_text(encoding="utf-8")))


def test_the_rows_shown_are_those_of_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("get-started.md", "json")
    photographs = [str(ROOT / "assets" / "samples" / name) for name in ("cat.jpg", "rocket.jpg")]
    assert cli.main(["ood-score", *photographs, "--format", "jsonl", "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = [json.loads(line) for line in block.splitlines()]
    assert [list(row) for row in rows] == [list(row) for row in shown]
    for row, expected in zip(rows, shown, strict=True):
        assert (row["label"], row["is_ood"]) == (expected["label"], expected["is_ood"])
        assert row["confidence"] == pytest.approx(expected["confidence"], abs=1e-4)


NOT_THE_FIELD_S_WORDS = (
    *("in-images", "out-images", "lets? through", "seen as", "not known", "a fault of ours", "mended"),
    *("is no number", "to be had", "colour", "normalis", "neighbour", "quantis", "optimiser"),
)


def test_pages_and_help_use_the_terms_of_the_field() -> None:
    from tools import generate_reference

    pages = {name: (DOCS / name).read_text(encoding="utf-8") for name in NAMES}
    texts = {name: re.sub(r"\]\(.*?\)", "]", page) for name, page in pages.items()}  # without link targets
    texts |= {"--help": generate_reference.command_line(), "recipe keys": generate_reference.recipe_keys()}
    texts |= {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "CHANGELOG.md", "SECURITY.md")
    }
    texts |= {
        str(path): path.read_text(encoding="utf-8") for path in (ROOT / "assets" / "models").glob("*/*.md")
    }
    words = re.compile("|".join(rf"\b(?:{word})" for word in NOT_THE_FIELD_S_WORDS), re.IGNORECASE)
    found = [(name, match[0]) for name, text in texts.items() for match in words.finditer(text)]
    assert found == []


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of every text in the construction of an error."""
    for path in sorted((ROOT / "ratioctl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "Interrupted")):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", part.value


def test_messages_use_the_terms_of_the_field() -> None:
    texts = list(messages())
    assert len(texts) > 500
    phrases = (
        *NOT_THE_FIELD_S_WORDS,
        "is no [a-z]+ of",
        "is no (?:name|file|number|list)",
        "breaks? off",
        "circle",
    )
    words = re.compile("|".join(rf"\b(?:{phrase})" for phrase in phrases), re.IGNORECASE)
    assert [(place, match[0]) for place, text in texts for match in words.finditer(text)] == []


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = DOCS / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if path.is_relative_to(DOCS) and path.relative_to(DOCS).as_posix() in GENERATED:
            continue
        assert path.is_file(), target
        assert path.is_relative_to(DOCS), f"{target} leads out of the site"
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))
    records = {name for name in NAMES if name.startswith("decisions/0")}  # listed by their index
    assert listed - GENERATED == set(NAMES) - records
    assert listed >= GENERATED
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    assert all(Path(name).name in index for name in records)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("results/")])
def test_results_have_their_json_in_the_repository(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    named = {file for file in re.findall(r"`([\w.-]+\.jsonl?)`", text) if "METHOD" not in file}
    missing = {file for file in named if not any((folder / file).is_file() for folder in RESULTS)}
    assert missing == set()
    assert named or name == "results/index.md"


def test_recipes_and_models_named_in_the_pages_exist() -> None:
    from ratioctl import package as packages

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(
        re.findall(
            r"`((?:digits|cifar100?|svhn|restricted64)-(?:plain|oe|acet|at|trades|ratio)[\w.-]*)`", text
        )
    )
    named = {name for name in named if not name.endswith((".json", ".jsonl"))}
    assert len(named) >= 8
    assert named - set(recipes.available()) - set(packages.bundled()) == set()


def test_pages_and_notebooks_of_the_gallery(tmp_path: Path) -> None:
    pytest.importorskip("jupytext")
    pytest.importorskip("nbconvert")
    import nbformat

    from tools import gallery

    script = tmp_path / "shown.py"
    script.write_text("# %% [markdown]\n# # Shown\n# A text.\n\n# %%\nprint(6 * 7)\n", encoding="utf-8")
    notebook = gallery.notebook_of(script)
    nbformat.validate(notebook)
    output = nbformat.v4.new_output("stream", name="stdout", text="42\n")
    notebook.cells[1].outputs = [output, {**output, "name": "stderr", "text": "a warning\n"}]
    png = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
    notebook.cells[1].outputs.append(png)
    text, pictures = gallery.page(notebook, "shown")
    assert text.startswith("# Shown\nA text.\n\n```python\nprint(6 * 7)\n```\n\n```text\n42\n```\n")
    assert "a warning" not in text
    assert text.endswith("[Script](shown.py) · [Notebook](shown.ipynb)\n")
    (name,) = pictures
    assert f"({name})" in text
    assert gallery.title(script) == "Shown"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_of_the_gallery_begin_with_their_title(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# %% [markdown]"
    assert lines[1].startswith("# # ")
    assert "# %%" in lines
