"""Median of the confidence over noisy copies of the image, after ROSS (2026), without its term of spread."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ratioctl.scores.msp import MSP
from ratioctl.scores.registry import LogitsOf, register_score

if TYPE_CHECKING:
    from torch import Tensor

COPIES, SIGMA = 15, 0.05  # an odd number, so the median is one of them; ours, not tuned


def median_confidence(logits_of: LogitsOf, x: Tensor, temperature: float) -> Tensor:
    """Logits (B, K) of the noisy copy with the median confidence. The noise is the same for every image.

    Differentiable in `x`, through the copy that is the median: an attack knows the noise.
    """
    import torch

    from ratioctl.scores.msp import log_odds_tensor

    generator = torch.Generator().manual_seed(0)
    noise = SIGMA * torch.randn((COPIES, *x.shape[1:]), generator=generator).to(x.device)
    logits = torch.stack([logits_of((x + one).clamp(0, 1)).float() for one in noise])
    with torch.no_grad():
        odds = torch.stack([log_odds_tensor(part, temperature) for part in logits])
        median = odds.argsort(0)[COPIES // 2]
    return logits[median, torch.arange(len(x), device=x.device)]


register_score(
    dataclasses.replace(
        MSP,
        name="noise_median",
        config_name="noise-median",
        description=f"median MSP of {COPIES} copies with Gaussian noise of standard deviation {SIGMA:g}",
        source="after ROSS (2026), for MSP, without its term of spread",
        near=median_confidence,
        passes=COPIES,
    )
)
