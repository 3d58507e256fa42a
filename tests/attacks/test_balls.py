"""Geometry of ball and box, as properties over random centres, points, radii and norms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ratioctl.attacks import balls as ball

INF = math.inf
seeds = st.integers(0, 2**31)
projected = st.sampled_from([1.0, 2.0, INF])
norms = st.sampled_from([1.0, 1.5, 2.0, INF])
radii = st.sampled_from([0.0, 1e-3, 8 / 255, 0.5, 1.0, 3.0, 60.0])
fast = settings(max_examples=40, deadline=None)


def _case(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Centres with pixels on the box's faces, and points far and near; (5, 3, 4, 4) each."""
    generator = torch.Generator().manual_seed(seed)
    x0 = (torch.rand(5, 3, 4, 4, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return x0, x0 + spread * torch.randn(x0.shape, generator=generator)


def _excess(x: Tensor, x0: Tensor, p: float, eps: float) -> float:
    """How far x leaves ball or box, in fp64; at most 0 for feasible points."""
    size = torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), ord=p, dim=1)
    return max((size - eps).max().item(), -x.min().item(), x.max().item() - 1)


@fast
@given(seeds, projected, radii)
def test_projection_is_feasible_and_idempotent(seed: int, p: float, eps: float) -> None:
    x0, z = _case(seed)
    x = ball.project(x0, z.clone(), p, eps)
    assert _excess(x, x0, p, eps) <= 0
    torch.testing.assert_close(ball.project(x0, x.clone(), p, eps), x, atol=2e-6, rtol=0)
    if p == 1:
        x = ball.project_l1_box(x0, z, eps)
        assert _excess(x, x0, p, eps) <= 0
        torch.testing.assert_close(ball.project_l1_box(x0, x, eps), x, atol=2e-6, rtol=0)


@fast
@given(seeds, projected)
def test_points_inside_stay_exactly(seed: int, p: float) -> None:
    x0, z = _case(seed, 0.05)
    z = z.clamp(0, 1)
    eps = 1.001 * ball.distance(z, x0, p) + 1e-5
    assert torch.equal(ball.project(x0, z.clone(), p, eps), z)
    if p == 1:
        assert torch.equal(ball.project_l1_box(x0, z, eps), z)


@fast
@given(seeds, projected, st.sampled_from([0.03, 0.5, 2.0]))
def test_nothing_feasible_is_closer_where_the_projection_is_exact(seed: int, p: float, eps: float) -> None:
    """The nearest point u of a convex set: <z - u, v - u> <= 0 for all its v, so for the maximizing v."""
    x0, z = _case(seed)
    if p == INF:
        nearest, box = ball.project(x0, z.clone(), p, eps), True
    elif p == 1:
        nearest, box = ball.project_l1_box(x0, z, eps), True
    else:  # the ball alone: centre far from the box's faces, so the box cuts nothing
        x0, z = torch.full_like(x0, 0.5), 0.5 + 0.1 * (z - x0)
        eps = min(eps, 0.45)
        nearest, box = ball.project(x0, z.clone(), p, eps), False
    outward = (z - nearest).flatten(1)
    best = ball.linear_maximizer(outward.view_as(x0), x0, p, eps)
    gain = (outward * (best - nearest).flatten(1)).sum(1)
    assert gain.max().item() < 1e-4
    others = ball.random_start(x0, p, eps, torch.Generator().manual_seed(seed + 1))
    assert (ball.distance(nearest, z, 2) <= ball.distance(others, z, 2) + 1e-5).all()
    assert box or _excess(nearest, x0, p, eps) <= 0


@fast
@given(seeds, norms, radii)
def test_linear_maximizer_is_feasible_and_beats_feasible_points(seed: int, p: float, eps: float) -> None:
    x0, z = _case(seed)
    gradient = z - x0
    gradient[0] *= 1e-20
    gradient[1, 0] = 0
    best = ball.linear_maximizer(gradient, x0, p, eps)
    assert _excess(best, x0, p, eps) <= 0

    def gain(x: Tensor) -> Tensor:
        return ((x - x0) * gradient).flatten(1).sum(1) / gradient.flatten(1).norm(dim=1)

    others = [ball.random_start(x0, p, eps, torch.Generator().manual_seed(seed + k)) for k in range(5)]
    if p != 1.5:
        others.append(ball.project(x0, x0 + eps * gradient.sign(), p, eps))
        others.append(ball.project(x0, x0 + eps * gradient, p, eps))
    nudged = best + 0.1 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed + 9))
    inside = nudged.clamp(0, 1) - x0  # the best point, disturbed and scaled back into the ball
    size = torch.linalg.vector_norm(inside.flatten(1), ord=p, dim=1).clamp_min(1e-12)
    others.append(x0 + inside * (0.9999 * eps / size).clamp_max(1)[:, None, None, None])
    for x in others:
        assert (gain(best) >= gain(x) - 1e-5).all()


@pytest.mark.parametrize("p", [1.5, 2.0])
def test_linear_maximizer_solves_its_optimality_conditions(p: float) -> None:
    """Unsaturated pixels all have d^(p-1) / |g| = c; saturated ones would want to go further."""
    x0, z = _case(3)
    gradient = z - x0
    eps = 1.3
    d = (ball.linear_maximizer(gradient, x0, p, eps) - x0) * gradient.sign()
    room = torch.where(gradient > 0, 1 - x0, x0)
    want = gradient.abs() ** (1 / (p - 1))
    free = (d < room - 1e-4) & (want > 1e-2)
    for k in range(5):
        ratios = (d / want)[k][free[k]]
        assert ratios.numel() > 5
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), atol=1e-5, rtol=1e-3)
        saturated = ~free[k] & (want[k] > 1e-2)
        assert ((room / want)[k][saturated] <= ratios.mean() * 1.001).all()
    assert ball.distance(x0 + d, x0, p).min().item() == pytest.approx(eps, rel=1e-5)


def test_the_l1_maximizer_fills_the_largest_gradients() -> None:
    x0 = torch.tensor([[0.9, 0.5, 0.5, 0.2]])
    gradient = torch.tensor([[4.0, 1.0, 3.0, -2.0]])
    best = ball.linear_maximizer(gradient, x0, 1, 0.7)
    torch.testing.assert_close(best, torch.tensor([[1.0, 0.5, 1.0, 0.1]]), atol=1e-5, rtol=0)


def test_a_ball_larger_than_the_box_leaves_the_corner() -> None:
    x0, z = _case(5)
    gradient = z - x0
    for p in (1.0, 1.5, 2.0, INF):
        best = ball.linear_maximizer(gradient, x0, p, 1000.0)
        assert torch.equal(best, (gradient > 0).float())


@fast
@given(seeds, norms, radii)
def test_random_starts_are_feasible_and_belong_to_their_generator(seed: int, p: float, eps: float) -> None:
    x0, _ = _case(seed)

    def generators(order: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + k) for k in order]

    order = [3, 1, 4, 0, 2]
    whole = ball.random_start(x0, p, eps, generators([0, 1, 2, 3, 4]))
    assert _excess(whole, x0, p, eps) <= 0
    assert torch.equal(ball.random_start(x0[order], p, eps, generators(order)), whole[order])
    if eps == 0:
        assert torch.equal(whole, x0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, INF])
def test_random_starts_fill_the_ball(p: float) -> None:
    """Away from the box their norm is near eps (almost all of a 48-dimensional ball is), never above."""
    x0 = torch.full((500, 3, 4, 4), 0.5)
    x = ball.random_start(x0, p, 0.2, torch.Generator().manual_seed(0))
    size = ball.distance(x, x0, p)
    assert size.max().item() <= 0.2
    assert 0.19 < size.mean().item() < 0.2
    assert (x - x0).mean().abs().item() < 1e-3
    assert size.std().item() > 1e-4


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_steepest_has_unit_norm_and_points_upwards(p: float) -> None:
    x0, z = _case(1)
    gradient = z - x0
    gradient[2] = 0
    direction = ball.steepest(gradient, p)
    size = torch.linalg.vector_norm(direction.flatten(1), ord=p, dim=1)
    torch.testing.assert_close(size, torch.tensor([1.0, 1, 0, 1, 1]))
    gain = (direction * gradient).flatten(1).sum(1)
    dual = {1.0: INF, 2.0: 2.0, INF: 1.0}[p]
    bound = torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1)
    assert (gain <= bound * 1.00001).all()
    if p != 1:
        torch.testing.assert_close(gain, bound)


def test_the_sparse_l1_direction_takes_the_largest_entries() -> None:
    gradient = torch.tensor([[1.0, -5.0, 2.0, 0.5], [3.0, 1.0, -2.0, 4.0]])
    half = ball.steepest(gradient, 1, 0.5)
    torch.testing.assert_close(half, torch.tensor([[0, -0.5, 0.5, 0], [0.5, 0, 0, 0.5]]))
    single = ball.steepest(gradient, 1, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(single, torch.tensor([[0, -1.0, 0, 0], [0.5, 0, 0, 0.5]]))


def test_radii_may_differ_between_examples() -> None:
    x0, z = _case(2)
    eps = torch.tensor([0.0, 0.1, 0.5, 1.0, 100.0])
    for p in (1.0, 2.0, INF):
        together = ball.project(x0, z.clone(), p, eps)
        for k in range(5):
            alone = ball.project(x0[k : k + 1], z[k : k + 1].clone(), p, eps[k].item())
            torch.testing.assert_close(together[k : k + 1], alone, atol=1e-7, rtol=0)
        assert torch.equal(together[0], x0[0])


def test_feasible_on_large_images() -> None:
    """Rounding errors of 150,528 pixels do not push a point out of the ball."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(1, 3, 224, 224, generator=generator)
    z = x0 + torch.randn(x0.shape, generator=generator)
    for p, eps in ((1.0, 40.0), (2.0, 0.05), (2.0, 7.0), (INF, 1 / 255)):
        assert _excess(ball.project(x0, z.clone(), p, eps), x0, p, eps) <= 0
        assert _excess(ball.linear_maximizer(z - x0, x0, p, eps), x0, p, eps) <= 0
    assert _excess(ball.linear_maximizer(z - x0, x0, 1.5, 2.0), x0, 1.5, 2.0) <= 0


def test_there_is_no_projection_onto_the_l15_ball() -> None:
    x0, z = _case(0)
    with pytest.raises(ValueError, match=r"1\.5"):
        ball.project(x0, z, 1.5, 1.0)
    with pytest.raises(ValueError, match=r"1\.5"):
        ball.steepest(z, 1.5)
    with pytest.raises(ValueError, match="generators"):
        ball.random_start(x0, 2, 1.0, [torch.Generator()])
