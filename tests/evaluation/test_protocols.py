"""Published protocols: their balls and budgets, our rows beside the published ones, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.cli import evaluate as command
from ratioctl.errors import UsageError
from ratioctl.evaluation import protocols, run
from ratioctl.evaluation.protocols import PROTOCOLS
from ratioctl.report import evaluation_files, evaluation_tables, markdown
from ratioctl.types import Evaluation


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocols with a few steps of our own attacks."""
    for name, protocol in list(PROTOCOLS.items()):
        less: dict[str, Any] = {"attacks": ("apgd-ce",), "budget": AttackBudget(steps=2), "backend": "own"}
        less |= {"outside": 4, "outside_steps": 2, "outside_restarts": 1, "probe": 0, "exact": False}
        monkeypatch.setitem(
            PROTOCOLS,
            name,
            dataclasses.replace(protocol, suite=dataclasses.replace(protocol.suite, **less)),
        )


def evaluated(package: Path, data: str, name: str, ood: tuple[str, ...] = (), **options: Any) -> Evaluation:
    options = {"limit": 8, "device": "cpu", "precision": "fp32", **options}
    return run([package], data=data, ood=ood, protocol=name, **options)


def rows(evaluation: Evaluation, published: bool) -> list[dict[str, Any]]:
    assert evaluation.comparison is not None
    return [row for row in evaluation.comparison["rows"] if row["published"] is published]


def value(evaluation: Evaluation, name: str, dataset: str, attacked: bool) -> float:
    found = evaluation.models[0].report.measurements
    return next(
        m.value for m in found if (m.name, m.dataset, m.ball is not None) == (name, dataset, attacked)
    )


def test_balls_and_budgets_are_the_published_ones() -> None:
    def balls(name: str) -> tuple[list[str], str | None]:
        suite = PROTOCOLS[name].suite
        return [str(ball) for ball in suite.fixed], suite.outside_ball and str(suite.outside_ball)

    assert balls("robustbench-l2") == (["l2 0.5"], None)
    assert balls("robustbench-linf") == (["linf 0.0313725"], None)
    assert balls("paper") == (["l2 0.5"], "l2 1")
    assert balls("good") == (["linf 0.01"], "linf 0.01")
    assert balls("atd") == (["linf 0.0313725"], "linf 0.0313725")
    for name in ("robustbench-l2", "robustbench-linf", "paper"):
        suite = PROTOCOLS[name].suite
        assert (suite.standard, suite.backend, suite.inside) == (True, "reference", None)
    paper = PROTOCOLS["paper"].suite
    assert (paper.outside, paper.outside_steps, paper.outside_restarts) == (1024, 100, 5)
    assert "worst case of 1000 images per OOD set in linf 0.01" in str(PROTOCOLS["good"].suite)
    assert "AutoAttack" not in str(PROTOCOLS["good"].suite)


def test_every_published_figure_has_its_origin_and_fits_a_column() -> None:
    for row in protocols.published():
        protocol = protocols.by_name(row["protocol"])
        assert set(row["figures"]) <= {column.key for column in protocol.columns}, row
        assert row["figures"]
        assert all(0 <= figure <= 100 for figure in row["figures"].values())
        assert row["network"]
        assert row["data"]
        assert "arXiv" in row["source"] or "RobustBench" in row["source"]
    assert {row["protocol"] for row in protocols.published()} == set(PROTOCOLS)
    one = next(r for r in protocols.published() if (r["protocol"], r["name"]) == ("paper", "RATIO-0.25"))
    assert one["figures"] == {
        "accuracy": 93.5,
        "robust": 70.5,
        "ece": 2.7,
        "auroc": 95.0,
        "worst": 84.3,
        "mmc": 33.9,
    }


@pytest.mark.usefixtures("short")
def test_atd_attacks_both_sides_and_stands_beside_the_published_rows(
    small_package: Path, labelled: str, tmp_path: Path
) -> None:
    found = evaluated(small_package, labelled, "atd", ("uni=noise:uniform",))
    (ours,) = rows(found, published=False)
    figures = {key: figure["value"] for key, figure in ours["figures"].items()}
    assert figures == {
        "auroc": value(found, "auroc", "mean", False),
        "inside": value(found, "auroc_inside_attacked", "mean", True),
        "outside": value(found, "auroc", "mean", True),
        "both": value(found, "auroc_both_attacked", "mean", True),
    }
    assert figures["both"] <= min(figures["inside"], figures["outside"]) <= figures["auroc"]
    attacked = [m.ball for m in found.models[0].report.measurements if m.ball is not None]
    assert {str(ball) for ball in attacked} == {"linf 0.0313725"}
    atd = next(row for row in rows(found, published=True) if row["name"] == "ATD")
    assert atd["figures"]["both"]["value"] == 0.693
    assert atd["source"].startswith("arXiv 2209.15246")
    atom = next(row for row in rows(found, published=True) if row["name"] == "ATOM")
    assert atom["figures"]["auroc"] is None
    table = evaluation_tables.tables(found)[0]
    assert table.title == "Protocol atd"
    assert table.rows[0][-1] == "this run"
    assert (0, 1) in table.intervals
    assert "published [1]: of the source, CIFAR-10" in table.rows[1][-1]
    assert "were not run here: [1] arXiv 2209.15246" in table.note
    paths = evaluation_files.write(found, tmp_path)
    assert json.loads(paths[0].read_text(encoding="utf-8"))["comparison"]["protocol"] == "atd"
    for text in (markdown.markdown(found), paths[2].read_text(encoding="utf-8")):
        assert "Protocol atd" in text
        assert "HAT with OpenMax" in text


@pytest.mark.usefixtures("short")
def test_good_has_a_row_per_set_and_no_guarantee(small_package: Path, labelled: str) -> None:
    found = evaluated(small_package, labelled, "good", ("uni=noise:uniform", "smooth=noise:smooth"))
    ours = rows(found, published=False)
    assert [row["dataset"] for row in ours] == ["uni", "smooth"]
    assert all(row["figures"]["guaranteed"] is None for row in ours)
    table = evaluation_tables.tables(found)[0]
    assert table.header[:3] == ("per cent", "OOD set", "AUROC")
    assert table.rows[0][4] == "-"
    assert ("GOOD80", "svhn", "94.0", "41.4", "38.0") in [row[:5] for row in table.rows]


@pytest.mark.usefixtures("short")
def test_robustbench_takes_no_ood_images(small_package: Path, labelled: str) -> None:
    found = evaluated(small_package, labelled, "robustbench-linf")
    (ours,) = rows(found, published=False)
    assert ours["figures"]["robust"]["value"] == value(found, "robust_accuracy", "test", True)
    assert [entry["role"] for entry in found.data] == ["inside"]
    assert evaluation_tables.tables(found)[1].title == "Summary of small"
    with pytest.raises(UsageError, match="measures ID images"):
        evaluated(small_package, labelled, "robustbench-linf", ("uni=noise:uniform",))


def test_openood_averages_near_and_far_sets(small_package: Path, labelled: str) -> None:
    sets = ("near-a=noise:uniform", "cifar100=noise:smooth", "svhn=noise:uniform")
    found = evaluated(small_package, labelled, "openood", sets)
    (ours,) = rows(found, published=False)
    each = [value(found, "auroc", name, False) for name in ("near-a", "cifar100", "svhn")]
    assert ours["figures"]["near"]["value"] == pytest.approx((each[0] + each[1]) / 2)
    assert ours["figures"]["far"]["value"] == each[2]
    with pytest.raises(UsageError, match="near-photos=SOURCE or far-photos=SOURCE"):
        evaluated(small_package, labelled, "openood", ("photos=noise:uniform",))


def test_rows_of_the_same_in_distribution_are_shown() -> None:
    for data, name in (("svhn-test.tar.xz:test", "SVHN"), ("cifar100:test", "CIFAR-100"), ("a", "CIFAR-10")):
        shown = protocols.comparison(PROTOCOLS["paper"], (), data, ())["rows"]
        assert {row["data"] for row in shown} == {name}


def test_what_does_not_go_together_is_refused(small_package: Path, labelled: str) -> None:
    with pytest.raises(UsageError, match=r'no such protocol.*"openood"'):
        evaluated(small_package, labelled, "openod")
    with pytest.raises(UsageError, match="Leave out --suite"):
        evaluated(small_package, labelled, "atd", suite="paper")
    with pytest.raises(UsageError, match="has no effect with --protocol atd"):
        evaluated(small_package, labelled, "atd", write=True)


def test_the_command_line_knows_every_protocol() -> None:
    option = typing.get_args(command.ProtocolName)[0]
    literal = next(kind for kind in typing.get_args(option) if kind is not type(None))
    assert set(typing.get_args(literal)) == set(PROTOCOLS)
