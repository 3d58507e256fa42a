"""Confidence thresholds that accept a given share of in-distribution images."""

from __future__ import annotations

import numpy as np

from ratioctl import metrics
from ratioctl.scores import OodScore

PERCENTAGES = (95, 99)


def tpr_thresholds(confidences: np.ndarray) -> dict[str, float]:
    """ "tpr95" and "tpr99" of in-distribution confidences (N,): at least 95 and 99 % of them reach it.

    The in-distribution counts as positive here, unlike in the metric `fpr_at_95_tpr`.
    """
    return {f"tpr{x}": metrics.threshold_at_tpr(confidences, x) for x in PERCENTAGES}


def score_thresholds(score: OodScore, logits: np.ndarray, temperature: float) -> dict[str, float]:
    """The same for another OOD score of in-distribution logits (N, K): values above which images are OOD."""
    return {
        f"tpr{x}": -metrics.threshold_at_tpr(-score.threshold_of(logits, temperature), x) for x in PERCENTAGES
    }
