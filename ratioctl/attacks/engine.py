"""The attack engine: `perturb` searches the maximum of a goal over a ball.

The registered methods share candidates, restarts and bookkeeping. Internally, images are rows (B, n) in their
own memory order. Without `enough` no branch depends on a tensor's values, so nothing waits for the device. On
a CPU the network's passes are split among threads (`batch_parallel`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import batch_parallel
from ratioctl.attacks.balls import Generators
from ratioctl.attacks.goals import Goal
from ratioctl.attacks.problem import Problem, keep_better
from ratioctl.recipe import ATTACKS, Attack

Callback = Callable[[int, Tensor, Tensor], None]


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
    enough: float | None = None,
) -> Perturbed:
    """Maximize goal(logits_of(x)) over the ball around x0 and the box [0,1]; return the best point seen.

    A restart of T steps costs T forward and backward passes and one forward pass. The input itself is
    always a candidate, so `value` is never below the goal there; with `start = "random"` this costs one
    more forward pass.

    Args:
        logits_of: images (B, C, H, W) to logits (B, K); each example's logits must depend on that example
            alone (a network in eval mode). It may compute in bf16 under autocast; the search is in fp32. On
            a CPU with several threads it is called with parts of the batch, from several threads at once.
        x0: images (B, C, H, W), pixels in [0,1]; their memory format is kept.
        goal: logits (B, K) to values (B,), maximized; see `goals`.
        attack: method, steps, restarts and the ball.
        generator: source of random starts: one for the batch, one for a batch of which x0 is a part, or one
            per example (then an example's result does not depend on its companions). Not needed where
            nothing is random.
        eps: overrides the ball's radius, a float or one per example (B,); 0 returns the input. An explicit
            PGD step size shrinks and grows in proportion. Radii beyond the diameter of the box are cut to it.
        init: points (B, C, H, W) of the balls where the first restart begins instead of the input or a
            random point; they are candidates too. Costs one more forward pass.
        callback: called as callback(step, x, value) for the T+1 points of every restart; the next step may
            overwrite x.
        enough: examples whose value reaches it leave the network's passes; their best point stands. Waits
            for the device at every step.

    Raises:
        ValueError: random starts without a generator; radii of a wrong shape, negative or not finite.
    """
    if generator is None and (attack.start == "random" or attack.restarts > 1):
        raise ValueError("random starts need a generator")
    x0 = x0.detach().float()
    radius = _radii(attack.ball.eps if eps is None else eps, x0, attack.ball.p)
    if x0.shape[0] == 0:
        empty = torch.zeros(0, device=x0.device)
        return Perturbed(x=x0, value=empty, distance=empty, stuck=empty.bool())
    with torch.no_grad(), batch_parallel.one_each(x0.device) as count:
        passes = _Passes(batch_parallel.in_parts(logits_of, count), goal, enough)
        return _perturb(passes, x0, attack, generator, radius, init, callback)


class _Passes:
    """The network's passes and the goal, for the examples whose best value is still below `enough`.

    For an example that has left, the value is the one with which it left and the gradient is 0, so a search
    neither finds a better point nor loses its best one.
    """

    def __init__(
        self, logits_of: Callable[[Tensor], Tensor], goal: Goal, enough: float | None = None
    ) -> None:
        self.logits_of, self.goal, self.enough = logits_of, goal, enough
        self.best: Tensor | None = None  # (B,), the highest value of every example
        self.classes = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Values (B,) of images (B, C, H, W)."""
        if self.enough is None:
            return self.goal(self.logits_of(image)).float()
        if self.best is None:
            self.best = torch.full((len(image),), -torch.inf, device=image.device)
        left = self.best >= self.enough
        value = self.goal(self._logits(image, left)).float()
        value = torch.where(left, self.best, value)
        self.best = torch.maximum(self.best, value.detach().nan_to_num(nan=-torch.inf))
        return value

    def _logits(self, image: Tensor, left: Tensor) -> Tensor:
        """Logits (B, K), 0 for the examples that have left."""
        kept = left.logical_not().nonzero().squeeze(1)
        if len(kept) == len(image):
            logits = self.logits_of(image)
            self.classes = logits.shape[1]
            return logits
        if len(kept) == 0:
            return image.flatten(1)[:, :1].mul(0).expand(-1, self.classes)
        channels_last = image.is_contiguous(memory_format=torch.channels_last)
        part = image.index_select(0, kept)
        if channels_last:
            part = part.contiguous(memory_format=torch.channels_last)
        logits = self.logits_of(part)
        return logits.new_zeros((len(image), self.classes)).index_copy(0, kept, logits)


def _perturb(
    passes: _Passes,
    x0: Tensor,
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
        value = passes(image)
        if callback is not None and report:
            callback(step, image, value)
        return value

    def gradient_of(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        image = images(x).detach().requires_grad_()
        with torch.enable_grad():
            value = passes(image)
            gradient = rows(torch.autograd.grad(value.sum(), image)[0])
        value = value.detach()
        moved.logical_or_(gradient.abs().amax(1) > 0)
        if callback is not None:
            callback(step, image.detach(), value)
        return value, gradient

    problem = Problem(x0=rows(x0), radius=radius, p=p, value_of=value_of, gradient_of=gradient_of)
    search = ATTACKS.get(attack.method)
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
            best, value = keep_better(best, value, found, reached)
    assert best is not None
    assert value is not None
    x = images(best.clone())
    return Perturbed(x=x, value=value, distance=geometry.distance(x, x0, p), stuck=moved.logical_not())


def _radii(eps: Tensor | float, x0: Tensor, p: float) -> Tensor:
    """The radii (B,) fp64, at most the diameter of the box: steps are multiples of the radius.

    With a radius of 255 the steps of Auto-PGD never became small enough: the worst case of one SVHN image was
    1.000 at l2 80 and 0.307 at 255.
    """
    diameter = geometry.box_diameter(x0[0].numel() if len(x0) else 1, p)
    if not isinstance(eps, Tensor) and 0 <= eps <= diameter:  # as in training: no tensor's value is read
        return torch.full((len(x0),), float(eps), dtype=torch.float64, device=x0.device)
    radius = torch.as_tensor(eps, dtype=torch.float64)
    if radius.dim() > 1 or (radius.dim() == 1 and radius.shape[0] != x0.shape[0]):
        raise ValueError(f"eps has shape {tuple(radius.shape)} for {x0.shape[0]} examples")
    if not bool(((radius >= 0) & torch.isfinite(radius)).all()):
        raise ValueError("eps must be finite and not negative")
    if bool((radius > diameter * (1 + 1e-9)).any()):
        warn_of_units(float(radius.max()), p, diameter)
    return radius.clamp_max(diameter).to(x0.device).expand(x0.shape[0])


@functools.cache
def warn_of_units(eps: float, p: float, diameter: float) -> None:
    """Log, once per radius, that it is larger than the box."""
    logging.getLogger("ratioctl").warning(
        "Warning: the radius %g is larger than the whole l%g pixel box [0,1] (%.4g), which is searched "
        "instead. If it was meant in units of 0 to 255, divide it by 255.",
        eps,
        p,
        diameter,
    )


def _layout(x0: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Views between images (B, C, H, W) and rows (B, n) in the images' own memory order, without copies."""
    if x0.dim() == 4 and not x0.is_contiguous() and x0.is_contiguous(memory_format=torch.channels_last):
        b, c, h, w = x0.shape
        return (
            lambda image: image.permute(0, 2, 3, 1).reshape(b, -1),
            lambda row: row.view(b, h, w, c).permute(0, 3, 1, 2),
        )
    return lambda image: image.reshape(x0.shape[0], -1), lambda row: row.view(x0.shape)
