"""What an evaluation says about a plainly trained model: the paper's first column, in small."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ratioctl
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation import SUITES, Suite, run
from ratioctl.package import ModelPackage
from ratioctl.report import evaluation_files, evaluation_tables
from ratioctl.types import Report

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


class Means(torch.nn.Module):
    """Four logits of channel means: a few microseconds a pass, and sound."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = x.mean((2, 3)) * 20
        return torch.cat([m, m.mean(1, keepdim=True)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["paper", "full"])
def test_the_long_suites_run_to_their_end(
    suite: str, small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, with pyautoattack's standard version, on few images of a network that costs nothing."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    network = Means().eval()
    monkeypatch.setattr(sys.modules["ratioctl.evaluation.driver"], "fold_batchnorm", lambda model: network)
    pixels = np.random.default_rng(0).integers(96, 160, (6, 8, 8, 3), dtype=np.uint8)
    right = network(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).argmax(1).tolist()
    names = ("cat", "dog", "red panda", "dog")
    for k, label in enumerate(right):
        folder = tmp_path / "data" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k]).save(folder / f"{k}.png")
    found = run(
        [small_package],
        data=str(tmp_path / "data"),
        suite=suite,
        limit=6,
        device="cpu",
        out=tmp_path / "out",
        finish=lambda done: evaluation_files.write(done, tmp_path / "out"),
    )
    rows = [row for row in found.models[0].report.measurements if row.name == "robust_accuracy"]
    norms = [2.0, 2.0, math.inf, *([1.0, 1.5] if suite == "full" else [])]
    assert [row.ball.p for row in rows if row.ball] == norms
    for row in rows:
        assert row.ball is not None
        reference = row.ball.p != 1.5
        assert row.details["backend"].startswith("pyautoattack" if reference else "own")
        assert (row.details["attack"] == "AutoAttack (standard)") is reference
        assert row.n == 6
    by = next(t for t in evaluation_tables.tables(found) if t.title == "Robust accuracy by attack")
    assert by.header[2:6] == ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    assert len(by.rows) == len(norms)
    assert sum(cell == "-" for cells in by.rows for cell in cells) == (2 if suite == "full" else 0)
    said = found.models[0].report.warnings
    assert not any("too weak" in text or "gradient" in text for text in said), said
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_an_attack_weakened_to_one_step_is_noticed(plain: Callable[[float, float], ModelPackage]) -> None:
    """At temperature 8: on calibrated confidences one step may come close to 1, where little is left to find,
    and how close depends on the machine that trained."""
    package = dataclasses.replace(plain(0.5, 1.0), temperature=8.0)
    quick = dataclasses.replace(SUITES["quick"], curve=0)
    weak = dataclasses.replace(
        quick, attacks=("apgd-ce",), budget=AttackBudget(steps=1), outside_steps=1, outside_targets=0
    )
    said = evaluated(package, weak).warnings
    for what in ("robust accuracy", "worst case on flower"):
        assert any(text.startswith(what) and "too weak" in text for text in said), said
    said = evaluated(package, quick).warnings
    assert not any("too weak" in text for text in said), said
