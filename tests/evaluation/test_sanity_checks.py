"""Self-checks: each fires where it should and stays silent elsewhere."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ratioctl import metrics, package
from ratioctl.attacks import autoattack
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation import Suite, attack_batches, sanity_checks, suites
from ratioctl.evaluation.datasets import evenly_spaced
from ratioctl.recipe import Ball, Calibration
from tests.evaluation.helpers import BALL, evaluated, images, noise, subject


def test_the_self_checks_look_at_every_part_of_a_set() -> None:
    """Sets are sorted by class: the first sixteen images would all be of the first one."""
    assert evenly_spaced(np.arange(100, 200), 4).tolist() == [100, 125, 150, 175]
    assert evenly_spaced(np.array([3, 5, 9]), 4).tolist() == [3, 5, 9]
    assert evenly_spaced(np.arange(3), 2).tolist() == [0, 1]
    assert evenly_spaced(np.arange(3), 0).tolist() == []


class Pocket(torch.nn.Module):
    """Wrong only in a thin shell in the middle of the ball, which a single long step jumps over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        along = (x - 0.5).flatten(1).sum(1) / math.sqrt(x[0].numel())  # distance moved along the diagonal
        hole = 0.2 - (along - 0.25).abs() * 2  # above 0 between 0.15 and 0.35 of a ball of 1
        return torch.stack([torch.zeros_like(hole), hole], 1)


def test_a_weakened_attack_is_noticed_and_a_sound_one_is_not() -> None:
    model, ball = subject(Pocket()), Ball(p=2, eps=1.0)
    pixels = np.full((12, 8, 8, 3), 128, np.uint8) + noise(12) // 64
    labels = np.zeros(12, np.int64)
    said = {}
    for steps in (1, 40):
        alive = ~attack_batches.robust(model, pixels, labels, ball, "apgd-ce", AttackBudget(steps=steps))[
            "broken"
        ]
        probed = (
            attack_batches.probe_inside(model, pixels[alive], labels[alive], ball, 50)
            if alive.any()
            else None
        )
        broken = np.zeros(0, bool) if probed is None else probed["broken"]
        said[steps] = sanity_checks.not_converged_inside(ball, broken, 50)
    assert said[1] is not None
    assert "too weak" in said[1]
    assert said[40] is None


OK = np.array([[2.0, -1.0, 0.3], [0.1, 0.2, 5.0]])


def known_package(**ratio: Any) -> Any:
    return types.SimpleNamespace(calibrated=bool(ratio.get("thresholds")), config={"ratio": ratio})


@pytest.mark.parametrize(
    ("fires", "silent"),
    [
        (
            lambda: sanity_checks.zero_gradients("x", 5, 100),
            lambda: sanity_checks.zero_gradients("x", 1, 100),
        ),
        (lambda: sanity_checks.randomized(OK, OK + 1e-2), lambda: sanity_checks.randomized(OK, OK + 1e-7)),
        (lambda: sanity_checks.probabilities(metrics.softmax(OK)), lambda: sanity_checks.probabilities(OK)),
        (
            lambda: sanity_checks.square_wins(BALL, np.array([4] * 5 + [1] * 95), suites.STANDARD),
            lambda: sanity_checks.square_wins(BALL, np.array([4] + [1] * 99), suites.STANDARD),
        ),
        (
            lambda: sanity_checks.not_converged_inside(BALL, np.arange(20) < 3, 200),
            lambda: sanity_checks.not_converged_inside(BALL, np.arange(20) < 1, 200),
        ),
        (
            lambda: sanity_checks.not_converged_outside("o", BALL, np.full(9, 0.3), np.full(9, 0.5), 200),
            lambda: sanity_checks.not_converged_outside("o", BALL, np.full(9, 0.3), np.full(9, 0.31), 200),
        ),
        (  # a sharp model: three points are little to add, and all that was missing
            lambda: sanity_checks.not_converged_outside("o", BALL, np.full(9, 0.96), np.full(9, 0.99), 200),
            lambda: sanity_checks.not_converged_outside("o", BALL, np.full(9, 0.99), np.full(9, 0.9999), 200),
        ),
        (
            lambda: sanity_checks.below_clean("o", np.array([0.5, 0.6]), np.array([0.5, 0.59])),
            lambda: sanity_checks.below_clean("o", np.array([0.5, 0.6]), np.array([0.5, 0.6])),
        ),
        (
            lambda: sanity_checks.temperature_at_end(0.05, Calibration(), True),
            lambda: sanity_checks.temperature_at_end(0.41, Calibration(), True),
        ),
        (
            lambda: sanity_checks.uncalibrated(known_package()),
            lambda: sanity_checks.uncalibrated(known_package(thresholds={"tpr95": 0.5})),
        ),
        (lambda: sanity_checks.few({"a": 999, "b": 2000}), lambda: sanity_checks.few({"a": 1000})),
    ],
)
def test_every_sanity_check_fires_and_stays_silent(
    fires: Callable[[], str | None], silent: Callable[[], str | None]
) -> None:
    assert fires()
    assert silent() is None


def test_duplicates_within_and_between_sets_are_counted() -> None:
    first, second = noise(10, 1), noise(10, 2)
    sound = {"a": images(first), "b": images(second)}
    assert sanity_checks.duplicates(sound) == []
    mixed = {"a": images(first), "b": images(np.concatenate([second, first[:2], second[:1]]))}
    said = sanity_checks.duplicates(mixed)
    assert [text for text in said if "1 of the 13" in text and "in it" in text]
    assert [text for text in said if "2 of the 13" in text and "are also in a" in text]


def test_evaluating_on_training_data_is_noticed() -> None:
    trained: Any = known_package(provenance={"data": {"train": "f-t", "held_out": "f-h"}})
    sets = {"x": "f-t", "y": "f-other"}
    assert len(sanity_checks.trained_on(trained, sets)) == 1
    assert "trained on" in sanity_checks.trained_on(trained, sets)[0]
    assert sanity_checks.trained_on(trained, {"y": "f-other"}) == []


def test_evaluating_on_sources_of_the_training_is_noticed() -> None:
    """A folder that was parted for training, as a whole, and noise that training drew anew."""
    parts = {"train": "split:train:photos", "outside": ["noise:smooth", "other"]}
    trained: Any = known_package(provenance={"sources": parts})
    sets = {"photos": "photos", "photos:test": "split:test:photos", "noise": "noise:smooth", "new": "else"}
    said = sanity_checks.trained_on(trained, dict.fromkeys(sets, "f"), sets)
    assert [text.split(" ")[0] for text in said] == ["photos", "noise"]
    assert "use split:test:photos" in said[0]
    assert "--ood NAME=SOURCE" in said[1]


class Sound(torch.nn.Module):
    """Channel means against one another: smooth, so short searches end where long ones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = x.mean((2, 3)) * 40
        return torch.cat([m, m.mean(1, keepdim=True)], 1)


class Rounded(Sound):
    """The same of pixels rounded to a few levels: no gradient, though black boxes see through it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * 24).round() / 24)


class Noisy(Sound):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(len(x), 4, generator=self.noise)

    noise = torch.Generator().manual_seed(0)


class Softmaxed(Sound):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(1)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Sound, ()),
        (Rounded, ("the gradient was zero", "Square, which uses no gradients")),
        (Noisy, ("randomized",)),
        (Softmaxed, ("probabilities, not logits",)),
    ],
)
def test_sanity_checks_pass_a_sound_model_and_warn_of_an_unsound_one(
    small_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: type[torch.nn.Module],
    says: tuple[str, ...],
) -> None:
    suite = dataclasses.replace(WARY, attacks=("apgd-ce", "square"), budget=AttackBudget(steps=8, queries=60))
    warnings = warnings_of(network, suite, small_package, tmp_path, monkeypatch)
    for text in says:
        assert any(text in warning for warning in warnings), warnings
    if not says:
        expected = ("fewer than 1,000",)
        assert all(any(text in warning for text in expected) for warning in warnings), warnings


@pytest.mark.parametrize(("network", "doubted"), [(Sound, False), (Rounded, True)])
def test_the_reference_is_watched_for_zero_gradients_too(
    small_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: type[torch.nn.Module],
    doubted: bool,
) -> None:
    """The package does not tell of them; the self-check's own search on what survived does."""
    monkeypatch.setattr(autoattack, "standard_attack", lambda name, logits_of, x, *more: x)  # breaks nothing
    suite = dataclasses.replace(WARY, backend="reference")
    warnings = warnings_of(network, suite, small_package, tmp_path, monkeypatch)
    said = "self-check of the robust accuracy (l2 0.125): the gradient was zero"
    assert any(text.startswith(said) for text in warnings) is doubted, warnings


WARY = Suite(
    name="tiny",
    inside=40,
    balls=1,
    outside=12,
    outside_steps=12,
    curve=0,
    probe=12,
)


def warnings_of(
    network: type[torch.nn.Module],
    suite: Suite,
    small_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, ...]:
    """What an evaluation of this network says, on images that it gets right."""
    built = network().eval()
    monkeypatch.setattr(sys.modules["ratioctl.evaluation.driver"], "fold_batchnorm", lambda model: built)
    pixels = noise(40, 5) // 8 + 110
    labels = built(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).argmax(1)
    for k, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = tmp_path / "data" / ("cat", "dog", "red panda", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{k}.png")
    copy = tmp_path / "copy"
    shutil.copytree(small_package, copy)
    package.update(package.read(copy), config_changes={"ratio": {"temperature": 0.5}})
    found = evaluated(copy, str(tmp_path / "data"), suite=suite, limit=40)
    return found.models[0].report.warnings
