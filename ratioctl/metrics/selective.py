"""Selective prediction: the share of errors among the images that are accepted, by the share accepted."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.metrics.arrays import vector


def risk_coverage(scores: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Coverages and risks (M,) of the M thresholds at which the accepted images differ, ascending coverage.

    Args:
        scores: (N,), larger for more confident predictions; images with the same score are accepted together.
        correct: (N,) bool.

    Returns:
        The fraction of images accepted, and the fraction of errors among them (El-Yaniv and Wiener 2010).
    """
    s, right = vector(scores, "scores"), np.asarray(correct, dtype=bool)
    if right.shape != s.shape:
        raise ValueError(f"expected two (N,) arrays, got {s.shape} and {right.shape}")
    order = np.argsort(-s, kind="stable")
    last = np.append(np.flatnonzero(np.diff(s[order])), len(s) - 1)  # of each group of ties
    accepted = last + 1
    errors = np.cumsum(~right[order])[last]
    return accepted / len(s), errors / accepted


def aurc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean risk over the coverages 1/N, ..., 1 (Geifman et al. 2019).

    Images with the same score contribute the risk of their group, so their order does not matter.
    """
    coverage, risk = risk_coverage(scores, correct)
    return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def coverage_at_risk(scores: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """The largest fraction of images that can be accepted with at most this fraction of errors; 0 if none."""
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must be in [0, 1], not {risk}")
    coverages, risks = risk_coverage(scores, correct)
    allowed = coverages[risks <= risk + 1e-12]
    return float(allowed.max()) if len(allowed) else 0.0
