"""Auto-PGD: projected ascent whose step size halves itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks.problem import Problem, keep_better, projection
from ratioctl.attacks.registry import register_attack
from ratioctl.recipe import Attack

_ALPHA = 0.75  # share of the new step against the momentum, Croce and Hein 2020


@register_attack("apgd", norms=("1", "2", "inf"))
def apgd(problem: Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Auto-PGD: Croce and Hein 2020, algorithm 1, with step 2 eps at first and momentum 0.75; l1 differs."""
    if problem.p == 1:
        return _apgd_l1(problem, x, attack)
    project = projection(problem)

    def move(x: Tensor, previous: Tensor | None, gradient: Tensor, size: Tensor) -> Tensor:
        z = project(torch.addcmul(x, geometry.steepest(gradient, problem.p), size))
        if previous is None:
            return z
        return project(x.mul(2 - 2 * _ALPHA).add_(z, alpha=_ALPHA).sub_(previous, alpha=1 - _ALPHA))

    return auto_ascent(problem, x, attack, (2 * problem.radius).float()[:, None], move)


def auto_ascent(
    problem: Problem,
    x: Tensor,
    attack: Attack,
    size: Tensor,  # (B, 1)
    move: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor],  # x, previous x, gradient, size -> new x
) -> tuple[Tensor, Tensor]:
    """Ascent whose step size halves itself: Croce and Hein 2020, section 3 and algorithm 1.

    At every checkpoint the examples halve their step and go back to their best point, with its gradient,
    where (1) fewer than 0.75 of the steps since the last checkpoint went up, or (2) the step was not halved
    at the last checkpoint and the best value has not risen since.
    """
    checkpoints = _checkpoints(attack.steps)
    value, gradient = problem.gradient_of(x, 0)
    best, best_value, best_gradient = x, value, gradient
    previous: Tensor | None = None
    rises, last_check = torch.zeros_like(value), 0
    value_at_check, halved = value, torch.ones_like(value, dtype=torch.bool)
    for step in range(1, attack.steps):
        x, previous = move(x, previous, gradient, size), x
        reached, gradient = problem.gradient_of(x, step)
        rises += reached > value
        value = reached
        better = value > best_value
        best = torch.where(better[:, None], x, best)
        best_gradient = torch.where(better[:, None], gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        if step in checkpoints:
            halved = (rises < 0.75 * (step - last_check)) | (~halved & (best_value <= value_at_check))
            size = torch.where(halved[:, None], size / 2, size)
            x = torch.where(halved[:, None], best, x)
            gradient = torch.where(halved[:, None], best_gradient, gradient)
            value = torch.where(halved, best_value, value)
            value_at_check, last_check = best_value, step
            rises.zero_()
    x = move(x, previous, gradient, size)
    return keep_better(best, best_value, x, problem.value_of(x, attack.steps))


def _checkpoints(steps: int) -> frozenset[int]:
    """w_j = ceil(p_j steps): p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    before, now, marks = 0, 22, []  # in hundredths, so that nothing is lost to rounding
    while now <= 100:
        marks.append(-(-now * steps // 100))
        before, now = now, now + max(now - before - 3, 6)
    return frozenset(marks)


def _apgd_l1(problem: Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Auto-PGD for the l1 ball with the box: Croce and Hein 2021, algorithm 1.

    A step changes the largest gradients only, at first a fifth of the pixels. Every 4 % of the steps their
    number becomes that of the best point's changed pixels over 1.5; where these became 5 % fewer, the step
    size is set back to eps and the search to the best point, elsewhere the step size falls by 1.5, at most
    to eps / 10.
    """
    n = x.shape[1]
    longest = problem.radius.float()[:, None]
    size = longest
    density = torch.full_like(x[:, 0], 0.2)
    changed = torch.full_like(density, float(n))
    window = max(attack.steps // 25, 1)
    best = best_value = best_gradient = None
    for step in range(attack.steps):
        value, gradient = problem.gradient_of(x, step)
        if best is None or best_value is None or best_gradient is None:
            best, best_value, best_gradient = x, value, gradient
        else:
            better = value > best_value
            best = torch.where(better[:, None], x, best)
            best_gradient = torch.where(better[:, None], gradient, best_gradient)
            best_value = torch.where(better, value, best_value)
        if step > 0 and step % window == 0:
            changed_now = (best != problem.x0).sum(1).float()
            sparser = (changed_now < 0.95 * changed)[:, None]
            density = changed_now / (1.5 * n)
            size = torch.where(sparser, longest, torch.maximum(size / 1.5, longest / 10))
            x = torch.where(sparser, best, x)
            gradient = torch.where(sparser, best_gradient, gradient)
            changed = changed_now
        z = torch.addcmul(x, geometry.steepest(gradient, 1, density), size)
        x = geometry.project_l1_box(problem.x0, z, problem.radius)
    assert best is not None
    assert best_value is not None
    return keep_better(best, best_value, x, problem.value_of(x, attack.steps))
