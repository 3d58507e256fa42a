"""Momentum PGD."""

from __future__ import annotations

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks.problem import TINY, Problem, keep_better, projection
from ratioctl.attacks.registry import register_attack
from ratioctl.recipe import Attack


@register_attack("pgd", norms=("1", "2", "inf"), step_size=True)
def pgd(problem: Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent with momentum (Augustin, Meinke, Hein 2020, appendix B.1).

    v <- momentum v + g / ||g||_1; then a step along v, of a fixed length in the ball's norm; then the
    projection onto the ball and the box. The paper has no l1: here a step changes a fifth of the pixels at
    first, shrinking geometrically to a single one at half the steps (what is left suffices to carry the
    whole budget there), and only pixels that are not at the end of the box already.
    """
    p = problem.p
    relative = 2.5 / attack.steps if attack.step_size is None else attack.step_size / attack.ball.eps
    length = (problem.radius * relative).float()[:, None]
    project = projection(problem)
    velocity = torch.zeros_like(x)
    best = value = None
    for step in range(attack.steps):
        reached, gradient = problem.gradient_of(x, step)
        if best is None or value is None:
            best, value = x, reached
        else:
            best, value = keep_better(best, value, x, reached)
        gradient = gradient / gradient.abs().sum(1, keepdim=True).clamp_min_(TINY)
        velocity.mul_(attack.momentum).add_(gradient)
        if p == 1:
            density = 0.2 * (0.2 * x.shape[1]) ** (-2 * step / attack.steps)
            free = velocity * torch.where(velocity > 0, x < 1, x > 0)
            direction = geometry.steepest(free, p, density)
        else:
            direction = geometry.steepest(velocity, p)
        x = project(torch.addcmul(x, direction, length))
    assert best is not None
    assert value is not None
    return keep_better(best, value, x, problem.value_of(x, attack.steps))
