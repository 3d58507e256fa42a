"""Certified heads: interval bounds on known problems and under attack, and the formula of the confidence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl import package as packages
from ratioctl.errors import PackageError, UsageError
from ratioctl.models import Classifier, build, fold_batchnorm, from_package
from ratioctl.models.certified import (
    CertifiedNetwork,
    Discriminator,
    SpatialMean,
    bounds,
    guaranteed_log_odds,
    head_of,
    upper_bound,
)
from ratioctl.models.registry import find_architecture
from ratioctl.package.config import parse_config

PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def classifier(head: nn.Sequential, logits: Tensor | None = None) -> Classifier:
    """A head on a base of fixed logits, by default four equal ones; pixels are not normalized."""
    base = Fixed(torch.zeros(4) if logits is None else logits)
    network = CertifiedNetwork(base, Discriminator(1, 1), base.logits.numel())
    network.discriminator = head  # type: ignore[assignment]
    return Classifier(network, (0.0,), (1.0,)).eval()


def assert_tight(bound: Tensor, maximum: Tensor, **tolerance: float) -> None:
    assert torch.allclose(bound, maximum, **tolerance)
    assert (bound >= maximum).all()


def test_the_bound_of_a_linear_head_is_the_maximum() -> None:
    """Over a box the maximum of w x + b takes the end of every pixel that w's sign says."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(1, 1, 4), SpatialMean())
    model, x, eps = classifier(head), torch.rand(16, 1, 4, 4), 0.3
    x[:8].round_()  # corners of the box: half of the ball is outside
    best = torch.where(head[0].weight > 0, (x + eps).clamp(0, 1), (x - eps).clamp(0, 1))
    assert_tight(upper_bound(model, x, eps), head(best).squeeze(1), atol=2e-5)


def test_the_bound_of_an_increasing_head_is_the_maximum() -> None:
    """With no negative weight every layer increases, so g is largest at the brightest corner."""
    torch.manual_seed(0)
    head = Discriminator(1, 3)
    for parameter in head.parameters():
        parameter.data.abs_().mul_(1.5)
    x = torch.rand(5, 1, 7, 9)
    assert_tight(upper_bound(classifier(head), x, 0.1), head((x + 0.1).clamp(0, 1)).squeeze(1), rtol=2e-4)


def test_no_point_of_the_ball_exceeds_the_bound() -> None:
    torch.manual_seed(1)
    head = Discriminator(1, 6)
    for parameter in head.parameters():
        parameter.data *= 2
    model, x, eps = classifier(head), torch.rand(6, 1, 9, 9), 0.05
    x[0], x[1] = 0.0, 1.0
    upper = upper_bound(model, x, eps)
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    highest = clean = head(x).squeeze(1).detach()
    for _ in range(200):  # corners
        z = torch.where(torch.rand(x.shape) < 0.5, low, high)
        highest = torch.maximum(highest, head(z).squeeze(1).detach())
    z = x.clone()
    for _ in range(60):  # projected gradient ascent
        z.requires_grad_(True)
        value = head(z).squeeze(1)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        highest = torch.maximum(highest, value.detach())
        z = (z.detach() + 0.2 * eps * gradient.sign()).clamp(low, high)
    assert (highest <= upper).all()
    assert (highest > clean).all(), "the attack searches"
    wider = upper_bound(model, x, 2 * eps)
    assert (wider > upper).all()
    whole = upper_bound(model, x, 1.0)
    assert torch.allclose(whole, whole[:1].expand(6), atol=1e-4), "one box of all images"


def test_bounds_of_a_point_contain_what_other_roundings_compute() -> None:
    """Terms of 1e3 that cancel: float32 and float64 differ by more than 1e-6, and both are inside."""
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), SpatialMean(), nn.Linear(8, 1))
    for parameter in layers.parameters():
        parameter.data *= 100
    x = torch.rand(32, 8, 6, 6) * 100
    low, high = (end.detach() for end in bounds(layers, x, x))
    exact = layers.double()(x.double()).detach()
    own = layers.float()(x).detach()
    assert float((exact - own).abs().max()) > 1e-6
    for value in (exact, own):
        assert ((low <= value) & (value <= high)).all()
    assert float((high - low).max()) < 1e-2 * float(own.abs().max())


def test_other_layers_have_no_bounds() -> None:
    with pytest.raises(TypeError, match="no interval bounds for Sigmoid"):
        bounds(nn.Sequential(nn.Sigmoid()), torch.zeros(1), torch.ones(1))
    plain = build("resnet18", num_classes=2, width=2, **PIXELS)
    assert head_of(plain) is None
    with pytest.raises(TypeError, match="no certified head"):
        upper_bound(plain, torch.rand(1, 3, 8, 8), 0.01)


def test_probabilities_are_the_papers_mixture() -> None:
    """p = q s + (1 - s) / K with q at the base's temperature and s = sigmoid(g + shift)."""
    torch.manual_seed(3)
    model = build("certified:resnet18", num_classes=5, width=2, head_width=2, **PIXELS).eval()
    network, x = model.network, torch.rand(4, 3, 8, 8)
    assert isinstance(network, CertifiedNetwork)
    network.temperature.fill_(0.3)
    network.shift.fill_(-0.7)
    z = (x - model.mean) / model.std
    q, s = (network.base(z) / 0.3).softmax(1), (network.discriminator(z) - 0.7).sigmoid()
    assert torch.allclose(model(x).softmax(1), q * s + (1 - s) / 5, atol=1e-6)
    assert torch.equal(model(x).argmax(1), network.base(z).argmax(1)), "the accuracy stays"


@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.5])
def test_the_guarantee_is_reached_by_a_certain_base_and_never_exceeded(temperature: float) -> None:
    torch.manual_seed(4)
    head = nn.Sequential(SpatialMean(), nn.Linear(1, 1))
    head[1].weight.data.fill_(9.0)
    head[1].bias.data.fill_(-4.0)
    x = torch.linspace(0, 1, 9).view(9, 1, 1, 1)
    for logits in (torch.tensor([200.0, 0, 0, 0]), *torch.randn(20, 4) * 3):
        model = classifier(head, logits)
        p = (model(x).double() / temperature).softmax(1).amax(1)
        bound = guaranteed_log_odds(upper_bound(model, x, 0.0), 4, temperature).sigmoid()
        assert (p <= bound).all()
        if logits[0] == 200:
            assert torch.allclose(p, bound, atol=1e-4)


def test_confidences_in_the_ball_stay_below_the_guarantee(certified_package: Path) -> None:
    """Projected gradient ascent on the confidence of the whole network, batch norms folded."""
    package = packages.read(certified_package)
    model = fold_batchnorm(from_package(package))
    x, eps = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 0.05
    bound = guaranteed_log_odds(upper_bound(model, x, eps), 4, package.temperature)
    low, high, z = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1), x.clone()
    for _ in range(40):
        z.requires_grad_(True)
        scaled = model(z).double() / package.temperature
        top = scaled.amax(1)
        others = scaled.masked_fill(F.one_hot(scaled.argmax(1), 4).bool(), -math.inf).logsumexp(1)
        assert (top - others <= bound).all()
        (gradient,) = torch.autograd.grad(scaled.log_softmax(1).amax(1).sum(), z)
        z = (z.detach() + 0.01 * gradient.sign()).clamp(low, high)


def test_a_head_has_the_options_of_its_base() -> None:
    found = find_architecture("certified:resnet18")
    assert found.options == {"width": int, "stem_stride": int, "head_width": int}
    assert find_architecture("certified:timm:resnet18").options == {"head_width": int}
    with pytest.raises(UsageError, match=r'resnet81.*"resnet18"'):
        find_architecture("certified:resnet81")
    with pytest.raises(UsageError, match="unknown architecture"):
        find_architecture("certified:certified:resnet18")
    with pytest.raises(UsageError, match="head_width 0: is out of range"):
        build("certified:resnet18", num_classes=2, head_width=0, **PIXELS)
    with pytest.raises(UsageError, match="has no depth option"):
        build("certified:resnet18", num_classes=2, depth=3, **PIXELS)


def test_the_radius_is_stated_in_the_config(certified_package: Path, small_package: Path) -> None:
    package = packages.read(certified_package)
    assert package.certified == packages.certified_radius(package) == 0.02
    assert packages.read(small_package).certified is None
    with pytest.raises(UsageError, match=r"small: has no certified head.*prood-head"):
        packages.certified_radius(packages.read(small_package))
    config = packages.portable_config(package)
    del config["ratio"]["certified"]
    assert parse_config(config, "x", name="x").certified == 0.01, "the default"
    balls: list[Any] = [{"norm": "2", "eps": 0.1}, {"norm": "inf", "eps": 0}, {"norm": "inf", "eps": True}]
    for wrong in (*balls, {"norm": "inf"}, []):
        with pytest.raises(PackageError, match=r"ratio\.certified"):
            parse_config({**config, "ratio": {**config["ratio"], "certified": wrong}}, "x", name="x")
    stated = {**config, "architecture": "resnet18"}
    stated["ratio"] = {**config["ratio"], "certified": {"norm": "inf", "eps": 0.1}}
    with pytest.raises(PackageError, match="needs an architecture certified:NAME"):
        parse_config(stated, "x", name="x")
