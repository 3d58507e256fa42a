"""The one attack engine: `perturb` searches the maximum of a goal over a ball, by PGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attack import ball as geometry
from ratioctl.attack.ball import Generators
from ratioctl.attack.goals import Goal
from ratioctl.recipe import Attack

Watch = Callable[[int, Tensor, Tensor], None]


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


@dataclass(kw_only=True, eq=False)
class _Run:
    """One restart: `gradient(x, step)` evaluates the goal and keeps the best point seen so far."""

    x0: Tensor  # (B, n), in the memory order of the images
    radius: Tensor  # (B, 1)
    evaluate: Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
    best: Tensor  # (B, n)
    value: Tensor  # (B,), of `best`
    moved: Tensor  # (B,) bool: some gradient was not zero


def perturb(
    logits_of: Callable[[Tensor], Tensor],
    x0: Tensor,
    goal: Goal,
    attack: Attack,
    *,
    generator: Generators | None = None,
    eps: Tensor | float | None = None,
    watch: Watch | None = None,
) -> Perturbed:
    """Maximise goal(logits_of(x)) over the ball around x0 and the box [0,1]; return the best point seen.

    A restart of T steps costs T forward and backward passes and one forward pass. The input itself is
    always a candidate, so `value` is never below the goal there; with `start = "random"` this costs one
    more forward pass.

    Args:
        logits_of: images (B, C, H, W) to logits (B, K); each example's logits must depend on that example
            alone (a network in eval mode). It may compute in bf16 under autocast; the search is in fp32.
        x0: images (B, C, H, W), pixels in [0,1]; their memory format is kept.
        goal: logits (B, K) to values (B,), maximised; see `goals`.
        attack: method, steps, restarts and the ball.
        generator: source of random starts, one for the batch or one per example (then an example's
            result does not depend on its companions).
        eps: overrides the ball's radius, a float or one per example (B,); 0 returns the input. An explicit
            PGD step size shrinks and grows in proportion.
        watch: called as watch(step, x, value) for the T+1 points of every restart; x is overwritten by
            the next step.

    Raises:
        ValueError: random starts without a generator, radii of a wrong shape.
    """
    if x0.shape[0] == 0:
        empty = torch.zeros(0, device=x0.device)
        return Perturbed(x=x0.detach().float(), value=empty, distance=empty, stuck=empty.bool())
    if generator is None and (attack.start == "random" or attack.restarts > 1):
        raise ValueError("random starts need a generator")
    p = attack.ball.p
    x0 = x0.detach().float()
    radius = torch.as_tensor(attack.ball.eps if eps is None else eps, dtype=torch.float64, device=x0.device)
    if radius.dim() > 1 or (radius.dim() == 1 and radius.shape[0] != x0.shape[0]):
        raise ValueError(f"eps has shape {tuple(radius.shape)} for {x0.shape[0]} examples")
    radius = radius.expand(x0.shape[0])
    flat, shaped = _layout(x0)

    def evaluate(x: Tensor, step: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        image = shaped(x).detach()
        with torch.set_grad_enabled(with_gradient):
            image.requires_grad_(with_gradient)
            value = goal(logits_of(image))
            gradient = torch.autograd.grad(value.sum(), image)[0] if with_gradient else None
        if watch is not None:
            watch(step, image.detach(), value.detach())
        return value.detach().float(), None if gradient is None else flat(gradient)

    run = _Run(
        x0=flat(x0),
        radius=radius,
        evaluate=evaluate,
        best=flat(x0).clone(),
        value=torch.full((x0.shape[0],), -torch.inf, device=x0.device),
        moved=torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device),
    )
    with torch.no_grad():
        if attack.start == "random":
            run.value, _ = evaluate(run.x0, 0, False)
        for restart in range(attack.restarts):
            start = run.x0.clone()
            if generator is not None and (attack.start == "random" or restart > 0):
                start = flat(geometry.random_start(x0, p, radius, generator)).clone()
            _pgd(run, start, attack)
        x = shaped(run.best)
        return Perturbed(
            x=x, value=run.value, distance=geometry.distance(x, x0, p), stuck=run.moved.logical_not()
        )


def _layout(x0: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Views between images (B, C, H, W) and rows (B, n) in the images' own memory order, without copies."""
    if x0.dim() == 4 and not x0.is_contiguous() and x0.is_contiguous(memory_format=torch.channels_last):
        b, c, h, w = x0.shape
        return (
            lambda image: image.permute(0, 2, 3, 1).reshape(b, -1),
            lambda rows: rows.view(b, h, w, c).permute(0, 3, 1, 2),
        )
    return lambda image: image.reshape(x0.shape[0], -1), lambda rows: rows.view(x0.shape)


def _keep_best(run: _Run, x: Tensor, value: Tensor) -> Tensor:
    """Record the examples that improved; (B,) bool."""
    better = value > run.value
    torch.where(better[:, None], x, run.best, out=run.best)
    torch.where(better, value, run.value, out=run.value)
    return better


def _step(run: _Run, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    value, gradient = run.evaluate(x, step, True)
    assert gradient is not None
    run.moved |= gradient.abs().amax(1) > 0
    return value, gradient


def _pgd(run: _Run, x: Tensor, attack: Attack) -> None:
    """Projected gradient ascent with momentum (Augustin, Meinke, Hein 2020, appendix B.1).

    v <- momentum v + g / ||g||_1, then a step along v in the ball's norm, projected.
    """
    p = attack.ball.p
    if attack.step_size is None:
        length = run.radius * (2.5 / attack.steps)
    else:
        length = run.radius * (attack.step_size / attack.ball.eps)
    length = length.float()[:, None]
    inner = geometry.inner_radius(run.radius, run.x0, p)[:, None]
    low, high = (run.x0 - inner).clamp_(0, 1), (run.x0 + inner).clamp_(0, 1)
    velocity = torch.zeros_like(x)
    for step in range(attack.steps):
        value, gradient = _step(run, x, step)
        _keep_best(run, x, value)
        gradient = gradient / gradient.abs().sum(1, keepdim=True).clamp_min_(1e-30)
        velocity.mul_(attack.momentum).add_(gradient)
        x.add_(geometry.steepest(velocity, p).mul_(length))
        if math.isinf(p):
            torch.minimum(torch.maximum(x, low, out=x), high, out=x)
        elif p == 2:
            _project_l2_(x, run.x0, inner)
        else:
            x.copy_(geometry.project_l1_box(run.x0, x, run.radius))
    value, _ = run.evaluate(x, attack.steps, False)
    _keep_best(run, x, value)


def _project_l2_(x: Tensor, x0: Tensor, inner: Tensor) -> None:
    """`ball.project` for p = 2 on rows, in place."""
    d = x.sub_(x0)
    scale = inner / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min_(1e-30)
    d.mul_(scale.clamp_max_(1)).add_(x0).clamp_(0, 1)
