"""The built documentation: complete, self-contained, light in weight, accessible, in light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHOWN = [
    "",
    "get-started",
    "concepts/ratio",
    "reference/command-line",
    "results/comparison",
    "examples/own_folder",
]
KIB = 1024


def run(folder: Path, *program: str) -> str:
    done = subprocess.run([sys.executable, *program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, npm_install: Callable[..., None]) -> Path:
    """The site; examples that `make docs` has not run are built without their outputs."""
    for extra in ("zensical", "mkdocstrings", "jupytext", "nbconvert"):
        pytest.importorskip(extra)
    folder = tmp_path_factory.mktemp("site")
    docs = shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    run(ROOT, "-m", "tools.generate_reference", "--out", str(docs / "reference"))
    if not (docs / "examples" / "index.md").is_file():
        run(ROOT, "-m", "tools.gallery", "--no-run", "--out", str(docs / "examples"))
    if not (docs / "javascripts" / "katex").is_dir():
        npm_install(folder, "katex@0.16.22")
        built = folder / "node_modules" / "katex" / "dist"
        shutil.copytree(built, docs / "javascripts" / "katex", ignore=shutil.ignore_patterns("*.md"))
    build = "import sys; from zensical.main import cli; sys.argv = ['zensical', 'build', '--strict']; cli()"
    said = run(folder, "-c", build)
    assert "griffe:" not in said, said  # a docstring that mkdocstrings cannot read
    return folder / "build" / "site"


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def assets(page: Path, site: Path) -> set[str]:
    """What a browser loads with the page, as the page names it."""
    text = page.read_text(encoding="utf-8")
    tags = re.findall(r"<(?:script|img|link|source|iframe)\b[^>]*>", text)
    rest = [tag for tag in tags if not re.search(r'rel="?(canonical|next|prev|sitemap|alternate)', tag)]
    found = {name for tag in rest for name in re.findall(r'\b(?:src|href)="?([^"\s>]+)', tag)}
    return {name for name in found if not name.startswith("data:")}


def test_every_page_is_built(site: Path) -> None:
    built = {str(path.parent.relative_to(site)) for path in pages(site) if path.name == "index.html"}
    names = {path.relative_to(site.parents[1] / "docs") for path in (site.parents[1] / "docs").rglob("*.md")}
    expected = {str(name.parent if name.name == "index.md" else name.with_suffix("")) for name in names}
    assert expected <= built
    assert (site / "examples" / "onnx_in_ten_lines.ipynb").is_file()
    assert (site / "examples" / "onnx_in_ten_lines.py").is_file()


def test_nothing_comes_from_another_host(site: Path) -> None:
    foreign = {name for page in pages(site) for name in assets(page, site) if urlsplit(name).netloc}
    assert foreign == set()


def test_pages_are_light(site: Path) -> None:
    """A page of text below 256 KiB of HTML, with everything that it loads below 1.5 MiB."""
    for page in pages(site):
        size = page.stat().st_size
        assert size < 256 * KIB, page
        for name in assets(page, site):
            path = (page.parent / urlsplit(name).path).resolve()
            if page.name != "404.html":
                assert path.is_file(), (page, name)
                size += path.stat().st_size
        assert size < 1536 * KIB, (page, size)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_narrow_windows(site: Path, open_page: Callable[..., Any], name: str, scheme: str) -> None:
    page = open_page(site / name / "index.html", color_scheme=scheme, viewport={"width": 380, "height": 800})
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    found = Axe().run(page.page).response["violations"]
    serious = [
        (rule["id"], node["html"], node["failureSummary"])
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
    assert not serious, serious


def test_equations_are_rendered_by_a_local_copy(site: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(site / "concepts" / "ratio" / "index.html")
    page.page.wait_for_function("document.querySelectorAll('.katex').length >= 10")
    assert page.evaluate("document.querySelectorAll('.katex-error').length") == 0
    assert all(url.startswith("file:") for url in page.requests)
    page = open_page(site / "get-started" / "index.html")
    assert not any("katex.min" in url for url in page.requests)
