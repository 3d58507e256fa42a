"""The worst case at large radii: capped at the box, and never below that of a smaller radius."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import engine, goals
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.recipe import ATTACKS, Attack, Ball

LEGAL = [
    (p, m)
    for m in ATTACKS.names()
    for p in (1.0, 1.5, 2.0, math.inf)
    if f"{p:g}" in ATTACKS.options(m)["norms"]
]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 4)
        )
    net[4].weight.data.mul_(5)
    return net.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_a_worst_case_is_never_below_that_of_a_smaller_radius(
    net: nn.Module, images: Tensor, p: float, method: str
) -> None:
    """Fractions of the box's diameter, and far beyond it, as radii in units of 0 to 255 are."""
    diameter = geometry.box_diameter(images[0].numel(), p)
    last = None
    for radius in (*(diameter / 2**k for k in (5, 2, 0)), 255 * diameter):
        ball = Ball(p=p, eps=radius)
        found = worst_case_confidence(net, images, ball, steps=4, restarts=1, method=method)
        assert (geometry.distance(found.x, images, p) <= radius * (1 + 1e-6)).all()
        if last is not None:
            assert (found.confidence >= last - 1e-6).all(), radius
        last = found.confidence


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_radii_beyond_the_box_are_cut_to_its_diameter(
    net: nn.Module, images: Tensor, p: float, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    diameter = geometry.box_diameter(images[0].numel(), p)
    attack = Attack(ball=Ball(p=p, eps=1.0), method=method, steps=5)
    goal = goals.log_odds()
    whole = engine.perturb(net, images, goal, attack, eps=diameter)
    engine.warn_of_units.cache_clear()
    with caplog.at_level(logging.WARNING, "ratioctl"):
        for _ in range(2):
            far = engine.perturb(net, images, goal, attack, eps=255.0 * diameter)
    assert torch.equal(whole.x, far.x)
    (record,) = caplog.records
    assert "divide it by 255" in record.getMessage()


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
def test_points_are_moved_into_the_ball(images: Tensor, p: float) -> None:
    z = images.flip(0)
    for eps in (0.01, 0.1):
        moved = geometry.into_ball(images, z, p, eps)
        far = geometry.distance(moved, images, p)
        assert (far <= eps).all()
        assert (far > 0.99 * eps).all()
    assert torch.allclose(geometry.into_ball(images, z, p, 1e4), z, atol=1e-6)


def test_a_larger_ball_first_passes_a_plateau() -> None:
    """Confidence is flat around the image and rises only beyond: the gradient at the image points nowhere."""

    def logits_of(x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        return torch.stack(
            [0.05 * (0.5 - first) + 30 * (first - 0.7).clamp_min(0), torch.zeros_like(first)], 1
        )

    x = torch.full((1, 3, 4, 4), 0.5)
    found = worst_case_confidence(logits_of, x, Ball(p=2.0, eps=0.3), steps=30, restarts=1)
    assert found.confidence.item() > 0.9
    assert found.by.item() > 1
