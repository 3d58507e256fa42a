"""Probabilities from logits, and metrics of a classifier's decisions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ratioctl.errors import LogitsError
from ratioctl.metrics.arrays import label_array, vector


def finite_logits(logits: ArrayLike) -> np.ndarray:
    """`logits` (..., K) as float64. Single classes may be at -inf.

    Raises ValueError for a missing class axis, and LogitsError for NaN, +inf, or an example whose logits are
    all -inf.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"logits need a class axis, got shape {z.shape}")
    if np.isnan(z).any() or np.isposinf(z).any() or np.isneginf(z).all(-1).any():
        bad = int((~np.isfinite(z)).any(-1).sum())
        reason = f"computes logits that hold NaN or infinite values, for {bad} of {z[..., 0].size} inputs"
        raise LogitsError("the network", reason, "Its weights are damaged: use another checkpoint.")
    return z


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of `logits / temperature`, (..., K) float64; finite wherever the logits are."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    z = finite_logits(logits) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Probabilities (..., K) float64 of `logits / temperature`."""
    return np.exp(log_softmax(logits, temperature))


def confidence(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Largest probability max_k p_k, (...,), of logits (..., K)."""
    return softmax(logits, temperature).max(axis=-1)


def log_odds(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """log(p_max / (1 - p_max)), (...,), of logits (..., K): orders images as the confidence does.

    Unlike the confidence it has no ties where p_max rounds to 1.
    """
    z = log_softmax(logits, temperature)
    if z.shape[-1] < 2:
        raise ValueError("odds need at least two classes")
    ascending = np.sort(z, axis=-1)
    rest = ascending[..., :-1]
    top_of_rest = rest.max(axis=-1, keepdims=True)
    others = top_of_rest[..., 0] + np.log(np.exp(rest - top_of_rest).sum(axis=-1))
    return ascending[..., -1] - others


def ood_score(confidences: ArrayLike) -> np.ndarray:
    """1 - confidence: larger values are more outlying."""
    return 1.0 - vector(confidences, "confidences")


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of `predicted` (N,) that equals `labels` (N,)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    if p.ndim != 1 or p.shape != y.shape or p.size == 0:
        raise ValueError(f"expected two non-empty (N,) arrays, got {p.shape} and {y.shape}")
    return float(np.mean(p == y))


def mmc(confidences: ArrayLike) -> float:
    """Mean maximum confidence of (N,) confidences."""
    return float(np.mean(vector(confidences, "confidences")))


def nll(logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -log p(label) for logits (N, K) and labels (N,)."""
    log_p = log_softmax(logits, temperature)
    y = label_array(log_p, labels)
    return float(-np.mean(log_p[np.arange(len(y)), y]))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the examples of sum_k (p_k - [k = label])^2, in [0, 2] (Brier 1950)."""
    p = np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(p).all():
        raise ValueError("probabilities hold NaN or infinite values")
    y = label_array(p, labels)
    return float(np.mean(np.sum(p**2, axis=1) - 2 * p[np.arange(len(y)), y] + 1))
