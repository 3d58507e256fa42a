"""Numbers about confidences: accuracy, calibration, out-of-distribution detection, and their intervals.

Arrays in, Python floats out, everything in float64 and between 0 and 1 (not per cent). `scores` are always
`ood_score`s: higher means more outlying. The negated confidence ranks the same and, unlike `1 - confidence`,
creates no ties by rounding. NaN, empty arrays and shapes that do not fit raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_SLACK = 1e-6  # by which a float32 softmax may leave [1/K, 1]


# --- probabilities -----------------------------------------------------------------------------------------


def finite_logits(logits: ArrayLike) -> np.ndarray:
    """`logits` (..., K) as float64. Single classes may be at -inf.

    Raises ValueError for a missing class axis, NaN, +inf, or an example whose logits are all -inf.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"logits need a class axis, got shape {z.shape}")
    if np.isnan(z).any() or np.isposinf(z).any() or np.isneginf(z).all(-1).any():
        raise ValueError("logits hold NaN or infinite values")
    return z


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """log p of `logits / temperature`, (..., K) float64; finite wherever the logits are."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    z = finite_logits(logits) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Probabilities (..., K) float64 of `logits / temperature`."""
    return np.exp(log_softmax(logits, temperature))


def confidence(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """max_k p_k (...,) of logits (..., K)."""
    return softmax(logits, temperature).max(axis=-1)


def log_odds(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """log p_max / (1 - p_max) (...,) of logits (..., K): the order of confidences, without ties at 1."""
    z = log_softmax(logits, temperature)
    if z.shape[-1] < 2:
        raise ValueError("odds need at least two classes")
    ascending = np.sort(z, axis=-1)
    rest = ascending[..., :-1]
    top_of_rest = rest.max(axis=-1, keepdims=True)
    others = top_of_rest[..., 0] + np.log(np.exp(rest - top_of_rest).sum(axis=-1))
    return ascending[..., -1] - others


def ood_score(confidences: ArrayLike) -> np.ndarray:
    """1 - confidence: higher means more outlying."""
    return 1.0 - _values(confidences, "confidences")


# --- accuracy and calibration ------------------------------------------------------------------------------


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of `predicted` (N,) that equals `labels` (N,)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    if p.ndim != 1 or p.shape != y.shape or p.size == 0:
        raise ValueError(f"expected two non-empty (N,) arrays, got {p.shape} and {y.shape}")
    return float(np.mean(p == y))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram; empty bins have accuracy and confidence 0."""

    edges: np.ndarray  # (bins + 1,)
    count: np.ndarray  # (bins,) int
    accuracy: np.ndarray  # (bins,) mean of `correct` in the bin
    confidence: np.ndarray  # (bins,) mean confidence in the bin

    @property
    def ece(self) -> float:
        """Mean of |accuracy - confidence| over the examples: eq. 9 of the RATIO paper."""
        return float(np.sum(self.count * np.abs(self.accuracy - self.confidence)) / self.count.sum())


def reliability(confidences: ArrayLike, correct: ArrayLike, bins: int, low: float) -> Reliability:
    """Accuracy and confidence in `bins` bins of equal width on [low, 1].

    A bin holds its lower edge and not its upper one, but the last holds confidence exactly 1 as well.

    Args:
        confidences: (N,) in [low, 1].
        correct: (N,) booleans, or probabilities of being correct (as for out-images, which no label fits).
        bins: the paper takes 10 to find the temperature and 15 to report.
        low: 1/K in the paper; 0 gives the other common definition, and another number.
    """
    c, right = _calibration_input(confidences, correct, bins)
    at, edges = _equal_width(c, bins, low)
    return _binned(c, right, at, edges)


def ece(confidences: ArrayLike, correct: ArrayLike, bins: int, low: float) -> float:
    """Expected calibration error, eq. 9 of the RATIO paper; bins as in `reliability`."""
    return reliability(confidences, correct, bins, low).ece


def adaptive_ece(confidences: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """ECE over bins of equal mass (Nguyen and O'Connor 2015).

    Equal confidences share a bin, so the order of the examples does not matter; bins may merge through that.
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
    """Interval of an ECE, by inverting a test; low None means the bins of `adaptive_ece`.

    The ECE sums absolute values, so noise only raises it: its estimate is biased upwards, a bootstrap's
    repetitions once more, and their percentiles miss the truth altogether where a model is well calibrated.
    Here the signed gaps G of the bins are estimated, and their noise N by a bootstrap; in the interval are
    the values s * sum |G|, s >= 0, under which the estimate is no surprise among sum |s G + N|. So it holds
    0 exactly where perfect calibration is not rejected. Where all gaps have one sign that corrects too much,
    so the upper end is at least the estimate plus the normal margin.
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
    tail = (1 - _checked_level(level)) / 2

    def edge(quantile: float) -> float:
        """The true value, on the ray through the gaps, under which the estimate is this quantile."""

        def typical(s: float) -> float:
            return float(np.quantile(np.abs(s * gaps + noise).sum(1), quantile))

        if typical(0.0) >= estimate:
            return 0.0
        near, far = 0.0, 3.0
        for _ in range(30):
            middle = (near + far) / 2
            near, far = (middle, far) if typical(middle) < estimate else (near, middle)
        return far * estimate

    margin = _z(level) * float(np.abs(gaps + noise).sum(1).std())
    return min(edge(1 - tail), estimate), min(max(edge(tail), estimate + margin), 1.0)


def _equal_width(c: np.ndarray, bins: int, low: float) -> tuple[np.ndarray, np.ndarray]:
    """The bin of each confidence, and the edges (bins + 1,) on [low, 1]."""
    if not 0 <= low < 1:
        raise ValueError(f"low must be in [0, 1), not {low}")
    if c.min() < low - _SLACK:
        raise ValueError(f"confidence {c.min():.6g} lies below the lowest possible one, {low:.6g}")
    edges = np.linspace(low, 1.0, bins + 1)
    return np.searchsorted(edges[1:-1], c, side="right"), edges


def _equal_mass(c: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for bins that hold equally many, equal confidences together."""
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
    c, right = _values(confidences, "confidences"), _values(correct, "correct")
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


def nll(logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -log p(label) for logits (N, K) and labels (N,)."""
    log_p = log_softmax(logits, temperature)
    y = _labels(log_p, labels)
    return float(-np.mean(log_p[np.arange(len(y)), y]))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the examples of sum_k (p_k - [k = label])^2, in [0, 2] (Brier 1950)."""
    p = np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(p).all():
        raise ValueError("probabilities hold NaN or infinite values")
    y = _labels(p, labels)
    return float(np.mean(np.sum(p**2, axis=1) - 2 * p[np.arange(len(y)), y] + 1))


def _labels(rows: np.ndarray, labels: ArrayLike) -> np.ndarray:
    y = np.asarray(labels)
    if rows.ndim != 2 or y.shape != rows.shape[:1] or not len(y):
        raise ValueError(f"expected non-empty (N, K) and (N,), got {rows.shape} and {y.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= rows.shape[1]:
        raise ValueError(f"labels must be integers in [0, {rows.shape[1]})")
    return y


# --- out-of-distribution detection -------------------------------------------------------------------------


def mmc(confidences: ArrayLike) -> float:
    """Mean maximal confidence."""
    return float(np.mean(_values(confidences, "confidences")))


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """P(out-score > in-score) over all pairs, ties counting one half."""
    above, ties, pairs = _pairs(in_scores, out_scores)
    return (2 * above + ties) / (2 * pairs)


def conservative_auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """P(out-score > in-score) over all pairs, ties counting against us."""
    above, _, pairs = _pairs(in_scores, out_scores)
    return above / pairs


def _pairs(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[int, int, int]:
    inside, outside = _scores(in_scores, out_scores)
    inside = np.sort(inside)
    below = int(np.searchsorted(inside, outside, side="left").sum())
    not_above = int(np.searchsorted(inside, outside, side="right").sum())
    return below, not_above - below, len(inside) * len(outside)


def fpr_at_tpr(in_scores: ArrayLike, out_scores: ArrayLike, tpr: float = 0.95) -> float:
    """Share of in-images flagged by the strictest threshold that flags at least `tpr` of the out-images.

    Out-images are the positives, as in OpenOOD and pytorch-ood. `operating_point` answers the reverse
    question of a pipeline: what passes when a given share of in-images is kept.
    """
    inside, outside = _scores(in_scores, out_scores)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], not {tpr}")
    n = len(outside)
    flagged = max(1, min(n, int(tpr * n)))
    while flagged < n and flagged / n < tpr:
        flagged += 1
    threshold = np.sort(outside)[n - flagged]
    return float(np.mean(inside >= threshold))


def fpr_at_95_tpr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """`fpr_at_tpr` for 0.95."""
    return fpr_at_tpr(in_scores, out_scores, 0.95)


def aupr_out(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Average precision with out-images as positives: the sum of precision times gain in recall."""
    inside, outside = _scores(in_scores, out_scores)
    return _average_precision(positives=outside, negatives=inside)


def aupr_in(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Average precision with in-images as positives, ranked by falling confidence."""
    inside, outside = _scores(in_scores, out_scores)
    return _average_precision(positives=-inside, negatives=-outside)


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    thresholds, hits = np.unique(positives, return_counts=True)  # only these move the recall
    positives, negatives = np.sort(positives), np.sort(negatives)
    found = len(positives) - np.searchsorted(positives, thresholds, side="left")
    wrong = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    return float(np.sum(hits / len(positives) * (found / (found + wrong))))


def threshold_at_tpr(confidences: ArrayLike, percent: float) -> float:
    """Element number floor((1 - percent/100) n), from 0, of the n ascending in-distribution confidences.

    With `is_ood = confidence < threshold` at least `percent` per cent of these images are kept.
    """
    c = np.sort(_values(confidences, "confidences"))
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be in (0, 100], not {percent}")
    # Exact: in floating point (1 - 0.9) * 10 is below 1.
    return float(c[math.floor((100 - Fraction(str(percent))) * len(c) / 100)])


def operating_point(
    in_confidences: ArrayLike, out_confidences: ArrayLike, threshold: float
) -> tuple[float, float]:
    """(share of in-images kept, share of out-images let through) where confidence < threshold is flagged."""
    inside, outside = _scores(in_confidences, out_confidences)
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN")
    return float(np.mean(inside >= threshold)), float(np.mean(outside >= threshold))


# --- intervals ---------------------------------------------------------------------------------------------


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate k/n (Wilson 1927); never of zero width, never outside [0, 1]."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, got k = {k}, n = {n}")
    z = _z(level)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return (0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def auroc_interval(value: float, n_in: int, n_out: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an AUROC: all t with |value - t| <= z sd(t), sd of Hanley and McNeil.

    Newcombe 2006, method 5. Unlike value +- z sd(value) it keeps a width at 0 and 1 and stays in [0, 1].
    """
    if not 0 <= value <= 1 or n_in < 1 or n_out < 1:
        raise ValueError(f"expected a value in [0, 1] and positive counts, got {value}, {n_in}, {n_out}")
    z, more = _z(level), (n_in + n_out) / 2 - 1

    def outside(t: float) -> bool:
        spread = t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (n_in * n_out)
        return (value - t) ** 2 > z * z * spread

    def edge(far: float) -> float:
        near = value
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (near, middle) if outside(middle) else (middle, far)
        return far

    return (0.0 if value == 0 else edge(0.0), 1.0 if value == 1 else edge(1.0))


def mean_interval(
    values: ArrayLike, level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Interval of a mean by the normal approximation, cut to `bounds`; the bounds if there is one value."""
    v = _values(values, "values")
    if len(v) == 1:
        return bounds
    half = _z(level) * float(v.std(ddof=1)) / math.sqrt(len(v))
    return max(bounds[0], float(v.mean()) - half), min(bounds[1], float(v.mean()) + half)


def bootstrap_interval(
    statistic: Callable[..., float],
    groups: Sequence[Sequence[ArrayLike]],
    *,
    generator: np.random.Generator,
    samples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `statistic(*all arrays)` under resampling.

    Args:
        groups: the arrays of one group are resampled together (confidences with their verdicts), the groups
            independently of each other (in- and out-scores).
    """
    if samples < 1:
        raise ValueError(f"samples must be positive, not {samples}")
    arrays = [[np.asarray(a) for a in group] for group in groups]
    for group in arrays:
        if not group or any(a.shape[:1] != group[0].shape[:1] or a.size == 0 for a in group):
            raise ValueError("the arrays of a group must be non-empty and equally long")
    values = np.empty(samples)
    for s in range(samples):
        drawn: list[np.ndarray] = []
        for group in arrays:
            at = generator.integers(0, len(group[0]), len(group[0]))
            drawn += [a[at] for a in group]
        values[s] = statistic(*drawn)
    tail = (1 - _checked_level(level)) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


# --- paired tests ------------------------------------------------------------------------------------------


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p-value that two classifiers are right equally often, from verdicts (N,) on the same images.

    Exact: of the images on which they differ, each is equally likely to be right (McNemar 1947).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"expected two non-empty (N,) arrays, got {a.shape} and {b.shape}")
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_mean_test(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> float:
    """Two-sided p-value that two means of group means agree, values of the same images in the same places.

    Normal approximation; every group (an out-distribution, say) weighs the same.
    """
    shift, spread = 0.0, 0.0
    for a, b in zip(first, second, strict=True):
        d = _values(a, "first") - _values(b, "second")
        shift += float(d.mean()) / len(first)
        spread += _variance_of_mean(d) / len(first) ** 2
    return _p_value(shift, spread)


def paired_auroc_test(
    first: tuple[ArrayLike, Sequence[ArrayLike]], second: tuple[ArrayLike, Sequence[ArrayLike]]
) -> float:
    """Two-sided p-value that two detectors have the same mean AUROC over sets of out-images.

    DeLong, DeLong and Clarke-Pearson 1988, for the mean over several sets that share their in-images.

    Args:
        first, second: in-scores (N,), and the out-scores of every set; the same images in the same places.
    """
    parts = []
    for inside, outside in (first, second):
        i = np.sort(_values(inside, "in_scores"))
        given = _values(inside, "in_scores")
        per_in, per_out = np.zeros(len(i)), []
        for scores in outside:
            o = np.sort(_values(scores, "out_scores"))
            per_out.append(_share_below(i, _values(scores, "out_scores")))
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
    """For each of `values` the share of `ascending` below it, ties counting one half."""
    left, right = (np.searchsorted(ascending, values, side=side) for side in ("left", "right"))  # type: ignore[call-overload]
    return (left + right) / (2 * len(ascending))


def _variance_of_mean(d: np.ndarray) -> float:
    return float(d.var(ddof=1)) / len(d) if len(d) > 1 else math.inf


def _p_value(shift: float, spread: float) -> float:
    if shift == 0 or math.isinf(spread):
        return 1.0
    return 0.0 if spread == 0 else 2 * NormalDist().cdf(-abs(shift) / math.sqrt(spread))


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    return level


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + _checked_level(level)) / 2)


def _values(values: ArrayLike, what: str) -> np.ndarray:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0:
        raise ValueError(f"{what} must be a non-empty (N,) array, got shape {v.shape}")
    if not np.isfinite(v).all():
        raise ValueError(f"{what} hold NaN or infinite values")
    return v


def _scores(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    return _values(in_scores, "in_scores"), _values(out_scores, "out_scores")
