"""The one attack engine: `perturb` searches the maximum of a goal over a ball.

Momentum PGD, Auto-PGD and Auto-Frank-Wolfe share candidates, restarts and bookkeeping and differ only in
their step. Inside, images are rows (B, n) in their own memory order, and nothing waits for the device: no
branch looks at a tensor's values. On a CPU the network's passes are shared out among threads (`threads`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import batch_parallel
from ratioctl.attacks.balls import Generators
from ratioctl.attacks.goals import Goal
from ratioctl.recipe import Attack

Callback = Callable[[int, Tensor, Tensor], None]

_ALPHA = 0.75  # share of the new step against the momentum, Croce and Hein 2020
_TINY = 1e-30  # keeps 0 / 0 away


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturbed:
    """The best points an attack saw.

    Attributes:
        x: (B, C, H, W) fp32 in [0,1], inside the ball.
        value: (B,) the goal reached there.
        distance: (B,) from the input, in the ball's norm.
        stuck: (B,) true where every gradient was exactly zero, so nothing was searched.
    """

    x: Tensor
    value: Tensor
    distance: Tensor
    stuck: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """What a search works on: rows of images and the road from a point to its value and gradient."""

    x0: Tensor  # (B, n)
    radius: Tensor  # (B,) fp64
    p: float
    value_of: Callable[[Tensor, int], Tensor]  # points (B, n), step -> (B,)
    gradient_of: Callable[[Tensor, int], tuple[Tensor, Tensor]]  # the same, and the gradient (B, n)


Search = Callable[
    [_Problem, Tensor, Attack], tuple[Tensor, Tensor]
]  # problem, start -> best point, its value


def perturb(
    logits_of: Callable[[Tensor], Tensor],
    x0: Tensor,
    goal: Goal,
    attack: Attack,
    *,
    generator: Generators | None = None,
    eps: Tensor | float | None = None,
    init: Tensor | None = None,
    callback: Callback | None = None,
) -> Perturbed:
    """Maximise goal(logits_of(x)) over the ball around x0 and the box [0,1]; return the best point seen.

    A restart of T steps costs T forward and backward passes and one forward pass. The input itself is
    always a candidate, so `value` is never below the goal there; with `start = "random"` this costs one
    more forward pass.

    Args:
        logits_of: images (B, C, H, W) to logits (B, K); each example's logits must depend on that example
            alone (a network in eval mode). It may compute in bf16 under autocast; the search is in fp32. On
            a CPU with several threads it is called with parts of the batch, from several threads at once.
        x0: images (B, C, H, W), pixels in [0,1]; their memory format is kept.
        goal: logits (B, K) to values (B,), maximised; see `goals`.
        attack: method, steps, restarts and the ball.
        generator: source of random starts, one for the batch or one per example (then an example's
            result does not depend on its companions). Not needed where nothing is random.
        eps: overrides the ball's radius, a float or one per example (B,); 0 returns the input. An explicit
            PGD step size shrinks and grows in proportion.
        begin: points (B, C, H, W) of the balls where the first restart begins instead of the input or a
            random point; they are candidates too. Costs one more forward pass.
        watch: called as watch(step, x, value) for the T+1 points of every restart; x may be overwritten by
            the next step.

    Raises:
        ValueError: random starts without a generator; radii of a wrong shape, negative or not finite.
    """
    if generator is None and (attack.start == "random" or attack.restarts > 1):
        raise ValueError("random starts need a generator")
    x0 = x0.detach().float()
    radius = _radii(attack.ball.eps if eps is None else eps, x0)
    if x0.shape[0] == 0:
        empty = torch.zeros(0, device=x0.device)
        return Perturbed(x=x0, value=empty, distance=empty, stuck=empty.bool())
    with torch.no_grad(), batch_parallel.one_each(x0.device) as count:
        return _perturb(
            batch_parallel.in_parts(logits_of, count), x0, goal, attack, generator, radius, init, callback
        )


def _perturb(
    logits_of: Callable[[Tensor], Tensor],
    x0: Tensor,
    goal: Goal,
    attack: Attack,
    generator: Generators | None,
    radius: Tensor,
    init: Tensor | None,
    callback: Callback | None,
) -> Perturbed:
    p = attack.ball.p
    rows, images = _layout(x0)
    moved = torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device)

    def value_of(x: Tensor, step: int, report: bool = True) -> Tensor:
        image = images(x)
        value = goal(logits_of(image)).float()
        if callback is not None and report:
            callback(step, image, value)
        return value

    def gradient_of(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        image = images(x).detach().requires_grad_()
        with torch.enable_grad():
            value = goal(logits_of(image))
            gradient = rows(torch.autograd.grad(value.sum(), image)[0])
        value = value.detach().float()
        moved.logical_or_(gradient.abs().amax(1) > 0)
        if callback is not None:
            callback(step, image.detach(), value)
        return value, gradient

    problem = _Problem(x0=rows(x0), radius=radius, p=p, value_of=value_of, gradient_of=gradient_of)
    search = _METHODS[attack.method]
    best = value = None
    if attack.start == "random" or init is not None:
        best, value = problem.x0, value_of(problem.x0, 0, report=False)
    for restart in range(attack.restarts):
        if init is not None and restart == 0:
            start = rows(init.detach().float())
        elif generator is not None and (attack.start == "random" or restart > 0):
            start = rows(geometry.random_start(x0, p, radius, generator))
        else:
            start = problem.x0
        found, reached = search(problem, start, attack)
        if best is None or value is None:
            best, value = found, reached
        else:
            best, value = _better(best, value, found, reached)
    assert best is not None
    assert value is not None
    x = images(best.clone())
    return Perturbed(x=x, value=value, distance=geometry.distance(x, x0, p), stuck=moved.logical_not())


def _radii(eps: Tensor | float, x0: Tensor) -> Tensor:
    """The radii (B,) fp64."""
    radius = torch.as_tensor(eps, dtype=torch.float64)
    if radius.dim() > 1 or (radius.dim() == 1 and radius.shape[0] != x0.shape[0]):
        raise ValueError(f"eps has shape {tuple(radius.shape)} for {x0.shape[0]} examples")
    if not bool(((radius >= 0) & torch.isfinite(radius)).all()):
        raise ValueError("eps must be finite and not negative")
    return radius.to(x0.device).expand(x0.shape[0])


def _layout(x0: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Views between images (B, C, H, W) and rows (B, n) in the images' own memory order, without copies."""
    if x0.dim() == 4 and not x0.is_contiguous() and x0.is_contiguous(memory_format=torch.channels_last):
        b, c, h, w = x0.shape
        return (
            lambda image: image.permute(0, 2, 3, 1).reshape(b, -1),
            lambda row: row.view(b, h, w, c).permute(0, 3, 1, 2),
        )
    return lambda image: image.reshape(x0.shape[0], -1), lambda row: row.view(x0.shape)


def _better(best: Tensor, value: Tensor, x: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """Per example the point with the larger value; ties and NaN keep the earlier one."""
    better = reached > value
    return torch.where(better[:, None], x, best), torch.where(better, reached, value)


def _pgd(problem: _Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent with momentum (Augustin, Meinke, Hein 2020, appendix B.1).

    v <- momentum v + g / ||g||_1; then a step along v, of a fixed length in the ball's norm; then the
    projection onto the ball and the box. The paper has no l1: here a step changes a fifth of the pixels at
    first, shrinking geometrically to a single one at half the steps (what is left suffices to carry the
    whole budget there), and only pixels that are not at the end of the box already.
    """
    p = problem.p
    relative = 2.5 / attack.steps if attack.step_size is None else attack.step_size / attack.ball.eps
    length = (problem.radius * relative).float()[:, None]
    project = _projection(problem)
    velocity = torch.zeros_like(x)
    best = value = None
    for step in range(attack.steps):
        reached, gradient = problem.gradient_of(x, step)
        if best is None or value is None:
            best, value = x, reached
        else:
            best, value = _better(best, value, x, reached)
        gradient = gradient / gradient.abs().sum(1, keepdim=True).clamp_min_(_TINY)
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
    return _better(best, value, x, problem.value_of(x, attack.steps))


def _apgd(problem: _Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Auto-PGD: Croce and Hein 2020, algorithm 1, with step 2 eps at first and momentum 0.75; l1 differs."""
    if problem.p == 1:
        return _apgd_l1(problem, x, attack)
    project = _projection(problem)

    def move(x: Tensor, previous: Tensor | None, gradient: Tensor, size: Tensor) -> Tensor:
        z = project(torch.addcmul(x, geometry.steepest(gradient, problem.p), size))
        if previous is None:
            return z
        return project(x.mul(2 - 2 * _ALPHA).add_(z, alpha=_ALPHA).sub_(previous, alpha=1 - _ALPHA))

    return _auto(problem, x, attack, (2 * problem.radius).float()[:, None], move)


def _afw(problem: _Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Auto-Frank-Wolfe (Boreiko et al. 2022): towards the linear maximiser over ball and box.

    x <- x + size (s - x), with size 0.75 at first, halved as in Auto-PGD. Where the gradient is zero the
    linear maximiser says nothing and x stays.
    """

    def move(x: Tensor, previous: Tensor | None, gradient: Tensor, size: Tensor) -> Tensor:
        corner = geometry.linear_maximiser(gradient, problem.x0, problem.p, problem.radius)
        sighted = gradient.abs().amax(1, keepdim=True) > 0
        return torch.addcmul(x, torch.where(sighted, corner - x, 0), size)

    return _auto(problem, x, attack, torch.full_like(x[:, :1], 0.75), move)


def _auto(
    problem: _Problem,
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
    return _better(best, best_value, x, problem.value_of(x, attack.steps))


def _checkpoints(steps: int) -> frozenset[int]:
    """w_j = ceil(p_j steps): p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    before, now, marks = 0, 22, []  # in hundredths, so that nothing is lost to rounding
    while now <= 100:
        marks.append(-(-now * steps // 100))
        before, now = now, now + max(now - before - 3, 6)
    return frozenset(marks)


def _apgd_l1(problem: _Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
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
    return _better(best, best_value, x, problem.value_of(x, attack.steps))


def _projection(problem: _Problem) -> Callable[[Tensor], Tensor]:
    """`ball.project` with its constants worked out once; it may overwrite its argument."""
    x0, p = problem.x0, problem.p
    inner = geometry.inner_radius(problem.radius, x0, p)[:, None]
    if math.isinf(p):
        low, high = (x0 - inner).clamp_(0, 1), (x0 + inner).clamp_(0, 1)
        return lambda z: torch.minimum(torch.maximum(z, low, out=z), high, out=z)
    if p == 1:
        return lambda z: geometry.project_l1_box(x0, z, problem.radius)

    def onto_l2(z: Tensor) -> Tensor:
        d = z.sub_(x0)
        scale = inner / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min_(_TINY)
        return d.mul_(scale.clamp_max_(1)).add_(x0).clamp_(0, 1)

    return onto_l2


_METHODS: dict[str, Search] = {"pgd": _pgd, "apgd": _apgd, "afw": _afw}
