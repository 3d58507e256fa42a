"""Paired significance tests of two models on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.metrics.arrays import vector


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p-value of equal accuracy of two classifiers, from verdicts (N,) on the same images.

    Exact binomial test on the images on which they differ (McNemar 1947).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"expected two non-empty (N,) arrays, got {a.shape} and {b.shape}")
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_mean_test(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> float:
    """Two-sided p-value of equal means of group means; values of the same images at the same positions.

    Normal approximation; every group (for example an OOD set) has the same weight.
    """
    shift, spread = 0.0, 0.0
    for a, b in zip(first, second, strict=True):
        d = vector(a, "first") - vector(b, "second")
        shift += float(d.mean()) / len(first)
        spread += _variance_of_mean(d) / len(first) ** 2
    return _p_value(shift, spread)


def paired_auroc_test(
    first: tuple[ArrayLike, Sequence[ArrayLike]], second: tuple[ArrayLike, Sequence[ArrayLike]]
) -> float:
    """Two-sided p-value of equal mean AUROC over several OOD sets.

    DeLong, DeLong and Clarke-Pearson 1988, extended to the mean over sets that share their ID images.

    Args:
        first, second: ID scores (N,), and the OOD scores of every set; the same images at the same positions.
    """
    parts = []
    for inside, outside in (first, second):
        i = np.sort(vector(inside, "in_scores"))
        given = vector(inside, "in_scores")
        per_in, per_out = np.zeros(len(i)), []
        for scores in outside:
            o = np.sort(vector(scores, "out_scores"))
            per_out.append(_share_below(i, vector(scores, "out_scores")))
            per_in += (1 - _share_below(o, given)) / len(outside)
        parts.append((per_in, per_out))
    (in_a, out_a), (in_b, out_b) = parts
    if in_a.shape != in_b.shape or len(out_a) != len(out_b):
        raise ValueError("both detectors need scores of the same images")
    d = in_a - in_b
    spread = _variance_of_mean(d)
    spread += sum(_variance_of_mean(a - b) for a, b in zip(out_a, out_b, strict=True)) / len(out_a) ** 2
    return _p_value(float(d.mean()), spread)


def _share_below(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of `values`, the fraction of `ascending` below it; ties count one half."""
    left, right = (np.searchsorted(ascending, values, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(ascending))


def _variance_of_mean(d: np.ndarray) -> float:
    return float(d.var(ddof=1)) / len(d) if len(d) > 1 else math.inf


def _p_value(shift: float, spread: float) -> float:
    if shift == 0 or math.isinf(spread):
        return 1.0
    return 0.0 if spread == 0 else 2 * NormalDist().cdf(-abs(shift) / math.sqrt(spread))
