"""From arrays to measurements and figures. Arrays are float64 confidences after the temperature."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl import metrics
from ratioctl.data.in_distribution import Images
from ratioctl.recipe import Ball, Calibration
from ratioctl.types import Measurement
from ratioctl.utils.result_cache import Arrays

SAMPLES = 200  # of bootstrap intervals
CURVE_POINTS = 200  # of a ROC
HISTOGRAM_BINS = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What stands beside every measurement on a set: its name in the report, fingerprint, seed, duration.

    `seconds` is how long its batches took; the measurements of one set share them.
    """

    name: str
    images: Images
    seed: int
    seconds: float = 0.0

    def timed(self, *parts: Sequence[Arrays]) -> Source:
        """The same, for measurements on these batches."""
        return dataclasses.replace(self, seconds=round(sum(seconds(part) for part in parts), 3))

    def details(self, **more: Any) -> dict[str, Any]:
        return {
            "fingerprint": self.images.fingerprint,
            "seed": self.seed,
            "duration_s": self.seconds,
            "attack": None,
            **more,
        }

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 0xB007])


def together(fingerprints: Sequence[str]) -> str:
    """The fingerprint of several sets: SHA-256 over theirs."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def seconds(parts: Sequence[Arrays]) -> float:
    """How long batches took together."""
    return sum(float(part["seconds"]) for part in parts)


def clean(source: Source, logits: np.ndarray, temperature: float, spec: Calibration) -> list[Measurement]:
    """Accuracy and calibration on all in-images; "_uncalibrated" is before the temperature."""
    labels = source.images.labels
    assert labels is not None
    n, classes = logits.shape
    correct = logits.argmax(1) == labels
    rows = [_rate("accuracy", int(correct.sum()), n, source)]
    for suffix, t in (("", temperature), ("_uncalibrated", 1.0)):
        p = metrics.softmax(logits, t)
        c = p.max(1)
        bins = spec.report_bins
        rows.append(_ece(f"ece{suffix}", c, correct, bins, 1 / classes, source, temperature=t))
        rows.append(_ece(f"adaptive_ece{suffix}", c, correct, bins, None, source, temperature=t))
        losses = -metrics.log_softmax(logits, t)[np.arange(n), labels]
        squares = np.sum(p**2, 1) - 2 * p[np.arange(n), labels] + 1
        rows.append(_mean(f"nll{suffix}", losses, source, bounds=(0.0, np.inf), temperature=t))
        rows.append(_mean(f"brier{suffix}", squares, source, bounds=(0.0, 2.0), temperature=t))
        rows.append(_mean(f"mmc{suffix}", c, source, temperature=t))
    return rows


def mixture(
    source: Source,
    logits: np.ndarray,
    outside: Mapping[str, np.ndarray],
    temperature: float,
    spec: Calibration,
    fingerprints: Sequence[str],
) -> list[Measurement]:
    """ECE where half the images are in-images and half out-images with a random label (appendix C).

    As many images of every out-set as of every other one; an out-image counts as correct with 1/K.

    Args:
        fingerprints: of all sets, the in-images' first.
    """
    labels, rng = source.images.labels, source.generator()
    assert labels is not None
    each = min(len(logits) // len(outside), *(len(o) for o in outside.values()))
    if not each:
        return []
    out = np.concatenate([o[rng.permutation(len(o))[:each]] for o in outside.values()])
    inside = rng.permutation(len(logits))[: len(out)]
    both, classes = np.concatenate([logits[inside], out]), logits.shape[1]
    right = np.concatenate(
        [(logits[inside].argmax(1) == labels[inside]).astype(float), np.full(len(out), 1 / classes)]
    )
    named = dataclasses.replace(source, name=" + ".join([source.name, *outside]))
    rows = []
    for suffix, t in (("", temperature), ("_uncalibrated", 1.0)):
        rows.append(
            _ece(
                f"ece_mixture{suffix}",
                metrics.confidence(both, t),
                right,
                spec.report_bins,
                1 / classes,
                named,
                temperature=t,
                fingerprint=together(fingerprints),
            )
        )
    return rows


def robust(
    source: Source, by: np.ndarray, ball: Ball, attacks: Sequence[str], name: str, **more: Any
) -> list[Measurement]:
    """Robust accuracy after all attacks, and what each left standing.

    Args:
        by: (N,) -1 where the clean decision was wrong, 0 where it survived, else the attack's number from 1.
    """
    n = len(by)
    standing = [int(((by == 0) | (by > k)).sum()) for k in range(len(attacks) + 1)]
    rows = [_rate("robust_accuracy", standing[-1], n, source, ball, attack=name, **more)]
    rows += [_rate("accuracy_before_attack", standing[0], n, source)]
    for k, attack in enumerate(attacks):
        rows.append(
            _rate(
                f"accuracy_after_{attack.replace('-', '_')}",
                standing[k + 1],
                n,
                source,
                ball,
                attack=" + ".join(attacks[: k + 1]),
            )
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sure:
    """How sure a model is of images: `confidence` (N,), and `odds` (N,), their order without ties at 1."""

    confidence: np.ndarray
    odds: np.ndarray

    def at(self, index: np.ndarray) -> Sure:
        """Copies of these images' values."""
        return Sure(confidence=self.confidence[index], odds=self.odds[index])


def detection(
    source: Source,
    inside: Sure,
    outside: Sure,
    ball: Ball | None = None,
    suffix: str = "",
    **details: Any,
) -> list[Measurement]:
    """How well confidence tells `outside` from `inside`.

    Ranks are those of the odds: a sharp model's confidences round to exactly 1, and ties that count one half
    would flatter it. The conservative AUROC takes the confidences as they are, ties against us.
    """
    scores = -inside.odds, -outside.odds
    n_in, n_out = len(inside.odds), len(outside.odds)
    sizes = {"n_in": n_in, "n_out": n_out, **details}
    rows = []
    for name, value in (
        ("auroc", metrics.auroc(*scores)),
        ("conservative_auroc", metrics.conservative_auroc(-inside.confidence, -outside.confidence)),
    ):
        interval = metrics.auroc_interval(value, n_in, n_out)
        rows.append(_row(name + suffix, value, n_in + n_out, interval, source, ball, **sizes))
    if suffix:
        return rows
    groups = [[scores[0]], [scores[1]]]
    for name, of in (
        ("fpr_at_95_tpr", metrics.fpr_at_95_tpr),
        ("aupr_out", metrics.aupr_out),
        ("aupr_in", metrics.aupr_in),
    ):
        rows.append(_bootstrapped(name, of, groups, n_in + n_out, source, ball, **sizes))
    rows.append(_mean("mmc", outside.confidence, source, ball, **details))
    return rows


def operating(
    source: Source,
    confidences: np.ndarray,
    thresholds: Mapping[str, float],
    ball: Ball | None = None,
    **details: Any,
) -> list[Measurement]:
    """Share with confidence at or above each stored threshold: in-images kept, out-images let through."""
    what = "kept" if source.images.labels is not None else "let_through"
    return [
        _rate(
            f"{what}_at_{name}",
            int((confidences >= threshold).sum()),
            len(confidences),
            source,
            ball,
            threshold=threshold,
            **details,
        )
        for name, threshold in sorted(thresholds.items())
    ]


def mean_over_sets(
    rows: Sequence[Measurement], sets: Sequence[str], inside: str, seed: int
) -> list[Measurement]:
    """The unweighted mean over the out-distributions of what was measured on each of them.

    Its interval is the mean of theirs: they share the in-images, so their errors do not cancel out. Its n
    counts these once.
    """
    means = []
    kinds = dict.fromkeys((row.name, row.ball) for row in rows if row.dataset in sets)
    for name, ball in kinds:
        found = [row for row in rows if (row.name, row.ball) == (name, ball) and row.dataset in sets]
        if len(found) != len(sets) or any(row.interval is None for row in found):
            continue
        ends = np.array([row.interval for row in found])
        n_in = found[0].details.get("n_in", 0)
        n_out = sum(row.n for row in found) - n_in * len(found)
        means.append(
            Measurement(
                name=name,
                value=float(np.mean([row.value for row in found])),
                n=n_in + n_out,
                interval=(float(ends[:, 0].mean()), float(ends[:, 1].mean())),
                dataset="mean",
                ball=ball,
                details={
                    "fingerprint": together([row.details.get("fingerprint", "") for row in found]),
                    "seed": seed,
                    "duration_s": round(sum(row.details.get("duration_s", 0.0) for row in found), 3),
                    **{
                        key: value
                        for key, value in found[0].details.items()
                        if key in ("attack", "inside_ball", "inside_attack", "threshold")
                        and all(row.details.get(key) == value for row in found)
                    },
                    **({"n_in": n_in, "n_out": n_out} if n_in else {}),
                    "sets": list(sets),
                    "inside": inside,
                },
            )
        )
    return means


# --- figures -----------------------------------------------------------------------------------------------


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float, bins: int) -> dict[str, Any]:
    """The reliability diagram's bins, before and after the temperature."""
    found: dict[str, Any] = {}
    for name, t in (("calibrated", temperature), ("uncalibrated", 1.0)):
        drawn = metrics.reliability(
            metrics.confidence(logits, t), logits.argmax(1) == labels, bins, 1 / logits.shape[1]
        )
        found[name] = {
            "temperature": t,
            "edges": drawn.edges.tolist(),
            "count": drawn.count.tolist(),
            "accuracy": drawn.accuracy.tolist(),
            "confidence": drawn.confidence.tolist(),
            "ece": drawn.ece,
        }
    return found


def roc(inside: Sure, outside: Sure) -> dict[str, list[float]]:
    """Share of out-images flagged ("tpr") over share of in-images flagged ("fpr"), thinned."""
    thresholds = np.unique(np.concatenate([inside.odds, outside.odds]))
    flagged_in = np.searchsorted(np.sort(inside.odds), thresholds, side="right") / len(inside.odds)
    flagged_out = np.searchsorted(np.sort(outside.odds), thresholds, side="right") / len(outside.odds)
    fpr, tpr = np.concatenate([[0.0], flagged_in]), np.concatenate([[0.0], flagged_out])
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(fpr)) + np.abs(np.diff(tpr)))])
    at = np.unique(np.searchsorted(along, np.linspace(0, along[-1], CURVE_POINTS)))
    at = np.unique(np.concatenate([[0], np.minimum(at, len(fpr) - 1), [len(fpr) - 1]]))
    return {"fpr": np.round(fpr[at], 6).tolist(), "tpr": np.round(tpr[at], 6).tolist()}


def histogram(confidences: np.ndarray, low: float) -> list[float]:
    """Shares in HISTOGRAM_BINS equal bins on [low, 1]."""
    edges = np.linspace(low, 1.0, HISTOGRAM_BINS + 1)
    count, _ = np.histogram(np.clip(confidences, low, 1.0), edges)
    return np.round(count / len(confidences), 6).tolist()


def radius_curve(values: np.ndarray, radii: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95 % interval over the radius: `values` (B, 1 + R)."""
    ends = [metrics.mean_interval(column) for column in values.T]
    return {
        "radii": [0.0, *radii],
        "mean": values.mean(0).tolist(),
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
        "n": len(values),
    }


# --- rows --------------------------------------------------------------------------------------------------


def _row(
    name: str,
    value: float,
    n: int,
    interval: tuple[float, float] | None,
    source: Source,
    ball: Ball | None = None,
    **details: Any,
) -> Measurement:
    return Measurement(
        name=name,
        value=float(value),
        n=n,
        interval=interval,
        dataset=source.name,
        ball=ball,
        details=source.details(**details),
    )


def _rate(name: str, k: int, n: int, source: Source, ball: Ball | None = None, **details: Any) -> Measurement:
    return _row(name, k / n, n, metrics.wilson_interval(k, n), source, ball, **details)


def _mean(
    name: str,
    values: np.ndarray,
    source: Source,
    ball: Ball | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    **details: Any,
) -> Measurement:
    interval = metrics.mean_interval(values, bounds=bounds) if len(values) > 1 or bounds[1] < 3 else None
    return _row(name, float(values.mean()), len(values), interval, source, ball, **details)


def _ece(
    name: str,
    c: np.ndarray,
    right: np.ndarray,
    bins: int,
    low: float | None,
    source: Source,
    **details: Any,
) -> Measurement:
    """An ECE with bins on [low, 1], or adaptive ones where low is None."""
    details["bins"] = bins
    if low is None:
        value = metrics.adaptive_ece(c, right, bins)
    else:
        value, details["range"] = metrics.ece(c, right, bins, low), [low, 1.0]
    interval = metrics.ece_interval(c, right, bins, low, generator=source.generator(), samples=SAMPLES)
    return _row(name, value, len(c), interval, source, None, **details)


def _bootstrapped(
    name: str,
    statistic: Callable[..., float],
    groups: Sequence[Sequence[np.ndarray]],
    n: int,
    source: Source,
    ball: Ball | None = None,
    **details: Any,
) -> Measurement:
    value = statistic(*(array for group in groups for array in group))
    low, high = metrics.bootstrap_interval(statistic, groups, generator=source.generator(), samples=SAMPLES)
    return _row(name, value, n, (max(0.0, low), min(1.0, high)), source, ball, **details)
