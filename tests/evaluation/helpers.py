"""Tiny suites, images and networks of the tests of evaluations."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.data.in_distribution import Images
from ratioctl.evaluation import Suite, attack_batches, run
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.recipe import Ball
from ratioctl.report import evaluation_files
from ratioctl.types import Evaluation

TINY = Suite(
    name="tiny",
    inside=8,
    balls=1,
    attacks=("apgd-ce", "apgd-t"),
    budget=AttackBudget(steps=3, targets=2),
    outside=5,
    outside_steps=3,
    curve=4,
    curve_steps=2,
    probe=2,
)


def images(pixels: np.ndarray, labels: np.ndarray | None = None, source: str = "set") -> Images:
    names = () if labels is None else ("a", "b", "c", "d")
    return Images(pixels=pixels, labels=labels, label_names=names, fingerprint=f"f-{source}", source=source)


def noise(n: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def subject(network: torch.nn.Module, temperature: float = 1.0) -> attack_batches.Subject:
    device = torch.device("cpu")
    known: Any = types.SimpleNamespace(temperature=temperature)
    return attack_batches.Subject(
        package=known,
        network=network,  # type: ignore[arg-type]
        predictor=Predictor(network=network, device=device),  # type: ignore[arg-type]
        compute=ComputeConfig(device=device, bf16=False, why=""),
        seed=0,
    )


BALL = Ball(p=2, eps=1)


def evaluated(small_package: Path, labelled: str, **options: Any) -> Evaluation:
    options = {"suite": TINY, "ood": ["uni=noise:uniform"], "limit": 9, "device": "cpu", **options}
    return run([small_package], data=labelled, precision="fp32", **options)


def timeless(evaluation: Evaluation) -> Any:
    document = evaluation.to_json()
    for model in document["models"]:
        for row in model["measurements"]:
            row.pop("duration_s", None)
    return json.loads(json.dumps(evaluation_files.finite(document)))
