"""Scores that look at the network near the image: definitions, attacks, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ratioctl
from ratioctl import scores
from ratioctl.errors import UsageError
from ratioctl.evaluation import attack_batches
from ratioctl.models import build
from ratioctl.models.network import Classifier
from ratioctl.recipe import Ball
from ratioctl.scores import noise_median, pro
from tests.evaluation.helpers import TINY, evaluated, noise, subject

NEAR = ("noise_median", "pro")


@pytest.fixture(scope="module")
def network() -> Classifier:
    torch.manual_seed(0)
    model = build("resnet18", num_classes=4, width=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    return model.eval().requires_grad_(False)


def pixels(n: int = 5) -> Tensor:
    return torch.from_numpy(noise(n)).permute(0, 3, 1, 2).float() / 255


def odds(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return scores.by_name("msp").acceptance_tensor(logits, temperature)


def test_they_follow_the_scores_of_logits_and_none_is_the_default() -> None:
    assert scores.names(network=True) == (*scores.names(), *NEAR)
    assert scores.DEFAULT not in NEAR
    for name in NEAR:
        with pytest.raises(UsageError, match="which only evaluate does"):
            scores.by_name(name)
        assert scores.by_config_name(scores.by_name(name, network=True).config_name) is None


def test_pro_is_the_least_confident_point_of_a_descent(network: Classifier) -> None:
    x, temperature = pixels(), 0.7
    found = odds(pro.lowest_confidence(network, x, temperature), temperature)
    point, visited = x.clone(), []
    for _ in range(pro.STEPS + 1):
        point = point.detach().requires_grad_(True)
        value = odds(network(point), temperature)
        visited.append(value.detach())
        (gradient,) = torch.autograd.grad(value.sum(), point)
        point = (point - pro.STEP_SIZE * gradient.sign()).clamp(0, 1)
    assert torch.allclose(found, torch.stack(visited).amin(0), atol=1e-3)
    assert (found <= odds(network(x), temperature) + 1e-6).all()
    assert (found < odds(network(x), temperature) - 1e-4).any(), "a descent lowers the confidence"


def test_noise_median_is_the_median_over_copies(network: Classifier) -> None:
    x = pixels()
    noises = torch.randn((15, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    copies = torch.stack([odds(network((x + 0.05 * one).clamp(0, 1))) for one in noises])
    found = odds(noise_median.median_confidence(network, x, 1.0))
    assert torch.allclose(found, copies.median(0).values, atol=1e-5)
    alone = odds(noise_median.median_confidence(network, x[2:3], 1.0))
    assert torch.allclose(alone, found[2:3], atol=1e-5), "an image does not depend on its companions"


@pytest.mark.parametrize("name", NEAR)
def test_an_attack_goes_through_the_score_s_own_computation(name: str, network: Classifier) -> None:
    """Its gradient is that of the score, so it beats an attack on the image's own confidence."""
    score, x = scores.by_name(name, network=True), pixels(6)
    assert score.near is not None
    one = x.clone().requires_grad_(True)
    value = odds(score.near(network, one, 1.0))
    (gradient,) = torch.autograd.grad(value.sum(), one)
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = odds(score.near(network, x + step, 1.0))
    assert (moved > value.detach()).sum() >= 5

    ball, who = Ball(p=2, eps=0.5), subject(network)
    images = noise(6)
    through = attack_batches.worst_case_score(who, images, ball, score, steps=10, restarts=1)["acceptance"]
    clean = score.acceptance(attack_batches.score_logits(who, images, score)["logits"], 1.0)
    assert (through >= clean - 1e-9).all()
    plain = attack_batches.worst_case(who, images, ball, steps=10, restarts=1, targets=0, keep=True)["x"]
    transferred = odds(score.near(network, torch.from_numpy(plain), 1.0)).detach().numpy()
    assert through.mean() > transferred.mean()
    assert through.mean() > clean.mean()


def test_evaluate_measures_them_clean_and_attacked(small_package: Path, labelled: str) -> None:
    found = evaluated(small_package, labelled, score=list(NEAR))
    rows = {(m.name, m.dataset, m.ball is not None): m for m in found.models[0].report.measurements}
    for name in NEAR:
        clean, attacked = (rows[f"auroc_{name}", "uni", state] for state in (False, True))
        assert attacked.value <= clean.value
        assert attacked.details["attack"].startswith(f"APGD on {name}")
    again = evaluated(small_package, labelled, score=list(NEAR), suite=TINY).models[0].report.measurements
    assert [m.value for m in again] == [m.value for m in found.models[0].report.measurements]


def test_other_commands_refuse_them(small_package: Path, labelled: str) -> None:
    for call in (
        lambda: ratioctl.calibrate(small_package, data=labelled, score="pro"),
        lambda: ratioctl.ood_score([labelled], model=small_package, score="noise_median"),
    ):
        with pytest.raises(UsageError, match="Use one of msp, energy, entropy, max_logit"):
            call()


def test_without_networks_a_score_costs_one_pass() -> None:
    assert [scores.by_name(name, network=True).passes for name in ("msp", "noise_median", "pro")] == [
        1,
        15,
        11,
    ]
    assert np.isfinite(scores.by_name("pro", network=True).from_logits(np.zeros((2, 3)), 1.0)).all()
