"""Selective prediction against values computed by hand and by enumeration."""

from __future__ import annotations

import numpy as np
import pytest

from ratioctl import metrics

SCORES = [0.9, 0.8, 0.7, 0.6]


def test_the_curve_by_hand() -> None:
    coverage, risk = metrics.risk_coverage(SCORES, [True, False, True, True])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == [0, 1 / 2, 1 / 3, 1 / 4]
    assert metrics.aurc(SCORES, [True, False, True, True]) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_coverage_takes_the_most_images_although_fewer_have_more_errors() -> None:
    correct = [True, False, True, True]
    assert metrics.coverage_at_risk(SCORES, correct, 0.25) == 1.0
    assert metrics.coverage_at_risk(SCORES, correct, 0.24) == 0.25
    assert metrics.coverage_at_risk(SCORES, [False, True, True, True], 0.1) == 0.0


def test_ties_are_accepted_together_in_any_order() -> None:
    scores, correct = np.array([0.9, 0.5, 0.5, 0.5]), np.array([True, True, False, False])
    coverage, risk = metrics.risk_coverage(scores, correct)
    assert coverage.tolist() == [0.25, 1.0]
    assert risk.tolist() == [0, 0.5]
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        assert metrics.aurc(scores[order], correct[order]) == metrics.aurc(scores, correct) == 0.375


def test_aurc_between_the_best_and_the_worst_ranking() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(200) < 0.8
    best = metrics.aurc(correct + rng.random(200) / 2, correct)
    worst = metrics.aurc(rng.random(200) / 2 - correct, correct)
    error = 1 - correct.mean()
    assert best < metrics.aurc(rng.random(200), correct) < worst
    assert best == pytest.approx(
        error + (1 - error) * np.log(1 - error), abs=0.01
    )  # Geifman et al. 2019, eq. 4


@pytest.mark.parametrize("arguments", [([0.5], [True, False]), ([np.nan], [True]), ([], [])])
def test_impossible_input(arguments: tuple[list[float], list[bool]]) -> None:
    with pytest.raises(ValueError):
        metrics.risk_coverage(*arguments)
