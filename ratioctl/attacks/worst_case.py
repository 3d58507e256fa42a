"""The largest confidence in a ball: how confident a model can be made about images it should not know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb, warn_of_units
from ratioctl.attacks.goals import Goal
from ratioctl.attacks.registry import strongest
from ratioctl.attacks.visited import LogitsOf, batched_logits, best_visited, image_generators
from ratioctl.recipe import Attack, Ball


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
    sharp. The searches maximize the log-odds of the likeliest class, the logit margin of the predicted class,
    and the log-probability of each of the next `targets` classes. The first starts at the image; the others
    spend a third of their steps in the ball of twice the radius and go on from that point, moved into the
    ball, because searches from the image can stay on a plateau. Of all points visited the most confident one
    counts, scored by `logits_of` (by log-odds, because confidences round to 1). The paper's budget (section
    4.3) is 100 steps and 5 restarts.

    In balls that hold much of the pixel box, searches find less than in smaller ones. From 1/16 of the box's
    diameter on (l2 3.5 for 32x32x3), smaller balls are searched first and the larger ones start from there.

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
    names = ["log-confidence", "margin"]
    names += [f"target {k + 1}" for k in range(1, min(targets, logits.shape[1] - 1) + 1)]
    for step, radius in enumerate(_chain(ball, x0)):
        attack = strongest(radius, steps, restarts=restarts, method=method)
        for number, name in enumerate(names):
            for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
                x, ranked = x0[rows], order[rows]
                if number == 0:
                    goal = score
                elif number == 1:
                    goal = _negative(goals.margin(ranked[:, 0]))
                else:
                    goal = goals.log_probability(ranked[:, number - 1], temperature)
                generators = image_generators(x, f"{seed}/worst/{name}/{radius}")
                init, search = (best[rows], attack) if step else (None, attack)
                if number:
                    init, search = _larger_ball_first(search_logits, x, goal, attack)
                found, blind = best_visited(search_logits, x, goal, search, score, generators, init)
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


def _chain(ball: Ball, x0: Tensor) -> list[Ball]:
    """The balls to search, in order: the powers of two of the diameter that are smaller, and `ball`."""
    diameter = geometry.box_diameter(x0[0].numel() if len(x0) else 1, ball.p)
    if ball.eps > diameter:
        warn_of_units(ball.eps, ball.p, diameter)
    smaller = [diameter / 2**k for k in (4, 3, 2, 1, 0) if diameter / 2**k < ball.eps]
    last = ball if ball.eps <= diameter else None
    return [Ball(p=ball.p, eps=eps) for eps in smaller] + ([last] if last else [])


def _larger_ball_first(logits_of: LogitsOf, x: Tensor, goal: Goal, attack: Attack) -> tuple[Tensor, Attack]:
    """A point found in the ball of twice the radius, moved into the ball, and the rest of the attack."""
    eps, wide = attack.ball.eps, max(attack.steps // 3, 1)
    first = attack.model_copy(update={"steps": wide, "restarts": 1})
    diameter = geometry.box_diameter(x[0].numel(), attack.ball.p)
    point = perturb(logits_of, x, goal, first, eps=min(2 * eps, diameter)).x
    rest = attack.model_copy(update={"steps": max(attack.steps - wide // attack.restarts, 1)})
    return geometry.into_ball(x, point, attack.ball.p, eps), rest


def _negative(goal: Goal) -> Goal:
    return lambda logits: -goal(logits)
