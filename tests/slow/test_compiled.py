"""torch.compile on the CPU: an attack finds what it finds eagerly, and training uses it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ratioctl import recipe as recipes
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.models import build, compiled, fold_batchnorm
from ratioctl.recipe import Attack, Ball
from ratioctl.training.loop import fit


@pytest.mark.slow
def test_an_attack_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = fold_batchnorm(build("resnet18", num_classes=3, width=2, mean=[0.5] * 3, std=[0.25] * 3))
        x = torch.rand(4, 3, 8, 8)
    calls: list[int] = []
    compile_ = torch.compile

    def counted(module: torch.nn.Module, **options: Any) -> Any:
        fast = compile_(module, **options)
        return lambda images: calls.append(1) or fast(images)

    monkeypatch.setattr(torch, "compile", counted)
    goal = goals.margin(torch.tensor([0, 1, 2, 0]))
    attack = Attack(ball=Ball(p=2, eps=0.5), method="pgd", steps=4)
    eager = perturb(network, x, goal, attack)
    ours = perturb(compiled.compiled(network), x, goal, attack)
    assert len(calls) == 5 + 2  # the points, and a trial for each kind of pass
    assert (ours.x - eager.x).abs().max() < 1e-4
    assert (ours.value - eager.value).abs().max() < 1e-4

    monkeypatch.setenv("RATIOCTL_COMPILE", "1")
    settings = ["model.width=2", "optim.epochs=0.02", "optim.batch_size=8", "optim.batch_size_out=8"]
    before = len(calls)
    with caplog.at_level(logging.WARNING, "ratioctl"):
        fit(recipes.load("digits-ratio", [*settings, "optim.validate_images=8"]), tmp_path)
    assert len(calls) > before + 10
    assert "torch.compile" not in caplog.text
