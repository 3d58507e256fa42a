"""PRO: the lowest confidence over a few descent steps near the image (arXiv 2503.18784).

Robust networks stay confident near ID images and lose confidence faster near OOD images.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ratioctl.scores.msp import MSP
from ratioctl.scores.registry import LogitsOf, register_score

if TYPE_CHECKING:
    from torch import Tensor

STEPS, STEP_SIZE = 5, 0.003  # of pixels in [0,1]; ours, not tuned


def lowest_confidence(logits_of: LogitsOf, x: Tensor, temperature: float) -> Tensor:
    """Logits (B, K) at the least confident of the image and STEPS points of a descent by signs.

    Differentiable in `x`: a step by the sign of a gradient has derivative one almost everywhere.
    """
    import torch

    from ratioctl.scores.msp import log_odds_tensor

    shift, points = torch.zeros_like(x), []
    for step in range(STEPS + 1):
        points.append(logits_of((x + shift).clamp(0, 1)).float())
        if step == STEPS:
            break
        with torch.enable_grad():
            point = (x.detach() + shift).clamp(0, 1).requires_grad_(True)
            odds = log_odds_tensor(logits_of(point).float(), temperature)
            (gradient,) = torch.autograd.grad(odds.sum(), point)
        shift = shift - STEP_SIZE * gradient.sign()
    logits = torch.stack(points)
    with torch.no_grad():
        odds = torch.stack([log_odds_tensor(part, temperature) for part in logits])
        lowest = odds.argmin(0)
    return logits[lowest, torch.arange(len(x), device=x.device)]


register_score(
    dataclasses.replace(
        MSP,
        name="pro",
        config_name="pro",
        description=f"MSP at the least confident of {STEPS} descent steps of linf {STEP_SIZE:g}",
        source="arXiv 2503.18784 (PRO), for MSP; the steps are ours",
        near=lowest_confidence,
        passes=2 * STEPS + 1,
    )
)
