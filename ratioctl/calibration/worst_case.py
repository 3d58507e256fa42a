"""Attacked out-of-distribution images, for thresholds that hold in the worst case."""

from __future__ import annotations

import numpy as np
import torch

from ratioctl import scores
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.models.predict import Predictor
from ratioctl.recipe import Ball
from ratioctl.scores import OodScore

_CHUNK = 128


def attacked(
    network: Predictor, pixels: np.ndarray, eps: float, kind: OodScore, temperature: float, steps: int
) -> np.ndarray:
    """Logits (N, K) of the most accepted points found in the l2 ball around each of `pixels` (N, H, W, C)."""
    acceptance = (
        None
        if kind.name == scores.DEFAULT
        else lambda logits: kind.acceptance_tensor(logits.float(), temperature)
    )
    parts = []
    for k in range(0, len(pixels), _CHUNK):
        part = torch.from_numpy(pixels[k : k + _CHUNK]).to(network.device)
        found = worst_case_confidence(
            network.exact,
            part.permute(0, 3, 1, 2).float() / 255,
            Ball(p=2.0, eps=eps),
            temperature=temperature,
            steps=steps,
            restarts=1,
            acceptance=acceptance,
        )
        parts.append(network.predict(found.x.cpu().numpy()))
    return np.concatenate(parts)
