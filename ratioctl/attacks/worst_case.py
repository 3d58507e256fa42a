"""The largest confidence in a ball: how confident a model can be made about images it should not know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attacks import goals
from ratioctl.attacks.goals import Goal
from ratioctl.attacks.registry import strongest
from ratioctl.attacks.visited import LogitsOf, batched_logits, best_visited, image_generators
from ratioctl.recipe import Ball


@dataclass(frozen=True, kw_only=True, eq=False)
class WorstCase:
    """The most confident points found around N images.

    Attributes:
        confidence: (N,) max_k p_k of the best point; at least `clean` where it is what was searched.
        clean: (N,) max_k p_k of the images themselves.
        x: (N, C, H, W) the point with that confidence.
        by: (N,) int64: 0 the image itself, else the number of the search in `searches`, from 1.
        searches: names of the searches.
        stuck: (N,) bool: no search found a gradient other than zero.
    """

    confidence: Tensor
    clean: Tensor
    x: Tensor
    by: Tensor
    searches: tuple[str, ...]
    stuck: Tensor


def worst_case_confidence(
    logits_of: LogitsOf,
    x0: Tensor,
    ball: Ball,
    *,
    temperature: float = 1.0,
    steps: int = 100,
    restarts: int = 5,
    targets: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    search_logits_of: LogitsOf | None = None,
    method: str | None = None,
    acceptance: Goal | None = None,
) -> WorstCase:
    """The largest confidence in the ball around each image, over several searches and the image itself.

    A single search on the maximal probability under-reports, because its gradient vanishes where the model is
    sharp. The searches maximise the log-odds of the likeliest class, the logit margin of the predicted class,
    and the log-probability of each of the next `targets` classes. Of all points visited the most confident
    one counts, scored by `logits_of` (by log-odds, because confidences round to 1). The paper's budget
    (section 4.3) is 100 steps and 5 restarts.

    Args:
        logits_of, search_logits_of, batch_size, seed: as in `robust_verdicts`.
        temperature: of the softmax whose confidence is searched and reported.
        targets: how many classes besides the predicted one are tried; at most K - 1.
        method: a registered attack method; None takes the default of the norm.
        acceptance: logits (B, K) to (B,), searched and compared instead of the log-odds: the acceptance of
            another OOD score than the maximum softmax probability.

    Raises:
        ValueError: an unknown method, or one that cannot search this ball.
    """
    search_logits = search_logits_of or logits_of
    score = acceptance or goals.log_odds(temperature)  # the order of confidences, without their ties at 1
    best = x0.detach().float().clone()
    logits = batched_logits(logits_of, x0, batch_size)
    order = logits.argsort(dim=1, descending=True, stable=True)
    clean = goals.confidence(temperature)(logits)
    top, by = score(logits), torch.zeros_like(order[:, 0])
    stuck = torch.ones_like(by, dtype=torch.bool)
    attack = strongest(ball, steps, restarts=restarts, method=method)
    names = ["log-confidence", "margin"]
    names += [f"target {k + 1}" for k in range(1, min(targets, logits.shape[1] - 1) + 1)]
    for number, name in enumerate(names):
        for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
            x, ranked = x0[rows], order[rows]
            if number == 0:
                goal = score
            elif number == 1:
                goal = _negative(goals.margin(ranked[:, 0]))
            else:
                goal = goals.log_probability(ranked[:, number - 1], temperature)
            generators = image_generators(x, f"{seed}/worst/{name}/{ball}")
            found, blind = best_visited(search_logits, x, goal, attack, score, generators)
            reached = score(batched_logits(logits_of, found, batch_size))
            higher = reached > top[rows]
            top[rows[higher]] = reached[higher]
            by[rows[higher]] = number + 1
            best[rows[higher]] = found[higher]
            stuck[rows] &= blind
    confidence = goals.confidence(temperature)(batched_logits(logits_of, best, batch_size))
    if acceptance is None:
        confidence = torch.maximum(confidence, clean)
    return WorstCase(confidence=confidence, clean=clean, x=best, by=by, searches=tuple(names), stuck=stuck)


def _negative(goal: Goal) -> Goal:
    return lambda logits: -goal(logits)
