"""Auto-Frank-Wolfe: needs no projection, so it exists for every ball."""

from __future__ import annotations

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks.apgd import auto_ascent
from ratioctl.attacks.problem import Problem
from ratioctl.attacks.registry import register_attack
from ratioctl.recipe import Attack


@register_attack("afw", norms=("1", "1.5", "2", "inf"))
def afw(problem: Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Auto-Frank-Wolfe (Boreiko et al. 2022): towards the linear maximizer over ball and box.

    x <- x + size (s - x), with size 0.75 at first, halved as in Auto-PGD. Where the gradient is zero the
    linear maximizer says nothing and x stays.
    """

    def move(x: Tensor, previous: Tensor | None, gradient: Tensor, size: Tensor) -> Tensor:
        corner = geometry.linear_maximizer(gradient, problem.x0, problem.p, problem.radius)
        sighted = gradient.abs().amax(1, keepdim=True) > 0
        return torch.addcmul(x, torch.where(sighted, corner - x, 0), size)

    return auto_ascent(problem, x, attack, torch.full_like(x[:, :1], 0.75), move)
