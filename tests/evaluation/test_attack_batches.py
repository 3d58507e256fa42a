"""Attacks on batches: optima, balls, and independence of the batch."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ratioctl import metrics
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation import attack_batches
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.recipe import Ball
from tests.evaluation.helpers import TINY, evaluated, noise, subject


class Linear(torch.nn.Module):
    """Logits (B, K) linear in the pixels; its optimum over a ball is known."""

    def __init__(self, classes: int = 3, size: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(classes, 3 * size * size, generator=generator) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def test_worst_case_reaches_the_optimum_of_a_linear_model_and_never_falls_below_the_image() -> None:
    model = subject(Linear(classes=2, scale=0.05))
    pixels = noise(6).clip(60, 195)  # away from the box
    eps = 0.5
    found = attack_batches.worst_case(model, pixels, Ball(p=2, eps=eps), steps=20, restarts=1, targets=1)
    logits = model.predictor.predict(pixels)
    w = model.network.weight  # type: ignore[attr-defined]
    reach = eps * float((w[0] - w[1]).norm())
    gap = np.abs(logits[:, 0] - logits[:, 1]) + reach  # with two classes the larger one can always gain
    best = 1 / (1 + np.exp(-gap))
    assert np.allclose(found["confidence"], best, atol=1e-3)
    assert (found["confidence"] >= found["clean"]).all()
    assert (found["distance"] <= eps * (1 + 1e-5)).all()
    assert found["picture"].shape == pixels.shape
    assert not found["stuck"].any()


def test_lowest_confidence_is_below_the_images_and_in_the_ball() -> None:
    model = subject(Linear(scale=0.2))
    pixels = noise(6)
    found = attack_batches.lowest(model, pixels, Ball(p=2, eps=0.4), steps=10)
    clean = metrics.confidence(model.predictor.predict(pixels))
    assert (found["confidence"] <= clean).all()
    assert found["confidence"].mean() < clean.mean() - 0.05
    assert (found["distance"] <= 0.4 * (1 + 1e-5)).all()


@pytest.mark.parametrize("with_labels", [True, False])
def test_radius_curves_start_at_the_image_and_never_turn(with_labels: bool) -> None:
    model = subject(Linear(scale=0.2), temperature=0.7)
    pixels, labels = noise(3), np.array([0, 1, 2])
    values = attack_batches.curve(model, pixels, labels if with_labels else None, (0.1, 0.3, 0.6), 5)[
        "values"
    ]
    p = metrics.softmax(model.predictor.predict(pixels), 0.7)
    assert np.allclose(values[:, 0], p[np.arange(3), labels] if with_labels else p.max(1))
    step = np.diff(values, axis=1)
    assert (step <= 0).all() if with_labels else (step >= 0).all()
    assert np.abs(values[:, -1] - values[:, 0]).max() > 0.05


def test_robust_results_of_an_image_do_not_depend_on_its_batch() -> None:
    model, ball = subject(Linear(scale=0.1)), Ball(p=2, eps=0.3)
    pixels = noise(8)
    labels = model.predictor.predict(pixels).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    for attack in ("apgd-ce", "apgd-t"):
        whole, *parts = (
            attack_batches.robust(
                model, pixels[at], labels[at], ball, attack, AttackBudget(steps=3, targets=2), keep=True
            )
            for at in (slice(None), slice(0, 3), slice(3, 8))
        )
        broken = whole["broken"]
        assert np.array_equal(broken, np.concatenate([part["broken"] for part in parts]))
        assert broken[0], "wrong without an attack"
        assert 1 < broken.sum() < 8
        assert (whole["predicted"][broken] != labels[broken]).all()
        assert (whole["distance"][~broken] == 0).all()
        assert len(whole["x"]) == broken.sum()
        assert (model.predictor.predict(whole["x"]).argmax(1) != labels[broken]).all()


def tf32_of_convolutions() -> bool:
    """Whether convolutions on a GPU would be in TF32; torch 2.9 asks elsewhere."""
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision != "ieee"
    return torch.backends.cudnn.allow_tf32


class Recording(torch.nn.Module):
    """Passes images on to a network and notes the precision that convolutions on a GPU would have."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, list[str]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tf32_of_convolutions())
        return self.network(x)


def test_every_score_comes_from_the_exact_backend_and_not_from_the_search() -> None:
    """On a GPU that backend is fp32 without TF32; the search may see another network altogether."""
    exact, pixels, labels = Recording(Linear(scale=0.3)), noise(4), np.array([0, 1, 2, 0])
    search, ball = Linear(scale=0.1), Ball(p=2, eps=0.3)
    model = attack_batches.Subject(
        package=types.SimpleNamespace(temperature=1.0),  # type: ignore[arg-type]
        network=search,  # type: ignore[arg-type]
        predictor=Predictor(network=exact, device=torch.device("cuda")),  # type: ignore[arg-type]
        compute=ComputeConfig(device=torch.device("cpu"), bf16=False, why=""),
        seed=0,
    )
    before = tf32_of_convolutions()
    found = [
        attack_batches.robust(model, pixels, labels, ball, "apgd-ce", AttackBudget(steps=3), keep=True),
        attack_batches.worst_case(model, pixels, ball, steps=3, restarts=1, targets=1, keep=True),
        attack_batches.lowest(model, pixels, ball, steps=3, keep=True),
    ]
    values = attack_batches.curve(model, pixels, labels, (0.1,), 2)["values"]
    attack_batches.probe_inside(model, pixels, labels, ball, 2)
    attack_batches.probe_outside(model, pixels, ball, 2)
    assert tf32_of_convolutions() == before
    assert len(exact.seen) > 10
    assert set(exact.seen) == {False}
    for arrays in found:
        x = torch.from_numpy(arrays["x"])
        rows = arrays.get("broken", np.ones(len(pixels), bool))
        assert np.allclose(arrays["confidence"][rows], metrics.confidence(exact.network(x).numpy()))
    p = metrics.softmax(exact.network(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy())
    assert np.allclose(values[:, 0], p[np.arange(4), labels])


def test_the_worst_case_takes_any_registered_attack(small_package: Path, labelled: str) -> None:
    suite = dataclasses.replace(TINY, outside_method="pgd", curve=0, probe=0)
    found = evaluated(small_package, labelled, suite=suite)
    attacks = {
        row.details["attack"]
        for row in found.models[0].report.measurements
        if row.name == "auroc" and row.ball is not None
    }
    assert attacks == {"PGD, 3 steps x 1, 3 goals, or the image"}
