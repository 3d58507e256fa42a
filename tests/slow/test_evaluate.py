"""What an evaluation says about a plainly trained model: the paper's first column, in small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import ratioctl
from ratioctl.attack.ensemble import Budget
from ratioctl.evaluate import SUITES, Suite, run
from ratioctl.package import ModelPackage
from ratioctl.results import Report

SETS = {"flower": "photos:flower", "uniform": "noise:uniform"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float, float], ModelPackage]:
    """Trains once; the radii stand in the recipe that goes into the package."""
    folder = tmp_path_factory.mktemp("plain")

    def trained(inside: float, outside: float) -> ModelPackage:
        return ratioctl.train(
            "digits-plain",
            out=folder / f"{inside}-{outside}",
            settings=[
                f"evaluation.robust=[{{p=2, eps={inside}}}]",
                f"evaluation.outside_eps={outside}",
            ],
            device="cpu",
            precision="fp32",
        )

    return trained


def evaluated(package: ModelPackage, suite: Suite) -> Report:
    found = run(
        [package], data="digits:test", ood=SETS, suite=suite, limit=60, device="cpu", precision="fp32"
    )
    return found.models[0].report


def value(report: Report, name: str, dataset: str, attacked: bool) -> float:
    return next(
        row.value
        for row in report.measurements
        if (row.name, row.dataset, row.ball is not None) == (name, dataset, attacked)
    )


@pytest.mark.slow
def test_a_plain_model_falls_under_attack_inside_and_outside(
    plain: Callable[[float, float], ModelPackage],
) -> None:
    """Radii under which a digit is still read by people (black strokes on white: most are 4 apart)."""
    package = plain(2.0, 3.0)
    report = evaluated(package, dataclasses.replace(SUITES["quick"], curve=0))
    assert value(report, "accuracy", "digits:test", False) > 0.9
    assert value(report, "robust_accuracy", "digits:test", True) <= 0.05
    assert value(report, "auroc", "mean", False) > 0.8
    assert value(report, "auroc", "mean", True) < 0.1
    assert value(report, "mmc", "mean", True) > 0.95
    assert value(report, "ece_mixture", "digits:test + flower + uniform", False) > 0.3


@pytest.mark.slow
def test_an_attack_weakened_to_one_step_is_noticed(plain: Callable[[float, float], ModelPackage]) -> None:
    package = plain(0.5, 3.0)
    quick = dataclasses.replace(SUITES["quick"], curve=0)
    weak = dataclasses.replace(
        quick, attacks=("apgd-ce",), budget=Budget(steps=1), outside_steps=1, outside_targets=0
    )
    said = {name: evaluated(package, suite).warnings for name, suite in (("quick", quick), ("weak", weak))}
    for what in ("robust accuracy", "worst case on flower"):
        assert any(text.startswith(what) and "too weak" in text for text in said["weak"]), said["weak"]
    assert not any("too weak" in text for text in said["quick"]), said["quick"]
