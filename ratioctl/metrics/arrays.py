"""Checks of input arrays, shared by all metrics: NaN, empty arrays and wrong shapes raise ValueError."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def vector(values: ArrayLike, what: str) -> np.ndarray:
    """A non-empty, finite (N,) array as float64; `what` names it in the error."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0:
        raise ValueError(f"{what} must be a non-empty (N,) array, got shape {v.shape}")
    if not np.isfinite(v).all():
        raise ValueError(f"{what} hold NaN or infinite values")
    return v


def score_arrays(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both score arrays, checked."""
    return vector(in_scores, "in_scores"), vector(out_scores, "out_scores")


def label_array(rows: np.ndarray, labels: ArrayLike) -> np.ndarray:
    """Integer labels (N,) that index the columns of `rows` (N, K)."""
    y = np.asarray(labels)
    if rows.ndim != 2 or y.shape != rows.shape[:1] or not len(y):
        raise ValueError(f"expected non-empty (N, K) and (N,), got {rows.shape} and {y.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= rows.shape[1]:
        raise ValueError(f"labels must be integers in [0, {rows.shape[1]})")
    return y
