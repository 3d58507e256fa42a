"""Confidence thresholds that accept a given share of in-distribution images."""

from __future__ import annotations

import numpy as np

from ratioctl import metrics

PERCENTAGES = (95, 99)


def tpr_thresholds(confidences: np.ndarray) -> dict[str, float]:
    """ "tpr95" and "tpr99" of in-distribution confidences (N,): at least 95 and 99 % of them reach it.

    The in-distribution counts as positive here, unlike in the metric `fpr_at_95_tpr`.
    """
    return {f"tpr{x}": metrics.threshold_at_tpr(confidences, x) for x in PERCENTAGES}
