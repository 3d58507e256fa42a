"""What an attack method works on, and the geometry that methods share. Images are rows (B, n)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry

TINY = 1e-30  # avoids 0 / 0; far below any norm of an fp32 gradient that is not zero


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One search: centres and radii, and the functions from a point to its value and gradient."""

    x0: Tensor  # (B, n)
    radius: Tensor  # (B,) fp64
    p: float
    value_of: Callable[[Tensor, int], Tensor]  # points (B, n), step -> (B,)
    gradient_of: Callable[[Tensor, int], tuple[Tensor, Tensor]]  # the same, and the gradient (B, n)


def keep_better(best: Tensor, value: Tensor, x: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """Per example the point with the larger value; ties and NaN keep the earlier one."""
    better = reached > value
    return torch.where(better[:, None], x, best), torch.where(better, reached, value)


def projection(problem: Problem) -> Callable[[Tensor], Tensor]:
    """`balls.project` with its constants computed once; it may overwrite its argument."""
    x0, p = problem.x0, problem.p
    inner = geometry.inner_radius(problem.radius, x0, p)[:, None]
    if math.isinf(p):
        low, high = (x0 - inner).clamp_(0, 1), (x0 + inner).clamp_(0, 1)
        return lambda z: torch.minimum(torch.maximum(z, low, out=z), high, out=z)
    if p == 1:
        return lambda z: geometry.project_l1_box(x0, z, problem.radius)

    def onto_l2(z: Tensor) -> Tensor:
        d = z.sub_(x0)
        scale = inner / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min_(TINY)
        return d.mul_(scale.clamp_max_(1)).add_(x0).clamp_(0, 1)

    return onto_l2
