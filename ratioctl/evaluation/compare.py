"""Comparison of models evaluated on the same data: which are significantly worse than the best one.

Free of torch, so that reports can use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ratioctl import metrics
from ratioctl.types import Evaluated, Measurement

LEVEL = 0.05
Rows = dict[str, np.ndarray]


def significantly_worse(
    found: Sequence[Measurement | None], higher_is_better: bool, models: Sequence[Evaluated] = ()
) -> list[int]:
    """Indices of the measurements that are significantly worse than the best one.

    Decided by a paired test (p < 0.05) where `models` (one per measurement) have examples of the same images,
    else where the 95 % intervals do not overlap.
    """
    known = {k: m for k, m in enumerate(found) if m is not None}
    sign = 1 if higher_is_better else -1
    first = max(known, key=lambda k: sign * known[k].value)
    best = known[first]
    return [
        k
        for k, m in known.items()
        if m.value != best.value
        and _worse(m, best, higher_is_better, p_value(best, m, models[first], models[k]) if models else None)
    ]


def _worse(m: Measurement, best: Measurement, higher_is_better: bool, p: float | None) -> bool:
    if p is not None:
        return p < LEVEL
    if m.interval is None or best.interval is None:
        return False
    return m.interval[1] < best.interval[0] if higher_is_better else m.interval[0] > best.interval[1]


def p_value(one: Measurement, other: Measurement, first: Evaluated, second: Evaluated) -> float | None:
    """Two-sided p-value of equality of two models' measurements; None where no paired test applies.

    Accuracies use McNemar's test, AUROCs DeLong's, mean confidences a paired test of means.
    """
    if one.name in ("accuracy", "robust_accuracy"):
        attack = "clean" if one.ball is None else f"{one.ball}: {one.details['attack']}"
        a, b = (_examples(model, one.dataset, attack) for model in (first, second))
        return metrics.mcnemar(a["verdict"] > 0, b["verdict"] > 0) if _same(a, b) and a and b else None
    if one.name not in ("auroc", "mmc") or "sets" not in one.details:
        return None
    attack = "clean" if one.ball is None else f"{one.ball}: worst case"
    outside = [[_examples(model, name, attack) for name in one.details["sets"]] for model in (first, second)]
    inside = [_examples(model, one.details["inside"], "clean") for model in (first, second)]
    if not all(_same(a, b) for a, b in [*zip(*outside, strict=True), tuple(inside)]):
        return None
    if one.name == "mmc":
        return metrics.paired_mean_test(*([rows["confidence"] for rows in sets if rows] for sets in outside))
    scores = [
        (-i["log_odds"], [-rows["log_odds"] for rows in o if rows])
        for i, o in zip(inside, outside, strict=True)
        if i
    ]
    return metrics.paired_auroc_test(*scores)


def _examples(model: Evaluated, dataset: str, attack: str) -> Rows | None:
    """A model's examples of one set under one attack; None where there are none."""
    at = (model.examples["dataset"] == dataset) & (model.examples["attack"] == attack)
    return {key: column[at] for key, column in model.examples.items()} if at.any() else None


def _same(a: Rows | None, b: Rows | None) -> bool:
    """Whether both exist and are of the same images."""
    return a is not None and b is not None and np.array_equal(a["index"], b["index"])
