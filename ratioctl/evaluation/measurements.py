"""Measurements and figure data from arrays. Confidences are float64, after the temperature."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
RISKS = (0.01, 0.05)  # shares of errors at which the coverage is reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Origin of the measurements on a set, stored with each of them.

    Attributes:
        name: of the set in the report.
        seconds: compute time of its batches, shared by its measurements.
        common: details of all its measurements.
    """

    name: str
    images: Images
    seed: int
    seconds: float = 0.0
    common: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"attack": None})

    def details(self, **more: Any) -> dict[str, Any]:
        fixed = {"fingerprint": self.images.fingerprint, "seed": self.seed, "duration_s": self.seconds}
        return {**fixed, **self.common, **more}

    def generator(self) -> np.random.Generator:
        """Random numbers of bootstrap intervals, the same for every measurement."""
        return np.random.default_rng([self.seed, 0xB007])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidences:
    """`confidence` (N,) of images, and its `log_odds` (N,): the same order without ties at 1."""

    confidence: np.ndarray
    log_odds: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float) -> Confidences:
        """Of logits (N, K)."""
        return cls(
            confidence=metrics.confidence(logits, temperature), log_odds=metrics.log_odds(logits, temperature)
        )

    def at(self, index: np.ndarray) -> Confidences:
        """Copies of these images' values."""
        return Confidences(confidence=self.confidence[index], log_odds=self.log_odds[index])


def together(fingerprints: Sequence[str]) -> str:
    """Fingerprint of several sets: SHA-256 over theirs."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def seconds(parts: Iterable[Arrays]) -> float:
    """Total compute time of batches."""
    return sum(float(part["seconds"]) for part in parts)


def clean(source: Source, logits: np.ndarray, temperature: float, spec: Calibration) -> list[Measurement]:
    """Accuracy and calibration of logits (N, K) on ID images; "_uncalibrated" means temperature 1."""
    labels = source.images.labels
    assert labels is not None
    n, classes = logits.shape
    correct = logits.argmax(1) == labels
    rows = [rate("accuracy", int(correct.sum()), n, source)]
    for suffix, t in (("", temperature), ("_uncalibrated", 1.0)):
        p = metrics.softmax(logits, t)
        c = p.max(1)
        bins = spec.report_bins
        rows.append(_ece(f"ece{suffix}", c, correct, bins, 1 / classes, source, temperature=t))
        rows.append(_ece(f"adaptive_ece{suffix}", c, correct, bins, None, source, temperature=t))
        losses = -metrics.log_softmax(logits, t)[np.arange(n), labels]
        squares = np.sum(p**2, 1) - 2 * p[np.arange(n), labels] + 1
        rows.append(mean(f"nll{suffix}", losses, source, bounds=(0.0, np.inf), temperature=t))
        rows.append(mean(f"brier{suffix}", squares, source, bounds=(0.0, 2.0), temperature=t))
        rows.append(mean(f"mmc{suffix}", c, source, temperature=t))
    return rows


def mixture(
    source: Source,
    logits: np.ndarray,
    outside: Mapping[str, np.ndarray],
    temperature: float,
    spec: Calibration,
    fingerprints: Sequence[str],
) -> list[Measurement]:
    """ECE on a mixture of equally many ID and OOD images (appendix C of the RATIO paper).

    Every OOD set contributes equally many images. An OOD image counts as correct with probability 1/K.

    Args:
        fingerprints: of all sets, the ID set first.
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
    """Robust accuracy after all attacks, and accuracy after each of them.

    Args:
        by: (N,) -1 where the clean prediction is wrong, 0 for survivors, else the attack's number from 1.
    """
    n = len(by)
    standing = [int(((by == 0) | (by > k)).sum()) for k in range(len(attacks) + 1)]
    rows = [rate("robust_accuracy", standing[-1], n, source, ball, attack=name, **more)]
    rows += [rate("accuracy_before_attack", standing[0], n, source)]
    for k, attack in enumerate(attacks):
        rows.append(
            rate(
                f"accuracy_after_{attack.replace('-', '_')}",
                standing[k + 1],
                n,
                source,
                ball,
                attack=" + ".join(attacks[: k + 1]),
            )
        )
    return rows


def detection(
    source: Source,
    inside: Confidences,
    outside: Confidences,
    ball: Ball | None = None,
    suffix: str = "",
    **details: Any,
) -> list[Measurement]:
    """OOD detection by confidence: `outside` (OOD images) against `inside` (ID images).

    Images are ranked by log-odds, because confidences may round to 1 and ties count one half in the AUROC.
    The conservative AUROC ranks by confidence and counts ties as errors. In `fpr_at_95_tpr` OOD images are
    the positive class.
    """
    scores = -inside.log_odds, -outside.log_odds
    n_in, n_out = len(inside.log_odds), len(outside.log_odds)
    sizes = {"n_in": n_in, "n_out": n_out, **details}
    rows = []
    for name, value in (
        ("auroc", metrics.auroc(*scores)),
        ("conservative_auroc", metrics.conservative_auroc(-inside.confidence, -outside.confidence)),
    ):
        interval = metrics.auroc_interval(value, n_in, n_out)
        rows.append(row(name + suffix, value, n_in + n_out, interval, source, ball, **sizes))
    if suffix:
        return rows
    groups = [[scores[0]], [scores[1]]]
    for name, of in (
        ("fpr_at_95_tpr", metrics.fpr_at_95_tpr),
        ("aupr_out", metrics.aupr_out),
        ("aupr_in", metrics.aupr_in),
    ):
        rows.append(_bootstrapped(name, of, groups, n_in + n_out, source, ball, **sizes))
    rows.append(mean("mmc", outside.confidence, source, ball, **details))
    return rows


def score_detection(
    source: Source,
    score: str,
    inside: np.ndarray,
    outside: np.ndarray,
    ball: Ball | None = None,
    **details: Any,
) -> list[Measurement]:
    """OOD detection by the acceptances (N,) of an OOD score; every name ends in the score's."""
    scores = -inside, -outside
    n_in, n_out = len(inside), len(outside)
    sizes = {"score": score, "n_in": n_in, "n_out": n_out, **details}
    rows = []
    for name, of in (("auroc", metrics.auroc), ("conservative_auroc", metrics.conservative_auroc)):
        value = of(*scores)
        interval = metrics.auroc_interval(value, n_in, n_out)
        rows.append(row(f"{name}_{score}", value, n_in + n_out, interval, source, ball, **sizes))
    groups = [[scores[0]], [scores[1]]]
    name = f"fpr_at_95_tpr_{score}"
    rows.append(_bootstrapped(name, metrics.fpr_at_95_tpr, groups, n_in + n_out, source, ball, **sizes))
    return rows


def score_operating(
    source: Source,
    score: str,
    acceptance: np.ndarray,
    thresholds: Mapping[str, float],
    bounds: Mapping[str, np.ndarray],
) -> list[Measurement]:
    """Acceptance rates of a set at the stored thresholds of an OOD score; `bounds` (N,) of the acceptance."""
    what = "kept" if source.images.labels is not None else "let_through"
    return [
        rate(
            f"{what}_at_{name}_{score}",
            int((acceptance >= bounds[name]).sum()),
            len(acceptance),
            source,
            score=score,
            threshold=float(threshold),
        )
        for name, threshold in sorted(thresholds.items())
    ]


def operating(
    source: Source,
    confidences: np.ndarray,
    predicted: np.ndarray,
    thresholds: Mapping[str, float],
    ball: Ball | None = None,
    **details: Any,
) -> list[Measurement]:
    """Acceptance rates of a set at each stored threshold (`kept_at_*` of ID, `let_through_at_*` of OOD sets).

    An image is accepted where its confidence reaches the threshold; of thresholds per class, reaches that
    of its predicted class (N,). For the threshold `tpr95` ID images are the positive class.
    """
    what = "kept" if source.images.labels is not None else "let_through"

    def limit(threshold: float) -> np.ndarray | float:
        classes = getattr(threshold, "classes", None)
        return threshold if classes is None else np.array(classes)[predicted]

    return [
        rate(
            f"{what}_at_{name}",
            int((confidences >= limit(threshold)).sum()),
            len(confidences),
            source,
            ball,
            threshold=float(threshold),
            **details,
        )
        for name, threshold in sorted(thresholds.items())
    ]


def guaranteed(
    source: Source, inside: Confidences, bounds: Confidences, thresholds: Mapping[str, float], ball: Ball
) -> list[Measurement]:
    """OOD detection where every OOD image has the confidence that its ball cannot exceed (`bounds`).

    "auroc_guaranteed" is a lower bound of the AUROC under any attack in the ball, "mmc_guaranteed" an upper
    bound of the mean confidence, "let_through_at_*_guaranteed" one of the acceptance rates. Of thresholds per
    class the lowest applies, as an attack may change the class.
    """
    details: dict[str, Any] = {"attack": "interval bounds, which hold for every attack"}
    rows = detection(source, inside, bounds, ball, "_guaranteed", **details)
    rows.append(mean("mmc_guaranteed", bounds.confidence, source, ball, **details))
    for name, threshold in sorted(thresholds.items()):
        least = min(getattr(threshold, "classes", None) or (float(threshold),))
        passed = int((bounds.confidence >= least).sum())
        rows.append(
            rate(
                f"let_through_at_{name}_guaranteed",
                passed,
                len(bounds.confidence),
                source,
                ball,
                threshold=least,
                **details,
            )
        )
    return rows


def selective(source: Source, scores: np.ndarray, correct: np.ndarray) -> list[Measurement]:
    """Selective prediction by `scores` (N,), larger for more confident: AURC, and coverage at `RISKS`."""
    n, groups = len(scores), [[scores, correct]]
    rows = [_bootstrapped("aurc", metrics.aurc, groups, n, source)]
    for risk in RISKS:

        def coverage(s: np.ndarray, right: np.ndarray, risk: float = risk) -> float:
            return metrics.coverage_at_risk(s, right, risk)

        rows.append(_bootstrapped(f"coverage_at_risk_{risk:g}", coverage, groups, n, source, risk=risk))
    return rows


def mean_over_sets(
    rows: Sequence[Measurement], sets: Sequence[str], inside: str, seed: int
) -> list[Measurement]:
    """Unweighted means over the OOD sets of what was measured on each of them.

    The interval is the mean of their intervals: the sets share the ID images, so their errors are not
    independent. n counts the ID images once.
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
    """Bins of the reliability diagram, before and after the temperature."""
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


def roc(inside: Confidences, outside: Confidences) -> dict[str, list[float]]:
    """Fraction of OOD images flagged ("tpr") over fraction of ID images flagged ("fpr"), thinned."""
    thresholds = np.unique(np.concatenate([inside.log_odds, outside.log_odds]))
    flagged_in = np.searchsorted(np.sort(inside.log_odds), thresholds, side="right") / len(inside.log_odds)
    flagged_out = np.searchsorted(np.sort(outside.log_odds), thresholds, side="right") / len(outside.log_odds)
    fpr, tpr = np.concatenate([[0.0], flagged_in]), np.concatenate([[0.0], flagged_out])
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(fpr)) + np.abs(np.diff(tpr)))])
    at = np.unique(np.searchsorted(along, np.linspace(0, along[-1], CURVE_POINTS)))
    at = np.unique(np.concatenate([[0], np.minimum(at, len(fpr) - 1), [len(fpr) - 1]]))
    return {"fpr": np.round(fpr[at], 6).tolist(), "tpr": np.round(tpr[at], 6).tolist()}


def risk_coverage(scores: np.ndarray, correct: np.ndarray) -> dict[str, list[float]]:
    """The risk-coverage curve: share of errors ("risk") over the share of images accepted, thinned."""
    coverage, risk = metrics.risk_coverage(scores, correct)
    at = np.unique(
        np.searchsorted(coverage, np.linspace(coverage[0], 1.0, CURVE_POINTS)).clip(max=len(risk) - 1)
    )
    return {"coverage": np.round(coverage[at], 6).tolist(), "risk": np.round(risk[at], 6).tolist()}


def histogram(confidences: np.ndarray, low: float) -> list[float]:
    """Fractions of confidences in HISTOGRAM_BINS equal bins on [low, 1]."""
    edges = np.linspace(low, 1.0, HISTOGRAM_BINS + 1)
    count, _ = np.histogram(np.clip(confidences, low, 1.0), edges)
    return np.round(count / len(confidences), 6).tolist()


def radius_curve(values: np.ndarray, radii: Sequence[float]) -> dict[str, Any]:
    """Mean confidence and its 95 % interval by radius, of `values` (B, 1 + R)."""
    ends = [metrics.mean_interval(column) for column in values.T]
    return {
        "radii": [0.0, *radii],
        "mean": values.mean(0).tolist(),
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
        "n": len(values),
    }


# --- rows --------------------------------------------------------------------------------------------------


def row(
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


def rate(name: str, k: int, n: int, source: Source, ball: Ball | None = None, **details: Any) -> Measurement:
    return row(name, k / n, n, metrics.wilson_interval(k, n), source, ball, **details)


def mean(
    name: str,
    values: np.ndarray,
    source: Source,
    ball: Ball | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    **details: Any,
) -> Measurement:
    interval = metrics.mean_interval(values, bounds=bounds) if len(values) > 1 or bounds[1] < 3 else None
    return row(name, float(values.mean()), len(values), interval, source, ball, **details)


def _ece(
    name: str,
    c: np.ndarray,
    right: np.ndarray,
    bins: int,
    low: float | None,
    source: Source,
    **details: Any,
) -> Measurement:
    """An ECE with bins on [low, 1]; None uses the bins of `adaptive_ece`."""
    details["bins"] = bins
    if low is None:
        value = metrics.adaptive_ece(c, right, bins)
    else:
        value, details["range"] = metrics.ece(c, right, bins, low), [low, 1.0]
    interval = metrics.ece_interval(c, right, bins, low, generator=source.generator(), samples=SAMPLES)
    return row(name, value, len(c), interval, source, None, **details)


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
    return row(name, value, n, (max(0.0, low), min(1.0, high)), source, ball, **details)
