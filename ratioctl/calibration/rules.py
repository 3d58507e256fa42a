"""Rules by which thresholds are chosen: their text, and the choice on scored images. Needs no torch.

    keep:SHARE                        accepts at least this share of the in-distribution (ID) images
    pass:SHARE@NAME                   accepts at most this share of the out-of-distribution (OOD) set NAME
    worst-pass:SHARE@NAME:eps=E       the same with its images attacked in the l2 ball of radius E
    cost:FP/FN@PREVALENCE             least expected cost; PREVALENCE is the share of OOD images in use
    conformal:ALPHA                   rejects a new ID image with probability ALPHA at most
    risk:R                            at most this share of errors among the accepted ID images

An image is accepted where its acceptance (`ratioctl.scores.OodScore`) reaches the threshold's bound. Every
rule takes the lowest threshold that satisfies it, which accepts the most images, among the values at which
one of the images is just accepted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from ratioctl.errors import UsageError
from ratioctl.scores import OodScore
from ratioctl.utils.suggest import did_you_mean

FORMS = {
    "keep": "keep:0.95",
    "pass": "pass:0.05@NAME",
    "worst-pass": "worst-pass:0.2@NAME:eps=1.0",
    "cost": "cost:1/10@0.05",
    "conformal": "conformal:0.05",
    "risk": "risk:0.01",
}
RESERVED = ("tpr95", "tpr99")
MAX_ATTACKED = 1024  # images of a set, as in the paper
_NUMBER = r"(?:\d{1,20}\.?\d{0,20}|\.\d{1,20})(?:[eE][-+]?\d{1,2})?"
_ARGUMENTS = {
    "pass": rf"(?P<share>{_NUMBER})@(?P<ood>.+)",
    "worst-pass": rf"(?P<share>{_NUMBER})@(?P<ood>.+?):eps=(?P<eps>{_NUMBER})"
    r"(?::n=(?P<n>\d+))?(?::steps=(?P<steps>\d+))?",
    "cost": rf"(?P<false_positive>{_NUMBER})/(?P<false_negative>{_NUMBER})@(?P<share>{_NUMBER})",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of one named threshold.

    Attributes:
        name: of the threshold.
        text: as given, for example "pass:0.05@svhn".
        kind: a key of `FORMS`.
        share: SHARE, ALPHA, R or PREVALENCE, exactly as written.
        ood: name of the OOD set of "pass" and "worst-pass".
        eps, images, steps: of the attack of "worst-pass": l2 radius, most images, steps of each search.
        costs: (of flagging an ID image, of accepting an OOD image), of "cost".
    """

    name: str
    text: str
    kind: str
    share: Fraction
    ood: str | None = None
    eps: float | None = None
    images: int = MAX_ATTACKED
    steps: int = 100
    costs: tuple[float, float] = (1.0, 1.0)

    @property
    def option(self) -> str:
        return f"--threshold {self.name}={self.text}"

    @property
    def attack(self) -> tuple[str, float, int, int] | None:
        """Set, radius, images and steps of the attack that the rule needs; None for the other rules."""
        if self.ood is None or self.eps is None:
            return None
        return self.ood, self.eps, self.images, self.steps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Images of a set after scoring, arrays (N,).

    Attributes:
        acceptance: larger is more in-distribution.
        threshold: the threshold at which the image is just accepted.
        predicted: class of the largest logit.
        correct: whether it is the label; None for OOD images.
    """

    acceptance: np.ndarray
    threshold: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray | None = None

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float, kind: OodScore, labels: np.ndarray | None) -> Scored:
        """Of logits (N, K)."""
        predicted = logits.argmax(axis=1)
        return cls(
            acceptance=kind.acceptance(logits, temperature),
            threshold=kind.threshold_of(logits, temperature),
            predicted=predicted,
            correct=None if labels is None else predicted == labels,
        )

    def __len__(self) -> int:
        return len(self.acceptance)

    def where(self, chosen: np.ndarray) -> Scored:
        correct = None if self.correct is None else self.correct[chosen]
        return Scored(
            acceptance=self.acceptance[chosen],
            threshold=self.threshold[chosen],
            predicted=self.predicted[chosen],
            correct=correct,
        )


def parse(text: str) -> Rule:
    """A rule from "NAME=RULE".

    Raises:
        UsageError: another form, an impossible number, or a name that is reserved or no name.
    """
    name, equals, rule = text.partition("=")
    name, rule = name.strip(), rule.strip()
    option = f"--threshold {text}"
    if not equals:
        raise UsageError(option, "is not NAME=RULE", "For example --threshold strict=keep:0.9.")
    if name in RESERVED:
        raise UsageError(option, f"{name} is always calibrated and keeps its meaning", "Choose another name.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,39}", name) or name.lower() in ("nan", "inf", "infinity"):
        reason = f"{name!r:.50} is not a name for a threshold"
        raise UsageError(option, reason, "Start with a letter; letters, digits, - and _ follow, 40 in all.")
    kind, _, arguments = rule.partition(":")
    if kind not in FORMS:
        known = ", ".join(FORMS.values())
        step = f"{did_you_mean(kind, FORMS)} The rules are {known}.".lstrip()
        raise UsageError(option, f"there is no rule {kind!r:.40}", step)
    found = re.fullmatch(_ARGUMENTS.get(kind, rf"(?P<share>{_NUMBER})"), arguments)
    if found is None:
        raise UsageError(option, f"has another form than {FORMS[kind]}", f"Write it as {FORMS[kind]}.")
    given = found.groupdict()
    share = Fraction(given["share"])
    low_too = kind in ("pass", "worst-pass", "risk")
    if share < 0 or share > 1 or (share == 0 and not low_too) or (share == 1 and kind != "keep"):
        ends = f"{'[' if low_too else '('}0, 1{']' if kind == 'keep' else ')'}"
        raise UsageError(option, f"{given['share']} is not a share in {ends}", f"For example {FORMS[kind]}.")
    eps = None if given.get("eps") is None else float(given["eps"])
    images, steps = int(given.get("n") or MAX_ATTACKED), int(given.get("steps") or 100)
    costs = (float(given.get("false_positive") or 1), float(given.get("false_negative") or 1))
    numbers = (*costs, 1.0 if eps is None else eps, float(images), float(steps))
    if not all(0 < number < math.inf for number in numbers):
        raise UsageError(option, "costs, radius, images and steps must be above 0", f"See {FORMS[kind]}.")
    return Rule(
        name=name,
        text=rule,
        kind=kind,
        share=share,
        ood=given.get("ood"),
        eps=eps,
        images=images,
        steps=steps,
        costs=costs,
    )


def parse_all(
    given: Sequence[str] | Mapping[str, str], ood: Mapping[str, str], *, per_class: bool = False
) -> list[Rule]:
    """All rules of one call, "NAME=RULE" each or a mapping; `ood` are the OOD sets by name.

    Raises:
        UsageError: also for a name that is given twice, a rule whose OOD set is not given, and `per_class`
            without rules.
    """
    if per_class and not given:
        step = "Add one, for example --threshold strict=keep:0.95."
        raise UsageError("--per-class", "needs a threshold to choose for every class", step)
    texts = [f"{n}={rule}" for n, rule in given.items()] if isinstance(given, Mapping) else list(given)
    rules = [parse(text) for text in texts]
    for k, rule in enumerate(rules):
        if rule.name in {other.name for other in rules[:k]}:
            raise UsageError(rule.option, f"the name {rule.name} is given twice", "Choose another name.")
        if rule.kind == "cost" and not ood:
            step = "Give out-of-distribution images with --ood NAME=SOURCE."
            raise UsageError(rule.option, "needs out-of-distribution images", step)
        if rule.ood is not None and rule.ood not in ood:
            known = f"given are {', '.join(ood)}" if ood else "none is given"
            step = f"Add --ood {rule.ood}=SOURCE."
            raise UsageError(rule.option, f"there is no OOD set named {rule.ood}; {known}", step)
    return rules


def choose(rule: Rule, kind: OodScore, inside: Scored, outside: Mapping[str, Scored]) -> float:
    """The threshold that a rule takes on these images.

    Args:
        inside: ID images.
        outside: OOD images by name; for "worst-pass" the attacked ones.

    Raises:
        UsageError: too few images, or no threshold satisfies the rule; the reason says which.
    """
    if not len(inside):
        raise UsageError(rule.option, "there are no in-distribution images", "Give some with --data SOURCE.")
    if rule.kind in ("keep", "conformal"):
        return _order_statistic(rule, inside)
    thresholds, bounds = _candidates(kind, [inside, *_relevant(rule, outside)])
    accepted = len(inside) - np.searchsorted(np.sort(inside.acceptance), bounds)
    if rule.kind == "risk":
        allowed = _risk_allows(rule, inside, bounds, accepted)
    elif rule.kind == "cost":
        return float(thresholds[_cheapest(rule, outside, bounds, accepted / len(inside))])
    else:
        out = outside[str(rule.ood)]
        passed = len(out) - np.searchsorted(np.sort(out.acceptance), bounds)
        allowed = (passed <= math.floor(rule.share * len(out))) & (accepted > 0)
        if not allowed.any():
            passing = int((out.acceptance >= inside.acceptance.max()).sum())
            reason = (
                f"no threshold does this: {passing} of {len(out)} images of {rule.ood} are accepted before "
                f"the first of {len(inside)} in-distribution images"
            )
            raise UsageError(rule.option, reason, "Allow a larger share, or improve the model.")
    return float(thresholds[np.flatnonzero(allowed)[0]])


def _order_statistic(rule: Rule, inside: Scored) -> float:
    n, order = len(inside), np.argsort(inside.acceptance, kind="stable")
    if rule.kind == "keep":
        position = min(math.floor((1 - rule.share) * n), n - 1)
    else:
        position = math.floor(rule.share * (n + 1)) - 1
        if position < 0:
            least = math.ceil(1 / rule.share) - 1
            reason = f"needs at least {least:,} in-distribution images; there are {n:,}"
            raise UsageError(rule.option, reason, "Give more images with --data, or a larger ALPHA.")
    return float(inside.threshold[order[position]])


def _relevant(rule: Rule, outside: Mapping[str, Scored]) -> list[Scored]:
    if rule.kind == "risk":
        return []
    return list(outside.values()) if rule.ood is None else [outside[rule.ood]]


def _candidates(kind: OodScore, sets: list[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds at which one of the images is just accepted, and their bounds, ascending by bound."""
    thresholds = np.unique(np.concatenate([part.threshold for part in sets]))
    bounds = np.array([kind.acceptance_bound(value) for value in thresholds.tolist()])
    order = np.argsort(bounds, kind="stable")
    return thresholds[order], bounds[order]


def _risk_allows(rule: Rule, inside: Scored, bounds: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    assert inside.correct is not None
    wrong = np.sort(inside.acceptance[~inside.correct])
    errors = len(wrong) - np.searchsorted(wrong, bounds)
    numerator, denominator = rule.share.numerator, rule.share.denominator
    allowed = np.array(
        [
            bool(a) and int(e) * denominator <= numerator * int(a)
            for e, a in zip(errors, accepted, strict=True)
        ]
    )
    if not allowed.any():
        lowest = float(np.min(errors[accepted > 0] / accepted[accepted > 0]))
        reason = f"no threshold does this: the lowest share of errors that one reaches is {lowest:.2%}"
        raise UsageError(rule.option, reason, "Allow a larger risk, or improve the model.")
    return allowed


def _cheapest(rule: Rule, outside: Mapping[str, Scored], bounds: np.ndarray, accepted: np.ndarray) -> int:
    """Number of the candidate with the least cost; every OOD set has the same weight."""
    passed = np.mean(
        [1 - np.searchsorted(np.sort(out.acceptance), bounds) / len(out) for out in outside.values()], axis=0
    )
    prevalence = float(rule.share)
    of_flags, of_passes = (1 - prevalence) * rule.costs[0], prevalence * rule.costs[1]
    cost = of_flags * (1 - accepted) + of_passes * passed
    best = int(np.argmin(cost))
    if cost[best] >= of_flags:
        reason = f"flagging every image costs least ({of_flags:.4g} an image), so no threshold is worth it"
        raise UsageError(rule.option, reason, "Check the costs and the prevalence.")
    return best
