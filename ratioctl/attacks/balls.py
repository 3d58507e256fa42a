"""Geometry of the threat model {z : ||z - x0||_p <= eps} with the pixel box [0,1], as free functions.

Everything takes batches (B, ...) of centres `x0` with pixels in [0,1] and a radius `eps`, a float or one per
example (B,). Points returned are feasible as fp32 numbers: rounding x0 + d moves a point by up to 3e-8 a
pixel, so radii are shortened by `inner_radius` before use, a millionth or so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ratioctl.utils.shares import PartOfBatch

Generators = torch.Generator | PartOfBatch | Sequence[torch.Generator]

_TINY = 1e-30  # keeps 0 / 0 away; far below any norm of an fp32 gradient that is not zero


def box_diameter(n: int, p: float) -> float:
    """The l_p diameter n^(1/p) of the box [0,1]^n: a ball this large around any image holds all images."""
    return float(n ** (1 / p))


def into_ball(x0: Tensor, z: Tensor, p: float, eps: float) -> Tensor:
    """Points z of the box moved into the ball around x0: clipped for linf, else scaled towards x0."""
    radius = _rows(inner_radius(eps, x0, p), z)
    if math.isinf(p):
        return torch.minimum(torch.maximum(z, x0 - radius), x0 + radius).clamp_(0, 1)
    length = _rows(torch.linalg.vector_norm((z - x0).flatten(1), ord=p, dim=1), z)
    return torch.lerp(x0, z, (radius / length.clamp_min(_TINY)).clamp_max(1)).clamp_(0, 1)


def distance(x: Tensor, x0: Tensor, p: float) -> Tensor:
    """||x - x0||_p of each example, (B,) fp32; summed in fp64."""
    d = (x.double() - x0.double()).flatten(1)
    return torch.linalg.vector_norm(d, ord=p, dim=1).float()


def inner_radius(eps: float | Tensor, x0: Tensor, p: float) -> Tensor:
    """The radius (B,) fp32 that leaves room for rounding x0 + d to fp32; 0 stays 0.

    Errors of a pixel are independent, at most 3e-8 each: in the norm they add up to about that times
    n^(1/p - 1/2) for n pixels, to at most 3e-8 for p = inf.
    """
    n = x0[0].numel() if x0.shape[0] else 1
    slack = 4e-8 if math.isinf(p) else 1e-7 * n ** (1 / p - 0.5)
    radius = torch.as_tensor(eps, dtype=torch.float64, device=x0.device).expand(x0.shape[0])
    return (radius * (1 - 1e-6) - slack).clamp_min(0).float()


def project(x0: Tensor, z: Tensor, p: float, eps: float | Tensor) -> Tensor:
    """argmin_u ||u - z||_2 subject to ||u - x0||_p <= eps, then clipped to [0,1]; p in {1, 2, inf}.

    Exact for the ball. For p = inf the clipped point is the exact projection onto ball and box together;
    for p = 1 and 2 it is feasible for both (clipping only moves towards x0) but not always the nearest
    such point: `project_l1_box` is, for p = 1. Points already feasible are returned as they are.

    Raises:
        ValueError: p = 1.5, whose projection has no closed form.
    """
    radius = _rows(inner_radius(eps, x0, p), z)
    if math.isinf(p):
        return torch.minimum(torch.maximum(z, x0 - radius), x0 + radius).clamp_(0, 1)
    d = z - x0
    if p == 2:
        norm = _rows(torch.linalg.vector_norm(d.flatten(1), dim=1), z)
        scale = radius / norm.clamp_min(_TINY)
        return torch.where(scale < 1, d.mul_(scale).add_(x0), z).clamp_(0, 1)
    if p == 1:
        size = d.abs().flatten(1)
        threshold = _l1_threshold(size, None, radius.flatten())
        shrunk = d.sign() * (d.abs() - _rows(threshold, z)).clamp_min(0)
        return torch.where(_rows(threshold, z) > 0, x0 + shrunk, z).clamp_(0, 1)
    raise ValueError(f"p = {p:g} has no closed-form projection")


def project_l1_box(x0: Tensor, z: Tensor, eps: float | Tensor) -> Tensor:
    """argmin_u ||u - z||_2 subject to ||u - x0||_1 <= eps and 0 <= u <= 1, exact (Croce and Hein 2021)."""
    d = z - x0
    room = torch.where(d > 0, 1 - x0, x0)
    size = d.abs()
    threshold = _rows(_l1_threshold(size.flatten(1), room.flatten(1), inner_radius(eps, x0, 1)), z)
    shrunk = torch.minimum((size - threshold).clamp_min_(0), room)
    return torch.where(threshold > 0, x0 + d.sign() * shrunk, z).clamp_(0, 1)


def steepest(grad: Tensor, p: float, density: float | Tensor = 0.05) -> Tensor:
    """A direction of unit p-norm that increases <grad, d> most; 0 where the gradient is 0.

    l2: grad / ||grad||_2; linf: sign(grad). For l1 the maximizer is a single pixel, which needs far too
    many steps; as in Croce and Hein 2021, the signs of the largest `density` share of the entries (float
    or (B,)), scaled to unit l1 norm.
    """
    if math.isinf(p):
        return grad.sign()
    flat = grad.flatten(1)
    if p == 2:
        return grad / _rows(torch.linalg.vector_norm(flat, dim=1).clamp_min(_TINY), grad)
    if p == 1:
        n = flat.shape[1]
        keep = torch.as_tensor(density, device=grad.device).mul(n).long().clamp(1, n).expand(flat.shape[0])
        size = flat.abs()
        least = size.sort(1, descending=True).values.gather(1, keep[:, None] - 1)
        sparse = flat.sign() * (size >= least)
        return (sparse / sparse.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)
    raise ValueError(f"p = {p:g} has no steepest direction here; use the linear maximizer")


def linear_maximizer(grad: Tensor, x0: Tensor, p: float, eps: float | Tensor) -> Tensor:
    """argmax_u <grad, u> subject to ||u - x0||_p <= eps and 0 <= u <= 1, exact, p in {1, 1.5, 2, inf}.

    With room m_i towards the box in the direction of grad_i: linf takes min(eps, m_i); l1 fills the
    largest gradients up to m_i until eps is spent; otherwise the optimality conditions give
    d_i = min(m_i, t |grad_i|^(1/(p-1))), and t solves sum_i d_i^p = eps^p: sorting the points where
    pixels saturate makes that one linear equation in t^p (Boreiko et al. 2022, appendix A). A pixel with
    zero gradient stays at x0.
    """
    radius = inner_radius(eps, x0, p).double()[:, None]
    g = grad.flatten(1).double()
    size = g.abs() / g.abs().amax(1, keepdim=True).clamp_min(_TINY)
    centre = x0.flatten(1).double()
    room = torch.where(g > 0, 1 - centre, centre)
    if math.isinf(p):
        d = torch.minimum(room, radius)
    elif p == 1:
        order = size.argsort(1, descending=True)
        sorted_room = room.gather(1, order)
        spent_before = sorted_room.cumsum(1) - sorted_room
        filled = torch.minimum(sorted_room, (radius - spent_before).clamp_min(0))
        d = torch.empty_like(room).scatter_(1, order, filled)
    else:
        weight = size ** (1 / (p - 1))
        d = torch.minimum(room, weight * _saturation_scale(weight, room, radius, p))
    d = d * g.sign()
    return (centre + d).float().clamp_(0, 1).view_as(x0)


def random_start(x0: Tensor, p: float, eps: float | Tensor, generator: Generators) -> Tensor:
    """A random point of the ball, clipped to [0,1].

    Uniform in the ball before clipping for p = 1, 2, inf; for p = 1.5 a normal direction with the radius
    of a uniform point. With a sequence of generators, one per example, each example's numbers come from its
    own generator alone. Drawn in NCHW order, on the generator's device.
    """
    noise = _draw(x0, p, generator)
    radius = _rows(inner_radius(eps, x0, p), x0)
    return (x0 + radius * noise).clamp_(0, 1)


def _draw(x0: Tensor, p: float, generator: Generators) -> Tensor:
    """Random vectors of p-norm at most 1, shaped as x0."""
    if isinstance(generator, torch.Generator):
        return _unit_ball(x0.shape, p, generator).to(x0.device)
    if isinstance(generator, PartOfBatch):
        whole = _unit_ball((generator.count, *x0.shape[1:]), p, generator.generator)
        return whole[generator.rows].to(x0.device)
    if len(generator) != x0.shape[0]:
        raise ValueError(f"{len(generator)} generators for {x0.shape[0]} examples")
    rows = [_unit_ball((1, *x0.shape[1:]), p, g).to(x0.device) for g in generator]
    return torch.cat(rows) if rows else torch.zeros_like(x0)


def _unit_ball(shape: Sequence[int], p: float, generator: torch.Generator) -> Tensor:
    device = generator.device
    if math.isinf(p):
        return torch.rand(shape, generator=generator, device=device) * 2 - 1
    raw = torch.randn(shape, generator=generator, device=device)
    if p == 1:  # signed exponentials, normalized, are uniform on the l1 sphere
        size = torch.rand(shape, generator=generator, device=device).clamp_min(1e-12).log().neg()
        raw = raw.sign() * size
    flat = raw.flatten(1)
    radius = torch.rand((shape[0], 1), generator=generator, device=device) ** (1 / max(flat.shape[1], 1))
    norm = torch.linalg.vector_norm(flat, ord=p, dim=1, keepdim=True).clamp_min(_TINY)
    return (flat * (radius / norm)).view(shape)


def _rows(per_example: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast over (B, ...)."""
    return per_example.view(-1, *(1,) * (like.dim() - 1))


def _l1_threshold(size: Tensor, room: Tensor | None, radius: Tensor) -> Tensor:
    """The least t >= 0 (B,) with sum_i clip(size_i - t, 0, room_i) <= radius, exact up to fp64.

    The sum falls piecewise linearly in t; its slope changes by one at every size_i (a pixel starts to move)
    and back at every size_i - room_i (it reaches the box).
    """
    size = size.double()
    breaks, turns = size, torch.ones_like(size)
    if room is not None:
        breaks = torch.cat((size, size - room.double()), dim=1)
        turns = torch.cat((turns, -turns), dim=1)
    breaks, order = breaks.sort(1, descending=True)
    slope = turns.gather(1, order).cumsum(1)  # pixels moving just below breaks[k]
    sums = torch.zeros_like(breaks)
    sums[:, 1:] = (slope[:, :-1] * (breaks[:, :-1] - breaks[:, 1:])).cumsum(1)  # the sum at t = breaks[k]
    target = radius.double()[:, None]
    last = (torch.searchsorted(sums, target, right=True) - 1).clamp_min(0)  # largest k with sum <= radius
    slope_there = slope.gather(1, last).clamp_min(1)
    t = breaks.gather(1, last) - (target - sums.gather(1, last)) / slope_there
    return t.clamp_min(0).squeeze(1).float()


def _saturation_scale(weight: Tensor, room: Tensor, radius: Tensor, p: float) -> Tensor:
    """t (B, 1) with sum_i min(room_i, t weight_i)^p = radius^p; where even the whole box fits, a large t."""
    ratio = torch.where(weight > 0, room / weight.clamp_min(_TINY), torch.inf)
    ratio, order = ratio.sort(1)
    weight_p = weight.gather(1, order) ** p
    room_p = torch.where(torch.isinf(ratio), 0.0, room.gather(1, order) ** p)
    filled_before = room_p.cumsum(1) - room_p
    free = weight_p.flip(1).cumsum(1).flip(1)  # of this pixel and all later ones
    target = radius**p
    at_break = filled_before + torch.where(free > 0, ratio**p * free, torch.inf)
    first = (at_break < target).sum(1, keepdim=True).clamp_max(ratio.shape[1] - 1)
    left = (target - filled_before.gather(1, first)).clamp_min(0)
    return (left / free.gather(1, first).clamp_min(_TINY)) ** (1 / p)
