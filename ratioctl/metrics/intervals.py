"""Confidence intervals of rates, means, AUROCs and arbitrary statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.metrics.arrays import vector


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate k/n (Wilson 1927); never empty and always within [0, 1]."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, got k = {k}, n = {n}")
    z = normal_quantile(level)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return (0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def clopper_pearson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate k/n (Clopper and Pearson 1934): covers with probability `level` at least."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, got k = {k}, n = {n}")
    from scipy.special import betaincinv

    tail = (1 - checked_level(level)) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def auroc_interval(value: float, n_in: int, n_out: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an AUROC: all t with |value - t| <= z sd(t), with the sd of Hanley and McNeil 1982.

    Newcombe 2006, method 5. Unlike value +- z sd(value) it has positive width at 0 and 1 and stays in [0, 1].
    """
    if not 0 <= value <= 1 or n_in < 1 or n_out < 1:
        raise ValueError(f"expected a value in [0, 1] and positive counts, got {value}, {n_in}, {n_out}")
    z, more = normal_quantile(level), (n_in + n_out) / 2 - 1

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
    """Normal-approximation interval of a mean, clipped to `bounds`; equals `bounds` for a single value."""
    v = vector(values, "values")
    if len(v) == 1:
        return bounds
    half = normal_quantile(level) * float(v.std(ddof=1)) / math.sqrt(len(v))
    return max(bounds[0], float(v.mean()) - half), min(bounds[1], float(v.mean()) + half)


def bootstrap_interval(
    statistic: Callable[..., float],
    groups: Sequence[Sequence[ArrayLike]],
    *,
    generator: np.random.Generator,
    samples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*all arrays)`.

    Args:
        groups: arrays within a group are resampled together (confidences with their verdicts); groups are
            resampled independently (ID scores and OOD scores).
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
    tail = (1 - checked_level(level)) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def checked_level(level: float) -> float:
    """`level` if it is in (0, 1); raises ValueError otherwise."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    return level


def normal_quantile(level: float) -> float:
    """z for a two-sided interval of the standard normal distribution: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + checked_level(level)) / 2)
