"""`report.html` in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation import Suite, run
from ratioctl.report import evaluation_files

TINY = Suite(
    name="tiny",
    inside=4,
    balls=1,
    attacks=("apgd-ce",),
    budget=AttackBudget(steps=2),
    outside=3,
    outside_steps=2,
    curve=2,
    curve_steps=2,
    probe=1,
)
NAME = "uni <noise> " + 70 * "x"  # nobody breaks it


@pytest.fixture
def report(small_package: Path, cats_and_dogs: Path, tmp_path: Path) -> Path:
    found = run(
        [small_package],
        data=str(cats_and_dogs),
        ood={NAME: "noise:uniform"},
        suite=TINY,
        limit=6,
        device="cpu",
        precision="fp32",
    )
    evaluation_files.write(found, tmp_path / "out")
    return tmp_path / "out" / "report.html"


def test_the_report_opens_with_its_figures_and_asks_the_network_for_nothing(
    report: Path, open_page: Callable[[Path], Any]
) -> None:
    page = open_page(report)
    loaded = "[...document.images].map(i => i.complete && i.naturalWidth === 8)"
    assert page.evaluate(loaded) == [True] * 6  # three out-images, each before and after
    titles = page.evaluate("[...document.querySelectorAll('figcaption b')].map(b => b.textContent)")
    assert titles[:4] == [
        *("Reliability", "Risk over coverage", "Confidence over the radius", f"ROC, {NAME}"),
    ]
    assert len(titles) == 6
    drawn = """[...document.querySelectorAll('figure > svg')].map(svg => {
        const box = svg.getBBox();
        return box.width > 200 && box.height > 100 && svg.querySelectorAll('polyline, rect').length > 1;
    })"""
    assert page.evaluate(drawn) == [True] * 6
    overlaps = """[...document.querySelectorAll('figure > svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
        return boxes.filter((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1
            && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
    }).length"""
    color = "getComputedStyle(document.querySelector('polyline.line')).stroke"
    assert page.evaluate(color) not in ("none", "rgb(0, 0, 0)")
    for width in (380, 1400):
        page.page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        assert page.evaluate(overlaps) == 0, width
    assert page.evaluate("[...document.images].every(i => i.alt.length > 10)")
    assert page.evaluate(
        "[...document.querySelectorAll('table tr')].every(r => r.querySelector('th[scope]'))"
    )
    assert page.requests == [report.as_uri()]
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(report: Path, open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(report, color_scheme=scheme)
    found = Axe().run(page.page).response["violations"]
    serious = [
        (rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")
    ]
    assert not serious, serious


def test_the_browser_tests_can_fail(tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='missing.png'><script>console.error('no')</script>", encoding="utf-8")
    page = open_page(bad)
    assert len(page.requests) == 2
    assert any("no" in text for text in page.complaints)
