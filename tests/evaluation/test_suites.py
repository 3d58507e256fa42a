"""Suites: their radii, and what they are called."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest

from ratioctl.errors import UsageError
from ratioctl.evaluation import SUITES, suites
from ratioctl.recipe import Ball
from ratioctl.types import Evaluation
from tests.evaluation.helpers import evaluated


def test_radii_without_a_recipe_are_the_papers_scaled_to_the_input() -> None:
    big: Any = types.SimpleNamespace(recipe_text=None, input_size=(3, 32, 32))
    balls = suites.robust_balls(big, SUITES["paper"])
    assert [(b.p, b.eps) for b in balls] == [(2, 0.5), (2, 1.0), (math.inf, 8 / 255)]
    assert suites.outside_ball(big, SUITES["paper"]).eps == 1.0
    small: Any = types.SimpleNamespace(recipe_text=None, input_size=(3, 16, 16))
    assert [(b.p, b.eps) for b in suites.robust_balls(small, SUITES["quick"])] == [(2, 0.25)]
    assert suites.outside_ball(small, SUITES["paper"]).eps == 0.5
    extra = suites.robust_balls(small, SUITES["full"])[3:]
    assert [b.p for b in extra] == [1.0, 1.5]
    assert extra[0].eps == 12 / 4  # an l1 radius grows with the number of pixels


def test_radii_of_a_recipe_come_first() -> None:
    text = """name = "r"
        [data]
        train = "digits:train"
        [evaluation]
        robust = [{ p = 2, eps = 3.5 }, { p = 2, eps = 7.0 }]
        outside_eps = 7.0"""
    known: Any = types.SimpleNamespace(recipe_text=text, input_size=(3, 224, 224), path="x")
    assert [b.eps for b in suites.robust_balls(known, SUITES["quick"])] == [3.5]
    assert suites.outside_ball(known, SUITES["paper"]).eps == 7.0


def test_the_quick_suite_is_not_called_autoattack() -> None:
    assert "AutoAttack" not in str(SUITES["quick"])
    assert "AutoAttack (standard)" in str(SUITES["paper"])
    assert SUITES["full"].attacks_for(Ball(p=1.5, eps=1)) == ("apgd-ce", "apgd-t")


def test_a_suite_names_its_backend(
    small_package: Path, labelled: str, plain: tuple[Evaluation, list[dict[str, Any]]]
) -> None:
    assert "by pyautoattack" in str(SUITES["paper"])
    assert SUITES["full"].backend_for(Ball(p=1.5, eps=1), 10) == "own"
    assert SUITES["full"].backend_for(Ball(p=1, eps=12), 10) == "reference"
    assert SUITES["full"].backend_for(Ball(p=2, eps=1), 3) == "own"
    row = next(r for r in plain[0].models[0].report.measurements if r.name == "robust_accuracy")
    assert row.details["backend"] == "own"
    assert row.details["batch_size"] == 128
    for suite, options, says in (
        ("quick", {"backend": "reference"}, "quick"),
        ("paper", {"backend": "other"}, "own or reference"),
        ("paper", {"save_adversarial": True}, "folder"),
    ):
        with pytest.raises(UsageError, match=says):
            evaluated(small_package, labelled, suite=suite, **options)
