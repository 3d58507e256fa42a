"""The thresholds of a package: `tpr95` and `tpr99`, those of `rules`, and the records stored beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ratioctl import metrics
from ratioctl.calibration.rules import RESERVED, Rule, Scored, choose
from ratioctl.errors import UsageError
from ratioctl.scores import OodScore, Threshold

PERCENTAGES = (95, 99)
LEAST_PER_CLASS = 50  # images of each set that are predicted as a class, for a threshold of its own
QUANTILES = 101  # of the acceptances that are stored
_EXCHANGEABLE = "the images that are scored later come from the same distribution as the calibration images"
_SAME_SCORE = (
    "the score was fixed before these images were seen; a temperature that was fitted on them violates this "
    "slightly (--keep-temperature, with other images than the temperature's, does not)"
)


def tpr_thresholds(confidences: np.ndarray) -> dict[str, float]:
    """ "tpr95" and "tpr99" of in-distribution confidences (N,): at least 95 and 99 % of them reach it.

    The in-distribution counts as positive here, unlike in the metric `fpr_at_95_tpr`.
    """
    return {f"tpr{x}": metrics.threshold_at_tpr(confidences, x) for x in PERCENTAGES}


def score_thresholds(score: OodScore, logits: np.ndarray, temperature: float) -> dict[str, float]:
    """The same for another OOD score of in-distribution logits (N, K): values above which images are OOD."""
    return {
        f"tpr{x}": -metrics.threshold_at_tpr(-score.threshold_of(logits, temperature), x) for x in PERCENTAGES
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSet:
    """A set with its scores and its origin.

    Attributes:
        ball: {"p": "2", "eps": E} of attacked images, else None; attack: in words.
    """

    name: str
    scored: Scored
    fingerprint: str
    ball: dict[str, Any] | None = None
    attack: str | None = None

    def facts(self) -> dict[str, Any]:
        found = {"set": self.name, "n": len(self.scored), "fingerprint": self.fingerprint, "ball": self.ball}
        return found if self.attack is None else {**found, "attack": self.attack}


def by_rule(
    rule: Rule,
    kind: OodScore,
    inside: Scored,
    outside: Mapping[str, Scored],
    label_names: Sequence[str] | None = None,
) -> tuple[Threshold, dict[str, str]]:
    """The threshold of a rule, with one for each class where `label_names` are given.

    A class's threshold is chosen on the images that are predicted as this class.

    Returns:
        The threshold, and per class that uses the common one the reason.

    Raises:
        UsageError: see `rules.choose`; for a single class it is a reason, not an error.
    """
    common = choose(rule, kind, inside, outside)
    if label_names is None:
        return Threshold(common), {}
    values: list[float] = []
    reasons: dict[str, str] = {}
    for k, label in enumerate(label_names):
        own_in = inside.where(inside.predicted == k)
        own_out = {name: out.where(out.predicted == k) for name, out in outside.items()}
        least = min(len(own_in), *(len(out) for out in own_out.values())) if own_out else len(own_in)
        value = common
        if least < LEAST_PER_CLASS:
            reasons[label] = f"{least} images are predicted as it, {LEAST_PER_CLASS} are needed"
        else:
            try:
                value = choose(rule, kind, own_in, own_out)
            except UsageError as error:
                reasons[label] = error.reason
        values.append(value)
    return Threshold(common, tuple(values)), reasons


def tpr_rules() -> list[Rule]:
    """The rules that `tpr95` and `tpr99` follow."""
    texts = [f"keep:{percent / 100:g}" for percent in PERCENTAGES]
    pairs = zip(RESERVED, texts, strict=True)
    return [Rule(name=name, text=text, kind="keep", share=Fraction(text[5:])) for name, text in pairs]


def record(
    rule: Rule,
    threshold: float,
    kind: OodScore,
    sets: Sequence[ScoredSet],
    reasons: Mapping[str, str],
    label_names: Sequence[str],
) -> dict[str, Any]:
    """What is stored beside a threshold: rule, acceptance rates with exact intervals, origin. JSON values.

    Args:
        sets: the ID images first.
        reasons: per class that uses the common threshold, why.
    """
    classes, scored = getattr(threshold, "classes", None), sets[0].scored
    rates = [_accepted(part, kind, threshold) for part in sets]
    found: dict[str, Any] = {
        "name": rule.name,
        "rule": rule.text,
        "score": kind.config_name,
        "threshold": float(threshold),
        "id": rates[0],
        "ood": rates[1:],
        **guarantee(rule, kind, len(scored), classes is not None),
    }
    if classes is not None:
        found["per_class"] = {
            "least": LEAST_PER_CLASS,
            "own": [label for label in label_names if label not in reasons],
            "common": dict(reasons),
        }
    if rule.kind == "risk" and scored.correct is not None:
        taken = _taken(scored, kind, threshold)
        errors, n = int((taken & ~scored.correct).sum()), int(taken.sum())
        found["risk"] = {"errors": errors, **_rate(errors, n)}
    return found


def acceptance_record(kind: OodScore, sets: Sequence[ScoredSet]) -> dict[str, Any]:
    """Quantiles of the acceptances, from which curves and percentiles are drawn; the ID images come first."""
    at = np.linspace(0, 1, QUANTILES)

    def quantiles(part: ScoredSet) -> dict[str, Any]:
        values = np.quantile(part.scored.acceptance, at)
        return {**part.facts(), "quantiles": [float(f"{value:.9g}") for value in values]}

    unit = "log-odds" if kind.name == "msp" else f"negated {kind.name}"
    found = [quantiles(part) for part in sets]
    return {"score": kind.config_name, "unit": unit, "id": found[0], "ood": found[1:]}


def guarantee(rule: Rule, kind: OodScore, n: int, per_class: bool) -> dict[str, Any]:
    """ "statement" and "assumptions" of a rule, empty for rules that hold on the calibration images alone."""
    if rule.kind != "conformal":
        return {}
    share = f"{float(rule.share):.4g}"
    index = int(rule.share * (n + 1))
    values = "confidences" if kind.name == "msp" else "acceptances"
    statement = (
        f"A new in-distribution image is flagged with probability at most {share}: the threshold is "
        f"number {index:,} of the {n:,} calibration {values} in ascending order. "
        "The probability is over the calibration images and the new one together."
    )
    if per_class:
        statement += " The same holds among the images that are predicted as a class with its own threshold."
    return {"statement": statement, "assumptions": [_EXCHANGEABLE, _SAME_SCORE]}


def kept_from(stored: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Thresholds of an earlier calibration that are not calibrated again."""
    return {name: value for name, value in stored.items() if name not in (*RESERVED, *names)}


def _taken(scored: Scored, kind: OodScore, threshold: float) -> np.ndarray:
    return scored.acceptance >= kind.bounds(threshold, scored.predicted)


def _accepted(part: ScoredSet, kind: OodScore, threshold: float) -> dict[str, Any]:
    count = int(_taken(part.scored, kind, threshold).sum())
    return {**part.facts(), "accepted": count, **_rate(count, len(part.scored))}


def _rate(count: int, n: int) -> dict[str, Any]:
    return {"n": n, "rate": count / n, "interval": list(metrics.clopper_pearson_interval(count, n))}
