"""What an evaluation says about a plainly trained model: the paper's first column, in small."""

from __future__ import annotations

from pathlib import Path

import pytest

import ratioctl
from ratioctl.results import Report


@pytest.mark.slow
def test_a_plain_model_falls_under_attack_inside_and_outside(tmp_path: Path) -> None:
    package = ratioctl.train("digits-plain", out=tmp_path / "run", device="cpu", precision="fp32")
    report = ratioctl.evaluate(
        package,
        data="digits:test",
        ood={"flower": "photos:flower", "uniform": "noise:uniform"},
        limit=60,
        out=tmp_path / "out",
        device="cpu",
        precision="fp32",
    )
    assert isinstance(report, Report)

    def value(name: str, dataset: str, attacked: bool) -> float:
        return next(
            row.value
            for row in report.measurements
            if (row.name, row.dataset, row.ball is not None) == (name, dataset, attacked)
        )

    assert value("accuracy", "digits:test", False) > 0.9
    assert value("robust_accuracy", "digits:test", True) < 0.4
    assert value("auroc", "mean", False) > 0.8
    assert value("auroc", "mean", True) < 0.4
    assert value("mmc", "mean", True) > 0.95
    assert value("ece_mixture", "digits:test + flower + uniform", False) > 0.3
