"""Figures computed from the results of the stages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ratioctl import metrics
from ratioctl.attacks import goals
from ratioctl.evaluation import measurements
from ratioctl.recipe import Calibration
from ratioctl.types import Measurement
from tests.evaluation.helpers import BALL, images, noise


def test_robust_accuracy_counts_what_each_attack_left() -> None:
    source = measurements.Source(name="s", images=images(noise(1)), seed=0)
    by = np.array([-1, 0, 0, 1, 2, 2, 0, 0] * 2)
    rows = measurements.robust(source, by, BALL, ("apgd-ce", "apgd-t"), "both")
    values = {row.name: row.value for row in rows}
    assert values["accuracy_before_attack"] == 7 / 8
    assert values["accuracy_after_apgd_ce"] == 6 / 8
    assert values["accuracy_after_apgd_t"] == values["robust_accuracy"] == 4 / 8
    assert rows[0].n == 16
    assert rows[0].interval == metrics.wilson_interval(8, 16)


def test_a_drawn_roc_has_the_area_that_is_reported() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.beta(5, 2, 400), rng.beta(2, 4, 300)
    curve = measurements.roc(
        *(measurements.Confidences(confidence=c, log_odds=np.log(c / (1 - c))) for c in (inside, outside))
    )
    fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    assert abs(area - metrics.auroc(-inside, -outside)) < 0.003
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert len(curve["fpr"]) <= measurements.CURVE_POINTS + 2


def test_confidences_that_round_to_one_still_rank() -> None:
    sharp = np.array([[60.0, 0.0], [50.0, 0.0], [45.0, 0.0]])
    assert len(set(metrics.confidence(sharp))) == 1
    assert metrics.log_odds(sharp) == pytest.approx([60, 50, 45])
    sets = [
        measurements.Confidences(confidence=metrics.confidence(f), log_odds=metrics.log_odds(f))
        for f in (sharp[1:], sharp[:1])  # the out-image is surest of all
    ]
    source = measurements.Source(name="o", images=images(noise(1)), seed=0)
    values = {row.name: row.value for row in measurements.detection(source, *sets)}
    assert values["auroc"] == 0.0
    assert values["conservative_auroc"] == 0.0
    assert metrics.auroc(-sets[0].confidence, -sets[1].confidence) == 0.5


def test_log_odds_are_those_of_the_confidence() -> None:
    f = np.random.default_rng(0).normal(0, 3, (50, 7))
    p = metrics.confidence(f, 0.7)
    assert np.allclose(metrics.log_odds(f, 0.7), np.log(p / (1 - p)))
    goal = goals.log_odds(0.7)(torch.from_numpy(f)).numpy()
    assert np.allclose(goal, metrics.log_odds(f, 0.7), atol=1e-5)


def test_the_mixture_counts_an_out_image_as_right_with_one_in_k() -> None:
    labels = np.array([0, 1] * 4)
    logits = np.full((8, 4), -40.0)
    logits[np.arange(8), labels] = 40.0  # sure and right
    source = measurements.Source(name="s", images=images(noise(8), labels), seed=0)
    rows = measurements.mixture(source, logits, {"o": logits.copy()}, 1.0, Calibration(), ["a", "b"])
    assert rows[0].n == 16
    assert rows[0].details["fingerprint"] == measurements.together(["a", "b"]) != source.images.fingerprint
    assert rows[0].value == pytest.approx(
        0.5 * (1 - 1 / 4)
    )  # the out-half is sure and right one time in four


def test_means_are_over_sets_alone() -> None:
    def row(name: str, dataset: str, value: float) -> Measurement:
        ends = (value - 0.1, value + 0.1)
        details = {"fingerprint": f"f-{dataset}", "duration_s": value, "attack": "it", "n_out": 3}
        return Measurement(name=name, value=value, n=10, interval=ends, dataset=dataset, details=details)

    rows = [row("auroc", "a", 0.6), row("auroc", "b", 0.8), row("kept_at_tpr95", "in", 0.9)]
    (mean,) = measurements.mean_over_sets(rows, ["a", "b"], "in", 0)
    assert (mean.name, mean.dataset, mean.value, mean.n) == ("auroc", "mean", pytest.approx(0.7), 20)
    assert mean.interval == pytest.approx((0.6, 0.8))
    assert mean.details == {
        "fingerprint": measurements.together(["f-a", "f-b"]),
        "seed": 0,
        "duration_s": pytest.approx(1.4),
        "attack": "it",
        "sets": ["a", "b"],
        "inside": "in",
    }
    shared = [dataclasses.replace(row, details={**row.details, "n_in": 7}) for row in rows[:2]]
    (mean,) = measurements.mean_over_sets(shared, ["a", "b"], "in", 0)
    assert (mean.n, mean.details["n_in"], mean.details["n_out"]) == (13, 7, 6), "the in-images count once"
