"""The comparison's tables, beside the JSON and in the documentation, are those of the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import comparison_report as report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("what", ["small", "fine-tune"])
def test_tables_beside_the_json_are_printed_from_it(what: str) -> None:
    result = json.loads((RESULTS / f"comparison-{what}.json").read_text(encoding="utf-8"))
    printed = (RESULTS / f"comparison-{what}.md").read_text(encoding="utf-8")
    for table in (report.table(result), report.by_set(result), report.models(result)):
        assert f"\n{table}\n" in printed


@pytest.mark.parametrize(
    ("what", "page"), [("small", "comparison"), ("fine-tune", "fine-tuning"), ("digits", "digits")]
)
def test_tables_of_the_documentation_are_printed_from_the_json(what: str, page: str) -> None:
    result = json.loads((RESULTS / f"comparison-{what}.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "results" / f"{page}.md").read_text(encoding="utf-8")
    for line in report.table(result).splitlines()[2:]:
        assert line in text, line


def test_a_row_shows_its_interval_or_the_range_over_its_seeds() -> None:
    def row(name: str, value: float) -> dict[str, object]:
        measured = {
            "name": "accuracy",
            "dataset": "data",
            "ball": None,
            "value": value,
            "interval": [0.5, 0.75],
        }
        return {"name": name, "measurements": [measured]}

    rows = [row("oe", 0.6), row("at-0.5", 0.5), row("at-0.5-seed1", 0.7)]
    groups = report.grouped(rows)
    assert list(groups) == ["oe", "at-0.5"]
    clean = dict(report.COLUMNS)["clean"]
    assert report.cell(groups["oe"], clean) == "60.0 (50.0 to 75.0)"
    assert report.cell(groups["at-0.5"], clean) == "60.0 (50.0 to 70.0)"
    assert report.cell(groups["oe"], dict(report.COLUMNS)["robust"]) == "-"


def test_no_figure_without_confidences_by_radius(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no confidences by radius"):
        report.figure({"rows": [{"name": "plain", "radius": {}}]}, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
