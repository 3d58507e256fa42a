"""Calibration: expected calibration error (ECE), reliability diagrams and intervals of the ECE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.metrics.arrays import vector
from ratioctl.metrics.intervals import checked_level, normal_quantile

_SLACK = 1e-6  # tolerance for float32 softmax values outside [1/K, 1]


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram; empty bins have accuracy and confidence 0."""

    edges: np.ndarray  # (bins + 1,)
    count: np.ndarray  # (bins,) int
    accuracy: np.ndarray  # (bins,) mean of `correct`
    confidence: np.ndarray  # (bins,) mean confidence

    @property
    def ece(self) -> float:
        """Mean of |accuracy - confidence| over the examples: eq. 9 of the RATIO paper."""
        return float(np.sum(self.count * np.abs(self.accuracy - self.confidence)) / self.count.sum())


def reliability(confidences: ArrayLike, correct: ArrayLike, bins: int, low: float) -> Reliability:
    """Accuracy and confidence in `bins` bins of equal width on [low, 1].

    A bin includes its lower edge and excludes its upper one; the last bin includes 1.

    Args:
        confidences: (N,) in [low, 1].
        correct: (N,) booleans, or probabilities of being correct (for OOD images, which have no label).
        bins: the paper uses 10 to fit the temperature and 15 to report.
        low: lower end of the bins, 1/K in the paper. The other common choice, 0, gives different values.
    """
    c, right = _calibration_input(confidences, correct, bins)
    at, edges = _equal_width(c, bins, low)
    return _binned(c, right, at, edges)


def ece(confidences: ArrayLike, correct: ArrayLike, bins: int, low: float) -> float:
    """Expected calibration error, eq. 9 of the RATIO paper; bins as in `reliability`."""
    return reliability(confidences, correct, bins, low).ece


def adaptive_ece(confidences: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """ECE over bins with equal numbers of examples (Nguyen and O'Connor 2015).

    Equal confidences share a bin, so the result does not depend on the order of the examples. Bins may merge.
    """
    c, right = _calibration_input(confidences, correct, bins)
    at, edges = _equal_mass(c, bins)
    return _binned(c, right, at, edges).ece


def ece_interval(
    confidences: ArrayLike,
    correct: ArrayLike,
    bins: int,
    low: float | None,
    *,
    generator: np.random.Generator,
    samples: int = 400,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of an ECE by test inversion. `low=None` uses the bins of `adaptive_ece`.

    The ECE sums absolute values, so noise biases the estimate upwards and bootstrap replicates twice; their
    percentiles miss the true value of a well-calibrated model. This function estimates the signed gaps G of
    the bins, and their noise N by a bootstrap. The interval contains the values s * sum |G|, s >= 0, for
    which the estimate is within the central `level` of sum |s G + N|. It contains 0 exactly where perfect
    calibration is not rejected. Where all gaps have the same sign this corrects too much, so the upper end
    is at least the estimate plus the normal margin.
    """
    c, right = _calibration_input(confidences, correct, bins)
    at, edges = _equal_mass(c, bins) if low is None else _equal_width(c, bins, low)
    n, gap = len(c), right - c
    gaps = np.bincount(at, weights=gap, minlength=len(edges) - 1) / n
    estimate = float(np.abs(gaps).sum())
    noise = np.empty((samples, len(gaps)))
    for s in range(samples):
        times = np.bincount(generator.integers(0, n, n), minlength=n)
        noise[s] = np.bincount(at, weights=gap * times, minlength=len(gaps)) / n - gaps
    tail = (1 - checked_level(level)) / 2

    def edge(quantile: float) -> float:
        """The true value s * sum |G| for which the estimate is this quantile."""

        def typical(s: float) -> float:
            return float(np.quantile(np.abs(s * gaps + noise).sum(1), quantile))

        if typical(0.0) >= estimate:
            return 0.0
        near, far = 0.0, 3.0
        for _ in range(30):
            middle = (near + far) / 2
            near, far = (middle, far) if typical(middle) < estimate else (near, middle)
        return far * estimate

    margin = normal_quantile(level) * float(np.abs(gaps + noise).sum(1).std())
    return min(edge(1 - tail), estimate), min(max(edge(tail), estimate + margin), 1.0)


def _equal_width(c: np.ndarray, bins: int, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Bin index (N,) of each confidence, and edges (bins + 1,) on [low, 1]."""
    if not 0 <= low < 1:
        raise ValueError(f"low must be in [0, 1), not {low}")
    if c.min() < low - _SLACK:
        raise ValueError(f"confidence {c.min():.6g} is below the lowest possible one, {low:.6g}")
    edges = np.linspace(low, 1.0, bins + 1)
    return np.searchsorted(edges[1:-1], c, side="right"), edges


def _equal_mass(c: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_equal_width`, for bins with equal numbers of examples; equal confidences share a bin."""
    ascending = np.sort(c)
    starts = [
        ascending[round(len(c) * m / bins)] for m in range(1, bins) if round(len(c) * m / bins) < len(c)
    ]
    inner = np.unique(starts)
    edges = np.concatenate(([ascending[0]], inner, [ascending[-1]]))
    return np.searchsorted(inner, c, side="right"), edges


def _calibration_input(
    confidences: ArrayLike, correct: ArrayLike, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    c, right = vector(confidences, "confidences"), vector(correct, "correct")
    if c.shape != right.shape:
        raise ValueError(f"{len(c)} confidences but {len(right)} verdicts")
    if bins < 1:
        raise ValueError(f"bins must be positive, not {bins}")
    if c.min() < -_SLACK or c.max() > 1 + _SLACK or right.min() < 0 or right.max() > 1:
        raise ValueError("confidences and verdicts must lie in [0, 1]")
    return np.clip(c, 0.0, 1.0), right


def _binned(c: np.ndarray, right: np.ndarray, at: np.ndarray, edges: np.ndarray) -> Reliability:
    bins = len(edges) - 1
    count = np.bincount(at, minlength=bins)
    n = np.maximum(count, 1)
    return Reliability(
        edges=edges,
        count=count,
        accuracy=np.bincount(at, weights=right, minlength=bins) / n,
        confidence=np.bincount(at, weights=c, minlength=bins) / n,
    )
