"""Out-of-distribution (OOD) detection: ROC and precision-recall metrics, thresholds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.metrics.arrays import score_arrays, vector


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """P(OOD score of an OOD image > that of an ID image) over all pairs; ties count one half."""
    above, ties, pairs = _pairs(in_scores, out_scores)
    return (2 * above + ties) / (2 * pairs)


def conservative_auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """As `auroc`, with ties counted as errors."""
    above, _, pairs = _pairs(in_scores, out_scores)
    return above / pairs


def _pairs(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[int, int, int]:
    inside, outside = score_arrays(in_scores, out_scores)
    inside = np.sort(inside)
    below = int(np.searchsorted(inside, outside, side="left").sum())
    not_above = int(np.searchsorted(inside, outside, side="right").sum())
    return below, not_above - below, len(inside) * len(outside)


def fpr_at_tpr(in_scores: ArrayLike, out_scores: ArrayLike, tpr: float = 0.95) -> float:
    """Fraction of ID images flagged at the strictest threshold that flags at least `tpr` of the OOD images.

    OOD images are the positive class, as in OpenOOD and pytorch-ood. Note the difference to the threshold
    `tpr95` (`threshold_at_tpr`), for which ID images are the positive class.
    """
    inside, outside = score_arrays(in_scores, out_scores)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], not {tpr}")
    n = len(outside)
    flagged = max(1, min(n, int(tpr * n)))
    while flagged < n and flagged / n < tpr:
        flagged += 1
    threshold = np.sort(outside)[n - flagged]
    return float(np.mean(inside >= threshold))


def fpr_at_95_tpr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """`fpr_at_tpr` at 0.95; OOD images are the positive class."""
    return fpr_at_tpr(in_scores, out_scores, 0.95)


def aupr_out(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Average precision with OOD images as the positive class: sum of precision times recall increment."""
    inside, outside = score_arrays(in_scores, out_scores)
    return _average_precision(positives=outside, negatives=inside)


def aupr_in(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Average precision with ID images as the positive class, ranked by decreasing confidence."""
    inside, outside = score_arrays(in_scores, out_scores)
    return _average_precision(positives=-inside, negatives=-outside)


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    thresholds, hits = np.unique(positives, return_counts=True)  # recall changes only here
    positives, negatives = np.sort(positives), np.sort(negatives)
    found = len(positives) - np.searchsorted(positives, thresholds, side="left")
    wrong = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    return float(np.sum(hits / len(positives) * (found / (found + wrong))))


def threshold_at_tpr(confidences: ArrayLike, percent: float) -> float:
    """Element floor((1 - percent/100) n), counted from 0, of the n ascending ID confidences.

    With `is_ood = confidence < threshold`, at least `percent` % of these images are accepted. ID images are
    the positive class: `tpr95` accepts 95 % of them.
    """
    c = np.sort(vector(confidences, "confidences"))
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be in (0, 100], not {percent}")
    # Exact arithmetic: in floating point (1 - 0.9) * 10 is below 1.
    return float(c[math.floor((100 - Fraction(str(percent))) * len(c) / 100)])


def operating_point(
    in_confidences: ArrayLike, out_confidences: ArrayLike, threshold: float
) -> tuple[float, float]:
    """(ID acceptance rate, OOD acceptance rate): the fractions with confidence >= threshold."""
    inside, outside = score_arrays(in_confidences, out_confidences)
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN")
    return float(np.mean(inside >= threshold)), float(np.mean(outside >= threshold))
