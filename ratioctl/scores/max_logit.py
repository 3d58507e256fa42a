"""Maximum logit: the negated largest logit, before temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ratioctl.scores.registry import register_from_score

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def _score(logits: np.ndarray, temperature: float) -> np.ndarray:
    from ratioctl import metrics

    return -metrics.finite_logits(logits).max(axis=-1)


def _tensor(logits: Tensor, temperature: float) -> Tensor:
    return -logits.amax(dim=1)


register_from_score(
    name="max_logit",
    description="-max_k f_k, before temperature",
    source="Hendrycks et al. 2022, 'Scaling Out-of-Distribution Detection for Real-World Settings'",
    from_logits=_score,
    from_tensor=_tensor,
    threshold_range=(-math.inf, math.inf),
)
