"""The page about a model: its numbers are those of the images on it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl.cli import main
from ratioctl.errors import OutputError
from ratioctl.evaluation import overview as module
from ratioctl.report import overview_page


@pytest.fixture(scope="module", autouse=True)
def short() -> None:
    """Searches of two steps."""
    module.STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of noise in each of two classes."""
    root = tmp_path_factory.mktemp("overview") / "data"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for k in range(4):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def found(small_package: Path, data: Path) -> module.Overview:
    return module.overview(small_package, data=str(data), ood=["noise=noise:smooth"], limit=8)


def test_the_page_agrees_with_the_rows_of_ood_score(
    found: module.Overview, small_package: Path, data: Path
) -> None:
    rows = {
        Path(row.path).relative_to(data).as_posix(): row
        for row in ratioctl.ood_score(str(data), model=small_package)
    }
    labels = found.package.label_names
    counts = np.zeros((4, 4), int)
    for name, row in rows.items():
        counts[labels.index(name.split("/")[0]), labels.index(str(row.label))] += 1
    np.testing.assert_array_equal(found.confusion, counts)
    for case in (*found.wrong, *found.outlying):
        row = rows[case.name]
        assert case.predicted == row.label
        assert case.confidence == pytest.approx(row.confidence, abs=1e-5)
        assert case.is_ood == row.is_ood
    wrong = {name for name, row in rows.items() if row.label != name.split("/")[0]}
    assert {case.name for case in found.wrong} == wrong
    lowest = sorted(rows, key=lambda name: rows[name].confidence or 0)
    assert [case.name for case in found.outlying] == lowest
    for row in found.classes:
        own = [r for name, r in rows.items() if name.startswith(f"{row.label}/")]
        assert row.recall == pytest.approx(np.mean([r.label == row.label for r in own]))
        assert row.accepted["tpr95"] == pytest.approx(np.mean([not r.is_ood for r in own]))
    for case, explanation in (*found.typical, *found.mistakes):
        order = np.argsort(explanation.original.probabilities)
        assert explanation.targets[0].target == labels[order[-2]]
        assert case.predicted == labels[order[-1]]


def test_one_self_contained_page(found: module.Overview, tmp_path: Path) -> None:
    path = overview_page.write(found, tmp_path / "page")
    page = path.read_text()
    assert page.count("<h1>") == 1
    assert "<script" not in page
    assert "not a diagnosis" in page
    assert len(re.findall(r'src="(?!data:)', page)) == 0
    for name in ("cat", "dog", "Confusion matrix", "OOD images accepted", "Robust accuracy"):
        assert name in page
    assert overview_page.write(found, tmp_path / "page") == path, "its own page may be replaced"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/report.html").write_text("mine")
    with pytest.raises(OutputError, match="not written by ratioctl report"):
        overview_page.write(found, tmp_path / "other")


@pytest.mark.slow
def test_names_cannot_inject_markup(
    small_package: Path, cats_and_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = cats_and_dogs / "cat" / "<b onclick=x>\x1b[31m.png"
    (cats_and_dogs / "cat" / "0.png").rename(evil)
    line = ["report", str(small_package), "--data", str(cats_and_dogs), "--limit", "8"]
    assert main([*line, "--out", str(tmp_path / "o"), "--json"]) == 0
    page = (tmp_path / "o/report.html").read_text()
    assert "<b onclick" not in page
    assert "\x1b" not in page
    assert main([*line, "--ood", "nonsense"]) == 2
